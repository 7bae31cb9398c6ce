"""Few-label segmentation of your own scans: a strong baseline's recipe for the paper's networks.

    kafjax train --config own_finetune --config.init_from=runs/own_pretrain \
        --config.data.num_labeled=2

and from fresh variables, `--config own_finetune:scratch`. Each piece below was measured separately:
docs/results.md, "What the recipe for own data is made of".

With the scans that have no labels, by a teacher (`kafjax.tasks.semi_supervised`):

    kafjax train --config own_finetune:copy_paste --config.init_from=runs/own_pretrain
    kafjax train --config own_finetune:scratch,copy_paste     # or mean_teacher

Words after the colon are joined by commas.
"""

from typing import Any

import ml_collections

from kafjax.configs import chd_finetune, own_pretrain

# `config.semi` of each way to use volumes without labels.
SEMI: dict[str, dict[str, Any]] = {
    "mean_teacher": {
        # Of the squared distance of probabilities, summed over classes.
        "weight": 1.0,
        # Fractions of the run: when the weight begins to rise, and how long it rises.
        "start": 0.0,
        "ramp": 0.4,
    },
    "copy_paste": {
        # Of the loss by pseudo-labels, on that by labels: the paper's.
        "weight": 0.5,
        # Until then labelled slices are pasted into labelled ones, for pseudo-labels worth having.
        "start": 0.25,
        "ramp": 0.1,
        # Edge of the box, of the slice's: the paper's, for parts of about equal area.
        "box": 2 / 3,
    },
}


def get_config(variant: str = "pretrained") -> ml_collections.ConfigDict:
    """Fine-tuning of the pretraining run, or the same without it (`scratch`).

    `mean_teacher` and `copy_paste` also train on volumes without labels. Words are joined by
    commas: `scratch,copy_paste`.
    """
    words = variant.split(",")
    methods = [word for word in words if word in SEMI]
    starts = [word for word in words if word not in SEMI] or ["pretrained"]
    if len(methods) > 1 or len(starts) > 1:
        raise ValueError(
            f"variant is {variant!r}, expected one of {', '.join((*chd_finetune.STARTS, *SEMI))}, "
            "or one of the first two, a comma, and one of the others"
        )
    config = _finetune(starts[0])
    if methods:
        _add_unlabelled(config, methods[0])
    return config


def _finetune(start: str) -> ml_collections.ConfigDict:
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


def _add_unlabelled(config: ml_collections.ConfigDict, method: str) -> None:
    # A batch has as many labelled slices as before, and as many unlabelled ones.
    config.batch_size *= 2
    config.data.unlabelled_share = 0.5
    # Whether the volumes of the test set, nnU-Net's imagesTs, are trained on without labels too.
    config.data.include_test = False
    # Of the teacher; also what is validated. Both papers' value for the main part of a run.
    config.optimizer.average_decay = 0.99
    config.semi = {"method": method, **SEMI[method]}
