"""How sure a prediction is: a map for each volume, and numbers for each volume and class.

`kafjax predict --uncertainty` writes `<name>_uncertainty.nii.gz` and `uncertainty.csv`:

- the map is the entropy of the class probabilities, averaged over runs, checkpoints and mirror
  images, as a fraction of its maximum, ln d: 0 is certain, 1 is every class equally probable;
- `entropy` of a class is the map's mean over the voxels predicted as it (Roy et al., NeuroImage
  2019, of dropout samples; here of the average), empty if there are none;
- `expected_dice` of a class is the soft Dice of its probabilities and its predicted voxels. It is
  0 for a class that is not predicted.

Both are of the prediction before post-processing. `kafjax evaluate --predictions` puts them next to
the true Dice, with their rank correlation.
"""

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from kafjax.errors import UserError
from kafjax.files import printable, read_text, write_text

FILE = "uncertainty.csv"
MEASURES = ("entropy", "expected_dice")
_COLUMNS = ["volume", "class", *MEASURES]
_FEWEST = 3  # volumes of a correlation


class ClassUncertainty(NamedTuple):
    """The numbers of a class in a volume; see the module."""

    entropy: float
    expected_dice: float


class Meter:
    """Measures a volume of `num_classes` classes part by part."""

    def __init__(self, num_classes: int):
        self._entropy, self._probability, self._inside, self._voxels = np.zeros((4, num_classes))

    def add(self, probabilities: np.ndarray) -> np.ndarray:
        """Counts probabilities [..., d] that sum to 1; returns their entropy map float32 [...]."""
        num_classes = probabilities.shape[-1]
        entropy = special.entr(probabilities).sum(axis=-1) / math.log(num_classes)
        predicted = probabilities.argmax(axis=-1).ravel()

        def total(values: np.ndarray | None) -> np.ndarray:
            weights = None if values is None else values.ravel()
            return np.bincount(predicted, weights, minlength=num_classes)

        self._entropy += total(entropy)
        self._inside += total(probabilities.max(axis=-1))
        self._voxels += total(None)
        self._probability += probabilities.reshape(-1, num_classes).sum(axis=0, dtype=np.float64)
        return entropy.astype(np.float32)

    def numbers(self) -> list[ClassUncertainty]:
        """Of the classes 1, 2, ..., of everything that was added."""
        with np.errstate(invalid="ignore"):
            entropy = self._entropy / self._voxels
            dice = 2 * self._inside / (self._probability + self._voxels)
        return [
            ClassUncertainty(float(e), float(d)) for e, d in zip(entropy[1:], dice[1:], strict=True)
        ]


def add_to_table(path: Path, volume: str, numbers: Mapping[str, ClassUncertainty]) -> None:
    """Writes a volume's numbers by class into `uncertainty.csv`, in place of earlier ones."""
    table = {**(read_table(path) if path.exists() else {}), printable(volume): numbers}
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for name, of_volume in sorted(table.items()):
        for class_name, values in of_volume.items():
            texts = ["" if math.isnan(value) else f"{value:.6g}" for value in values]
            writer.writerow([name, class_name, *texts])
    write_text(path, stream.getvalue())


def read_table(path: Path) -> dict[str, Mapping[str, ClassUncertainty]]:
    """The numbers of `uncertainty.csv`, by volume and class.

    Raises:
      UserError: the file is not such a table.
    """
    table: dict[str, dict[str, ClassUncertainty]] = {}
    try:
        for row in csv.DictReader(io.StringIO(read_text(path))):
            values = (float(row[name] or "nan") for name in MEASURES)
            table.setdefault(row["volume"], {})[row["class"]] = ClassUncertainty(*values)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: expected a table with columns {', '.join(_COLUMNS)} as kafjax predict "
            f"--uncertainty writes it ({type(error).__name__}: {error})"
        ) from None
    return dict(table)


def compare_with_dice(
    by_volume: Mapping[str, Mapping[str, dict[str, Any]]],
    table: Mapping[str, Mapping[str, ClassUncertainty]],
) -> dict[str, dict[str, Any]]:
    """Puts the numbers next to the metrics, and correlates them with Dice.

    Args:
      by_volume: the metrics of evaluation by volume and class; gains `MEASURES`.
      table: what `read_table` gives.

    Returns:
      For each class, and for `mean`, each volume's mean over its classes: `volumes`, and Spearman's
      rank correlation of each measure with Dice, None with fewer than three different values.
    """
    pairs: dict[str, list[tuple[float, ...]]] = {}
    for volume, classes in by_volume.items():
        rows = []
        for name, found in classes.items():
            values = table.get(printable(volume), {}).get(name)
            found |= dict.fromkeys(MEASURES) if values is None else _without_nan(values)
            if found["dice"] is not None and values is not None:
                rows.append((found["dice"], *values))
                pairs.setdefault(name, []).append(rows[-1])
        if rows:
            pairs.setdefault("mean", []).append(tuple(map(_mean, zip(*rows, strict=True))))
    return {name: _correlate(np.array(rows)) for name, rows in pairs.items()}


def format_correlations(correlations: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each class."""
    width = max(map(len, ["class", *correlations]))
    lines = [f"Rank correlation of the Dice of volumes with their uncertainty ({FILE}):", ""]
    lines += [f"{'class':<{width}}  entropy  expected Dice  volumes"]
    for name, found in correlations.items():
        entropy, dice = ("-" if found[m] is None else f"{found[m]:.2f}" for m in MEASURES)
        lines.append(f"{name:<{width}}  {entropy:>7}  {dice:>13}  {found['volumes']:>7}")
    return "\n".join(lines)


def _correlate(rows: np.ndarray) -> dict[str, Any]:
    """Of the columns Dice and each measure."""
    from scipy import stats  # slow to import

    found: dict[str, Any] = {"volumes": len(rows)}
    for name, values in zip(MEASURES, rows.T[1:], strict=True):
        real = ~np.isnan(values)
        dice, kept = rows[real, 0], values[real]
        enough = min(len(np.unique(dice)), len(np.unique(kept))) >= _FEWEST
        found[name] = float(stats.spearmanr(dice, kept).statistic) if enough else None
    return found


def _mean(values: tuple[float, ...]) -> float:
    real = [value for value in values if not math.isnan(value)]
    return float(np.mean(real)) if real else math.nan


def _without_nan(values: ClassUncertainty) -> dict[str, float | None]:
    return {n: None if math.isnan(v) else v for n, v in values._asdict().items()}
