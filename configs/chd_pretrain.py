"""Pretraining of KAF-UNet on CHD: the paper's run (appendix, table 3; docs/method.md 7).

    python -m kafjax.main --config configs/chd_pretrain.py

512 x 512, batches of 32 pairs, 51 epochs. Wall time and score: not yet measured.
"""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
    """Every field of a pretraining run; other configs import this one and change what differs."""
    return ml_collections.ConfigDict(
        {
            "task": "pretrain",
            "seed": 0,
            "batch_size": 32,  # pairs, over all devices
            # Parts of a device's batch, one in memory at a time; batch norm sees a part at a time.
            "num_microbatches": 1,
            "num_epochs": 51,
            # Stops earlier than num_epochs, whose learning rate schedule stays.
            "num_steps": config_dict.placeholder(int),
            # Batch statistics over all devices; the release keeps each device's own.
            "sync_batch_norm": True,
            "data": {
                "name": "chd",
                "dir": "data",
                "patch_size": (512, 512),
                # Of the preparation, checked against the dataset.
                "max_keypoints": 512,
                "radius": 20,  # px, within which keypoints of neighbouring slices correspond
                "num_threads": 16,
            },
            "model": {
                "name": "kaf_unet",
                "head": "pretraining",
                "filters": 32,
                "num_attention_layers": 16,
                "embedding": 512,
                "num_matcher_layers": 4,
                "num_sinkhorn_iterations": 100,
                "dtype": "float32",
                # Blocks are computed again in the backward pass: on accelerators, less memory.
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
            },
            "loss": {
                "method": "pcl",  # or gcl, simclr: which slices are positives
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
            },
            # In steps; picture 0 draws none.
            "every": {"log": 20, "checkpoint": 200, "picture": 500},
            "checkpoint": {"keep_newest": 2, "keep_best": 1},
        }
    )
