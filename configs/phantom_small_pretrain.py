"""Pretraining on small synthetic hearts in minutes of one CPU core.

    kafjax prepare --dataset phantom --name phantom_small \
        --raw_dir data/raw/phantom_small --num_subjects 10 --size 48x48x16 --max_keypoints 24
    kafjax train --config phantom_small_pretrain

The run of `kafjax experiment --small`: 200 steps of 16 pairs, 48 x 48 slices, K = 24.
"""

import ml_collections

from kafjax.configs import phantom_pretrain


def get_config(method: str = "kaf") -> ml_collections.ConfigDict:
    """The phantoms' run, smaller."""
    config = phantom_pretrain.get_config(method)
    config.num_epochs = 20
    config.data.update({"name": "phantom_small", "patch_size": (48, 48)})
    # KAF layers and matching are most of the time of a step at this size.
    config.model.update({"embedding": 32, "num_attention_layers": 1})
    if "num_matcher_layers" in config.model:  # local contrast has no matcher
        config.model.num_matcher_layers = 2
    # Intermediate pictures and checkpoints would cost more than they are worth.
    config.every.update({"log": 10, "checkpoint": 1000, "picture": 0})
    return config
