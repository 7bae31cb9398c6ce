"""Few-label segmentation of small synthetic hearts in a minute or two of one CPU core.

    kafjax train --config phantom_small_finetune \
        --config.init_from=runs/phantom_small_pretrain --config.data.num_labeled=2

on the phantoms and the run of `phantom_small_pretrain.py`.
"""

import ml_collections

from kafjax.configs import phantom_finetune, phantom_small_pretrain


def get_config(start: str = "pretrained") -> ml_collections.ConfigDict:
    """The phantoms' run, smaller."""
    config = phantom_finetune.get_config(start)
    pretraining = phantom_small_pretrain.get_config()
    for field in ("name", "patch_size", "num_threads"):
        config.data[field] = pretraining.data[field]
    config.model.num_attention_layers = pretraining.model.num_attention_layers
    # Two volumes are 32 slices. Many small steps teach more in the same time than few large ones:
    # with batches of 10, runs of this length ended before the UNet had learnt the smaller classes.
    config.batch_size = 4
    config.num_epochs = 60
    config.every.update({"checkpoint": 1000, "picture": 0, "validation_epochs": 60})
    return config
