"""Pretraining on ACDC on a few CPU cores: whole slices on a grid of 2.5 mm.

    kafjax prepare --dataset acdc --raw_dir ACDC/database/training --name acdc_small \
        --pixel_spacing 2.5 --max_keypoints 256
    kafjax train --config acdc_small_pretrain

160 x 160 pixels hold four of five volumes whole; f = 8, two attention layers, batches of 16 pairs.
Random smaller patches of the paper's grid do not save time: they do not reveal a slice's position
in its volume, and the global losses stay at their plateau (docs/results.md).
"""

import ml_collections

from kafjax.configs import acdc_pretrain


def get_config(method: str = "kaf") -> ml_collections.ConfigDict:
    """ACDC's run, smaller."""
    config = acdc_pretrain.get_config(method)
    config.batch_size = 16
    config.num_epochs = 10
    config.data.update({"name": "acdc_small", "patch_size": (160, 160), "num_threads": 2})
    config.model.update({"filters": 8, "num_attention_layers": 2, "embedding": 64})
    # At 1e-3 the first steps enlarge the common part of all embeddings so much that the CNN head's
    # gradient vanishes; at 1e-4 it does not (docs/results.md).
    config.optimizer.update({"name": "adam", "learning_rate": 1e-4})
    config.every.update({"log": 10, "checkpoint": 100, "picture": 0})
    return config
