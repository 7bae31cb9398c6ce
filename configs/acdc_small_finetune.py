"""Few-label segmentation of ACDC on a few CPU cores, on a grid of 2.5 mm.

    kafjax train --config acdc_small_finetune --config.init_from=runs/acdc_small_pretrain \
        --config.data.fold=0 --config.data.num_labeled=2 --workdir runs/acdc_small_fold0_M2

on the dataset and the run that `acdc_small_pretrain.py` describes.
"""

import ml_collections

from kafjax.configs import acdc_finetune, acdc_small_pretrain


def get_config(start: str = "pretrained") -> ml_collections.ConfigDict:
    """ACDC's run, smaller."""
    config = acdc_finetune.get_config(start)
    pretraining = acdc_small_pretrain.get_config()
    for field in ("name", "patch_size", "num_threads"):
        config.data[field] = pretraining.data[field]
    for field in ("filters", "num_attention_layers"):
        config.model[field] = pretraining.model[field]
    config.every.update({"log": 20, "checkpoint": 200, "picture": 0, "validation_epochs": 201})
    return config
