"""Pretraining on synthetic hearts in a few minutes on two CPU cores: `make demo` runs it.

    python -m data_prep.main --dataset phantom --data_dir data
    python -m kafjax.main --config configs/phantom_pretrain.py

Small everywhere: the images, f = 8 and 4 attention layers.
"""

import ml_collections

from configs import chd_pretrain


def get_config() -> ml_collections.ConfigDict:
    """The CHD run at the phantoms' size."""
    config = chd_pretrain.get_config()
    config.batch_size = 8
    config.num_epochs = 20
    config.data.update({"name": "phantom", "patch_size": (96, 96), "max_keypoints": 96})
    config.data.num_threads = 2
    config.model.update({"filters": 8, "num_attention_layers": 4, "embedding": 64})
    # A hundredth of the paper's steps: a larger rate makes the losses fall in sight.
    config.optimizer.learning_rate = 0.01
    config.every.update({"log": 10, "checkpoint": 50, "picture": 100})
    return config
