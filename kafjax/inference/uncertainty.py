"""How sure a prediction is: a map for each volume, and a number for each volume and class.

`kafjax predict --uncertainty` writes `<name>_uncertainty.nii.gz` and `uncertainty.csv`:

- the map is the entropy of the class probabilities, averaged over runs, checkpoints and mirror
  images, as a fraction of its maximum, ln d: 0 is certain, 1 is every class equally probable;
- the number of a class is the map's mean over the voxels predicted as it (Roy et al., NeuroImage
  2019, of dropout samples; here of the average), empty if there are none.

Both are of the prediction before post-processing. `kafjax evaluate --predictions` puts the numbers
next to the true Dice, with their rank correlation.
"""

import csv
import io
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy import special

from kafjax.errors import UserError
from kafjax.files import csv_text, printable, read_text, write_text
from kafjax.regions import regions_of

FILE = "uncertainty.csv"
FIELD = "entropy"
_COLUMNS = ["volume", "class", FIELD]
_FEWEST = 3  # different values of a correlation


def check_exclusive(metadata: Mapping[str, Any], what: str) -> None:
    """Raises `UserError` for a dataset with regions, whose probabilities do not sum to 1."""
    if regions := regions_of(metadata):
        names = ", ".join(region.name for region in regions)
        raise UserError(
            f"{what} is of classes that exclude each other; the runs' dataset has the regions "
            f"{names}, which may overlap"
        )


class Meter:
    """Measures a volume of `num_classes` classes part by part."""

    def __init__(self, num_classes: int):
        self._entropy, self._voxels = np.zeros((2, num_classes))

    def add(self, probabilities: np.ndarray) -> np.ndarray:
        """Counts probabilities [..., d] that sum to 1; returns their entropy map float32 [...]."""
        num_classes = probabilities.shape[-1]
        entropy = special.entr(probabilities).sum(axis=-1) / math.log(num_classes)
        predicted = probabilities.argmax(axis=-1).ravel()
        self._entropy += np.bincount(predicted, entropy.ravel(), minlength=num_classes)
        self._voxels += np.bincount(predicted, minlength=num_classes)
        return np.asarray(entropy, np.float32)

    def numbers(self) -> list[float]:
        """Mean entropies of the classes 1, 2, ...; NaN for a class that is not predicted."""
        with np.errstate(invalid="ignore"):
            return (self._entropy / self._voxels)[1:].tolist()


def mean_of_classes(numbers: Iterable[float]) -> float:
    """A volume's number; a class that is not predicted counts 1."""
    values = np.array(list(numbers))
    return float(np.where(np.isnan(values), 1.0, values).mean())


def add_to_table(path: Path, volume: str, numbers: Mapping[str, float]) -> None:
    """Writes a volume's numbers by class into `uncertainty.csv`, in place of earlier ones."""
    table = {**(read_table(path) if path.exists() else {}), printable(volume): numbers}
    rows = [
        [name, class_name, "" if math.isnan(value) else f"{value:.6g}"]
        for name, of_volume in sorted(table.items())
        for class_name, value in of_volume.items()
    ]
    write_text(path, csv_text([_COLUMNS, *rows]))


def read_table(path: Path) -> dict[str, Mapping[str, float]]:
    """The numbers of `uncertainty.csv`, by volume and class.

    Raises:
      UserError: the file is not such a table.
    """
    table: dict[str, dict[str, float]] = {}
    try:
        for row in csv.DictReader(io.StringIO(read_text(path))):
            table.setdefault(row["volume"], {})[row["class"]] = float(row[FIELD] or "nan")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: expected a table with columns {', '.join(_COLUMNS)} as kafjax predict "
            f"--uncertainty writes it ({type(error).__name__}: {error})"
        ) from None
    return dict(table)


def compare_with_dice(
    by_volume: Mapping[str, Mapping[str, dict[str, Any]]], table: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, Any]]:
    """Puts the numbers next to the metrics, and correlates them with Dice.

    Args:
      by_volume: the metrics of evaluation by volume and class; gains `FIELD`.
      table: what `read_table` gives.

    Returns:
      For each class, and for `mean`, volumes' mean Dice against `mean_of_classes`: `volumes`, and
      `correlation`, Spearman's, None with fewer than three different values.
    """
    pairs: dict[str, list[tuple[float, float]]] = {}
    for volume, classes in by_volume.items():
        of_volume = []
        for name, found in classes.items():
            value = table.get(printable(volume), {}).get(name)
            found[FIELD] = None if value is None or math.isnan(value) else value
            if found["dice"] is not None and value is not None:
                of_volume.append((found["dice"], value))
                pairs.setdefault(name, []).append((found["dice"], value))
        if of_volume:
            dice, values = zip(*of_volume, strict=True)
            pair = float(np.mean(dice)), mean_of_classes(values)
            pairs.setdefault("mean", []).append(pair)
    return {name: _correlate(np.array(rows)) for name, rows in pairs.items()}


def format_correlations(correlations: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each class."""
    width = max(map(len, ["class", *correlations]))
    lines = [f"Rank correlation of volumes' Dice with their entropy in {FILE}:\n"]
    lines += [f"{'class':<{width}}  correlation  volumes"]
    for name, found in correlations.items():
        value = found["correlation"]
        text = "-" if value is None else f"{value:.2f}"
        lines.append(f"{name:<{width}}  {text:>11}  {found['volumes']:>7}")
    return "\n".join(lines)


def _correlate(pairs: np.ndarray) -> dict[str, Any]:
    """Spearman's correlation of the pairs without a NaN, and their number."""
    from scipy import stats  # slow to import

    dice, values = pairs[~np.isnan(pairs).any(axis=1)].T
    enough = min(len(np.unique(dice)), len(np.unique(values))) >= _FEWEST
    value = float(stats.spearmanr(dice, values).statistic) if enough else None
    return {"volumes": len(dice), "correlation": value}
