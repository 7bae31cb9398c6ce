"""Volumes of classes in mm^3, predicted and labelled: `volumes.csv`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from kafjax.files import csv_text, write_text
from kafjax.regions import Groups


def count_mm3(
    prediction: np.ndarray,
    label: np.ndarray | None,
    classes: Sequence[str],
    spacing: Sequence[float],
    *,
    groups: Groups | None = None,
) -> dict[str, tuple[float, float | None]]:
    """Volumes in mm^3 of each foreground class: of the prediction, and of the label if any.

    Args:
      prediction: class numbers.
      label: of the same shape, or None; also its volumes are None if a part is negative, which
        nobody annotated.
      classes: names of the classes 1, 2, ...
      spacing: mm between elements along each axis.
      groups: class numbers of each of `classes`, if they are others.
    """
    voxel = float(np.prod(spacing))
    if label is not None and label.min(initial=0) < 0:
        label = None
    found, there = (
        None if a is None else np.bincount(a.ravel(), minlength=len(classes) + 1) * voxel
        for a in (prediction, label)
    )
    assert found is not None
    numbers = groups or [[i] for i in range(1, len(classes) + 1)]
    return {
        name: (float(found[n].sum()), None if there is None else float(there[n].sum()))
        for name, n in zip(classes, map(list, numbers), strict=True)
    }


def write_volumes(mm3: Mapping[str, Mapping[str, tuple[float, float | None]]], path: Path) -> None:
    """Writes what `count_mm3` gave of each volume as CSV, a row for each volume and class."""
    rows = [
        [volume, name, *(v if v is None else round(v, 3) for v in values)]
        for volume, of_volume in mm3.items()
        for name, values in of_volume.items()
    ]
    write_text(path, csv_text([["volume", "class", "prediction_mm3", "reference_mm3"], *rows]))
