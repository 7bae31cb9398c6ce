"""Few-label segmentation of ACDC from a pretrained encoder (appendix, table 3; docs/method.md 7).

    kafjax train --config acdc_finetune --config.init_from=runs/acdc_pretrain \
        --config.data.fold=0 --config.data.num_labeled=2 --workdir runs/acdc_fold0_M2

352 x 352, batches of 10 slices of the M labelled patients, 201 epochs. Device, wall time and score:
not yet measured.
"""

import ml_collections

from kafjax.configs import acdc_pretrain, chd_finetune


def get_config(start: str = "pretrained") -> ml_collections.ConfigDict:
    """CHD's fine-tuning with ACDC's sizes, rates and, unlike CHD's, augmentation."""
    config = chd_finetune.get_config(start)
    pretrain = acdc_pretrain.get_config()
    config.num_epochs = 201
    for field in ("name", "patch_size"):
        config.data[field] = pretrain.data[field]
    config.model.filters = pretrain.model.filters
    config.model.num_classes = 4
    config.augment = pretrain.augment
    config.optimizer.update({"learning_rate": 5e-4, "final_learning_rate": 5e-5})
    return config
