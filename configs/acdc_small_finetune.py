"""Few-label segmentation of ACDC on a CPU core, on a grid of 4 mm.

    kafjax train --config acdc_small_finetune --config.init_from=runs/acdc_small_pretrain \
        --config.data.fold=0 --config.data.num_labeled=2 --workdir runs/acdc_small_fold0_M2

on the dataset and the run that `acdc_small_pretrain.py` describes. In so few steps the paper's
losses and rates hardly learn a class; this is the recipe for own data (`own_finetune.py`), without
its post-processing. 100 epochs are some 600 steps for two labelled patients.
"""

import ml_collections

from kafjax.configs import acdc_small_pretrain, own_finetune


def get_config(start: str = "pretrained") -> ml_collections.ConfigDict:
    """The recipe for own data on ACDC's classes, smaller."""
    config = own_finetune.get_config(start)
    pretraining = acdc_small_pretrain.get_config()
    for field in ("name", "patch_size", "patch_keypoints", "num_threads"):
        config.data[field] = pretraining.data[field]
    for field in ("filters", "num_attention_layers"):
        config.model[field] = pretraining.model[field]
    config.model.num_classes = 4
    config.batch_size = 6
    config.num_epochs = 100
    config.postprocess = False
    config.checkpoint.select = "last"
    config.every.update({"log": 20, "checkpoint": 100, "picture": 0, "validation_epochs": 0})
    return config
