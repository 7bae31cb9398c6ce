"""Few-label segmentation of CHD from a pretrained encoder (appendix, table 3; docs/method.md 7).

    python -m kafjax.main --config configs/chd_finetune.py --config.init_from=runs/chd_pretrain \
        --config.data.fold=0 --config.data.num_labeled=2 --workdir runs/chd_fold0_M2

512 x 512, batches of 10 slices of the M labelled volumes, 101 epochs. Device, wall time and score:
not yet measured.
"""

import ml_collections
from ml_collections import config_dict

from configs import chd_pretrain


def get_config() -> ml_collections.ConfigDict:
    """The pretraining run's data and encoder, with a decoder and labels."""
    config = chd_pretrain.get_config()
    config.task = "segment"
    config.batch_size = 10  # slices, over all devices
    config.num_epochs = 101
    # The workdir of a pretraining run or of an import, whose encoder this run begins with.
    config.init_from = config_dict.placeholder(str)
    config.data.fold = 0
    config.data.num_folds = 5
    # M, labelled volumes to train on; all of the fold's if not given.
    config.data.num_labeled = config_dict.placeholder(int)
    # Of a batch, slices that surely show another class than the background.
    config.data.foreground_share = 0.0

    config.model.head = "segmentation"
    config.model.num_classes = 8  # with the background
    for field in ("embedding", "num_matcher_layers", "num_sinkhorn_iterations"):
        del config.model[field]
    config.loss = {
        "weights": {"cross_entropy": 1.0, "dice": 0.0},
        "class_weights": config_dict.placeholder(tuple),
    }
    # CHD's slices are cropped at random, and nothing else.
    config.augment.transform.update({"mirror_probability": 0.0, "spatial_probability": 0.0})

    del config.optimizer.momentum
    config.optimizer.update(
        {"name": "adam", "learning_rate": 5e-5, "final_learning_rate": 5e-6, "weight_decay": 1e-5}
    )
    # In epochs, beside the last step, which always validates. The best by mean Dice is kept, and
    # the newest.
    config.every.validation_epochs = 2
    config.checkpoint.keep_newest = 1
    return config
