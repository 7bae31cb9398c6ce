"""Pretraining of KAF-UNet on CHD: the paper's run (appendix, table 3; docs/method.md 7).

    kafjax train --config chd_pretrain

512 x 512, batches of 32 pairs, 51 epochs. Wall time and score: not yet measured.

The methods that the paper compares with, with the same loop, data and augmentation
(docs/method.md 6):

    kafjax train --config chd_pretrain:simclr     # or gcl, or pcl
    kafjax train --config chd_pretrain:glcl \
        --config.init_from=runs/chd_pretrain_gcl                      # after gcl
"""

from typing import Any

import ml_collections
from ml_collections import config_dict

# Only the global loss, of the plain UNet: SimCLR, GCL and PCL differ only in their positives.
_GLOBAL = {"cnn": 1.0, "kaf": 0.0, "matching": 0.0}
METHODS: dict[str, dict[str, Any]] = {
    "kaf": {},
    **{
        method: {"model": {"name": "unet"}, "loss": {"method": method, "weights": _GLOBAL}}
        for method in ("simclr", "gcl", "pcl")
    },
    # The second stage of Chaitanya et al. 2020, on the encoder of a `gcl` run.
    "glcl": {
        "task": "local_contrast",
        "model": {"name": "unet", "num_decoder_blocks": 3},
    },
}
_OF_PAIRS = {
    "model": ("num_matcher_layers", "num_sinkhorn_iterations"),
    "loss": ("method", "position_threshold", "weights"),
}


def get_config(method: str = "kaf") -> ml_collections.ConfigDict:
    """Every field of a pretraining run; other configs import this one and state the differences."""
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(METHODS)}")
    config = _kaf()
    config.update(METHODS[method])
    if config.task == "local_contrast":
        # The workdir of the `gcl` run that provides the encoder.
        config.init_from = config_dict.placeholder(str)
        for part, fields in _OF_PAIRS.items():
            for field in fields:
                del config[part][field]
    return config


def _kaf() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "task": "pretrain",
            "seed": 0,
            "batch_size": 32,  # pairs, over all devices
            # Parts of a device's batch, one in memory at a time; batch norm covers one part.
            "num_microbatches": 1,
            "num_epochs": 51,
            # Stops early; the schedule still spans num_epochs.
            "num_steps": config_dict.placeholder(int),
            # Batch statistics over all devices; the release uses separate ones.
            "sync_batch_norm": True,
            "data": {
                "name": "chd",
                "dir": "data",
                "patch_size": (512, 512),
                # Slots for keypoints, and the radius of correspondences, px. Default: the
                # dataset's; different values are an error.
                "max_keypoints": config_dict.placeholder(int),
                # Slots for the keypoints of a patch; by default its share of the slice's.
                "patch_keypoints": config_dict.placeholder(int),
                "radius": config_dict.placeholder(int),
                # Slices on either side that the network sees as further channels.
                "context": 0,
                "num_threads": 16,
            },
            "model": {
                "name": "kaf_unet",
                "filters": 32,
                "num_attention_layers": 16,
                "embedding": 512,
                "num_matcher_layers": 4,
                "num_sinkhorn_iterations": 100,
                "norm": "batch",
                "dtype": "float32",
                # Recompute blocks in the backward pass: less memory on accelerators.
                "remat": False,
            },
            "augment": {
                "keypoints": "index_map",  # or analytic
                "transform": {
                    "mirror_probability": 0.5,
                    "spatial_probability": 0.67,
                    "elastic_sigma": (14.0, 17.0),
                    "elastic_alpha": (100.0, 350.0),
                    "rotation": (0.0, 6.283185307179586),
                    "magnify_probability": 0.5,
                    "magnify_scale": (0.7, 1.0),
                    "shrink_scale": (1.0, 1.3),
                },
                "intensity": {
                    "probability": 0.0,  # the paper changes no intensities
                    "noise_probability": 0.15,
                    "noise_deviation": (0.0, 0.3),
                    "blur_probability": 0.2,
                    "blur_sigma": (0.5, 1.0),
                    "brightness_probability": 0.15,
                    "brightness_shift": (-0.3, 0.3),
                    "contrast_probability": 0.15,
                    "contrast_scale": (0.75, 1.25),
                    "resolution_probability": 0.25,
                    "resolution_scale": (0.5, 1.0),
                    "gamma_probability": 0.3,
                    "gamma_power": (0.7, 1.5),
                },
            },
            "loss": {
                "method": "pcl",  # or gcl, simclr: the rule for positive pairs
                "position_threshold": 0.1,
                "temperature": 0.1,
                "weights": {"cnn": 1.0, "kaf": 1.0, "matching": 0.01},
            },
            "optimizer": {
                "name": "sgd",
                "momentum": 0.9,
                "weight_decay": 1e-5,
                "learning_rate": 0.002,
                "final_learning_rate": 0.0,
                # Fraction of the steps over which the rate rises to its start.
                "warmup": 0.0,
                # Fraction of the averaged weights that a step keeps; 0 disables averaging.
                "average_decay": 0.0,
            },
            # In steps; picture 0 draws none.
            "every": {"log": 20, "checkpoint": 200, "picture": 500},
            # Checkpoint for evaluation and prediction: the best by validation, or the last.
            "checkpoint": {"keep_newest": 2, "keep_best": 1, "select": "best"},
        }
    )
