"""Pretraining on synthetic hearts in a few minutes on two CPU cores: `make demo` runs it.

    kafjax prepare --dataset phantom --num_subjects 4 --size 64x64x24 --max_keypoints 64
    kafjax train --config phantom_pretrain

Small everywhere: 64 x 64 slices, f = 8, 2 attention layers, 120 steps of 16 pairs.
"""

import ml_collections

from kafjax.configs import chd_pretrain


def get_config(method: str = "kaf") -> ml_collections.ConfigDict:
    """The CHD run at the phantoms' size."""
    config = chd_pretrain.get_config(method)
    config.batch_size = 16
    config.num_epochs = 20
    config.data.update({"name": "phantom", "patch_size": (64, 64)})
    config.data.num_threads = 2
    config.model.update({"filters": 8, "num_attention_layers": 2, "embedding": 64})
    # In a hundredth of the paper's steps SGD does not leave the start, where all embeddings of the
    # CNN head are equal; Adam does.
    config.optimizer.update({"name": "adam", "learning_rate": 1e-3})
    config.every.update({"log": 10, "checkpoint": 60, "picture": 60})
    return config
