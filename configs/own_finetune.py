"""Few-label segmentation of your own scans: a strong baseline's recipe for the paper's networks.

    kafjax train --config own_finetune --config.init_from=runs/own_pretrain \
        --config.data.num_labeled=2

and from fresh variables, `--config own_finetune:scratch`. Each piece below was measured separately:
docs/results.md, "What the recipe for own data is made of".
"""

import ml_collections

from kafjax.configs import chd_finetune, own_pretrain


def get_config(start: str = "pretrained") -> ml_collections.ConfigDict:
    """Fine-tuning of the pretraining run, or the same without it (`scratch`)."""
    config = chd_finetune.get_config(start)
    config.model.num_classes = None
    for field in ("name", "patch_size"):
        config.data[field] = own_pretrain.get_config().data[field]
    # Rotations as patients turn, not any angle, and no mirrors: an organ's position identifies it.
    config.augment.transform.update({"spatial_probability": 0.67, "rotation": (-0.5, 0.5)})
    config.augment.intensity.probability = 1.0
    config.loss.weights.dice = 1.0
    config.data.foreground_share = 0.33
    config.optimizer.update(
        {"learning_rate": 2e-3, "final_learning_rate": 2e-5, "warmup": 0.1}  # of 300 steps or more
    )
    # Largest components or smallest sizes, where they help on the training volumes.
    config.postprocess = True
    return config
