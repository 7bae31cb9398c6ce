"""Few-label segmentation of CHD from a pretrained encoder (appendix, table 3; docs/method.md 7).

    kafjax train --config chd_finetune --config.init_from=runs/chd_pretrain \
        --config.data.fold=0 --config.data.num_labeled=2 --workdir runs/chd_fold0_M2

and without pretraining, for comparison (the appendix's tables 1 and 3;
`--config.model.name=unet`, `unet_c2` or `kaf_unet` for table 1):

    kafjax train --config chd_finetune:scratch \
        --config.data.fold=0 --config.data.num_labeled=2 --workdir runs/chd_scratch_fold0_M2

512 x 512, batches of 10 slices of the M labelled volumes, 101 epochs. Device, wall time and score:
not yet measured.
"""

import ml_collections
from ml_collections import config_dict

from kafjax.configs import chd_pretrain

STARTS = ("pretrained", "scratch")


def get_config(start: str = "pretrained") -> ml_collections.ConfigDict:
    """The pretraining run's data and encoder, with a decoder and labels.

    `scratch` starts from fresh variables and has no `init_from`.
    """
    if start not in STARTS:
        raise ValueError(f"start is {start!r}, expected one of {', '.join(STARTS)}")
    config = chd_pretrain.get_config()
    config.task = "segment"
    config.batch_size = 10  # slices, over all devices
    config.num_epochs = 101
    if start == "pretrained":
        # The workdir of a pretraining run or of an import that provides the encoder.
        config.init_from = config_dict.placeholder(str)
    # The paper's fold, from 0; None trains on all labelled volumes. Instead of folds: names of the
    # volumes or subjects to validate on, or nnU-Net's splits_final.json.
    config.data.fold = 0
    config.data.num_folds = 5
    config.data.validation = config_dict.placeholder(tuple)
    config.data.splits_file = config_dict.placeholder(str)
    # M, labelled volumes to train on; by default all of the fold's.
    config.data.num_labeled = config_dict.placeholder(int)
    # Fraction of each batch guaranteed to show a class other than the background.
    config.data.foreground_share = 0.0

    # CHD's, with the background, checked against the dataset. None: the dataset's number.
    config.model.num_classes = 8
    for field in ("embedding", "num_matcher_layers", "num_sinkhorn_iterations"):
        del config.model[field]
    config.loss = {
        "weights": {"cross_entropy": 1.0, "dice": 0.0},
        "class_weights": config_dict.placeholder(tuple),
    }
    # CHD's slices are only cropped at random.
    config.augment.transform.update({"mirror_probability": 0.0, "spatial_probability": 0.0})

    del config.optimizer.momentum
    config.optimizer.update(
        {"name": "adam", "learning_rate": 5e-5, "final_learning_rate": 5e-6, "weight_decay": 1e-5}
    )
    # In epochs, in addition to the last step, which always validates. The best by mean Dice and the
    # newest are kept.
    config.every.validation_epochs = 2
    config.checkpoint.keep_newest = 1
    return config
