"""Few-label segmentation of small synthetic hearts in a minute or two of one CPU core.

    python -m kafjax.main --config configs/phantom_small_finetune.py \
        --config.init_from=runs/phantom_small_pretrain --config.data.num_labeled=2

on the phantoms and the run that `phantom_small_pretrain.py` tells of.
"""

import ml_collections

from configs import phantom_finetune, phantom_small_pretrain


def get_config() -> ml_collections.ConfigDict:
    """The phantoms' run, smaller."""
    config = phantom_finetune.get_config()
    config.data.update(phantom_small_pretrain.get_config().data)
    config.num_epochs = 80
    config.every.update({"checkpoint": 1000, "picture": 0, "validation_epochs": 40})
    return config
