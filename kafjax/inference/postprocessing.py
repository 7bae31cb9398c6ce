"""Clearing up predicted volumes: of a class, the largest component only, or none that are small.

    WORKDIR/postprocessing.json     the rule of each class, for a checkpoint, with a checksum

Rules are chosen on the training volumes, for each class by itself, and kept only where they raise
its mean Dice there (as nnU-Net chooses them on its cross-validation; Isensee et al., Nature Methods
2021). They hold for runs whose config has `postprocess=True`; the paper's have not. Components are
those of 3-D volumes whose elements share a face.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage

from kafjax.errors import UserError
from kafjax.files import read_checked, write_checked
from kafjax.workdir.workdir import Workdir

LARGEST = "largest"
# Of the smallest structure in the training labels: what is smaller is taken for noise.
_SHARE_OF_SMALLEST = 0.5

# By class name: `LARGEST`, or the smallest size of a component in mm^3.
Rules = dict[str, str | float]


class Example(NamedTuple):
    """A predicted volume with its labels.

    Attributes:
      prediction: class numbers, any integer type, three axes.
      label: of the same shape; negative where nobody annotated.
      voxel: mm^3 of an element.
    """

    prediction: np.ndarray
    label: np.ndarray
    voxel: float


def clear_up(
    prediction: np.ndarray, rules: Mapping[str, str | float], classes: Sequence[str], voxel: float
) -> np.ndarray:
    """A predicted volume after the rules; what they take away becomes background.

    Args:
      prediction: class numbers, three axes.
      rules: by class name.
      classes: names of the classes 1, 2, ...
      voxel: mm^3 of an element.
    """
    cleared = prediction.copy()
    for number, name in enumerate(classes, start=1):
        if name in rules:
            mask = prediction == number
            cleared[mask & ~_kept(mask, rules[name], voxel)] = 0
    return cleared


def choose_rules(
    labels: Iterable[tuple[np.ndarray, float]], examples: Iterable[Example], classes: Sequence[str]
) -> Rules:
    """The rule of each class that raises its mean Dice over the volumes most, if one does.

    Args:
      labels: of each volume its labels and mm^3 of an element; read first, and one by one.
      examples: of the same volumes; read after them, one by one.
      classes: names of the classes 1, 2, ...
    """
    smallest = np.full(len(classes), np.inf)
    for label, voxel in labels:
        if label.min(initial=0) < 0:
            continue  # structures are annotated in part, so their sizes are not known
        sizes = [np.bincount(_components(label == i + 1))[1:] for i in range(len(classes))]
        smallest = np.minimum(smallest, [voxel * min(of, default=np.inf) for of in sizes])
    candidates: list[list[str | float | None]] = [
        [None, LARGEST, *([_SHARE_OF_SMALLEST * float(size)] if np.isfinite(size) else [])]
        for size in smallest
    ]
    dice: list[list[list[float]]] = [[[] for _ in rules] for rules in candidates]
    for example in examples:
        for i, rules_of_class in enumerate(candidates):
            mask, label = example.prediction == i + 1, example.label == i + 1
            known = example.label >= 0
            for j, rule in enumerate(rules_of_class):
                kept = mask if rule is None else _kept(mask, rule, example.voxel)
                dice[i][j].append(_dice(kept & known, label))
    rules: Rules = {}
    for name, rules_of_class, of_class in zip(classes, candidates, dice, strict=True):
        means = [_mean(of_rule) for of_rule in of_class]
        best = rules_of_class[int(np.argmax(means))]  # the first of equals: none
        if best is not None:
            rules[name] = best
    return rules


def write_rules(workdir: Workdir, step: int | None, rules: Rules) -> None:
    """Records the rules of a checkpoint."""
    write_checked(workdir.postprocessing_file, {"step": step, "rules": rules})


def read_rules(workdir: Workdir, step: int | None) -> Rules | None:
    """The recorded rules of a checkpoint; None where they have not been chosen.

    Raises `UserError` where the file was changed.
    """
    try:
        found: dict[str, Any] = read_checked(workdir.postprocessing_file)
        return dict(found["rules"]) if found["step"] == step else None
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{workdir.postprocessing_file}: damaged ({error})") from None


def common_rules(of_runs: Sequence[Rules]) -> Rules:
    """The rules for several runs that are averaged: those that all of them have.

    Of several smallest sizes the least is taken.
    """
    first, *others = of_runs
    rules: Rules = {}
    for name, rule in first.items():
        found = [rule, *(of_run.get(name) for of_run in others)]
        sizes = [size for size in found if isinstance(size, float)]
        if len(sizes) == len(found):
            rules[name] = min(sizes)
        elif all(other == rule for other in found):
            rules[name] = rule
    return rules


def _kept(mask: np.ndarray, rule: str | float, voxel: float) -> np.ndarray:
    """The part of a class that its rule leaves."""
    labelled = ndimage.label(mask)[0]
    sizes = np.bincount(labelled.ravel())
    sizes[0] = 0
    if rule == LARGEST:
        keep = np.arange(len(sizes)) == (sizes.argmax() if sizes.any() else -1)
    else:
        keep = sizes * voxel >= float(rule)
    keep[0] = False
    return keep[labelled]


def _components(mask: np.ndarray) -> np.ndarray:
    return ndimage.label(mask)[0].ravel()


def _dice(prediction: np.ndarray, label: np.ndarray) -> float:
    total = int(prediction.sum()) + int(label.sum())
    return 2 * int((prediction & label).sum()) / total if total else math.nan


def _mean(values: Sequence[float]) -> float:
    """Over the volumes where prediction or label has the class; 0 if none has."""
    real = [value for value in values if not math.isnan(value)]
    return float(np.mean(real)) if real else 0.0
