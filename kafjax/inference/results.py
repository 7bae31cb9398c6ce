"""What an evaluation found: summaries over volumes, the files of scores, and the printed table."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from kafjax.files import csv_text, write_checked, write_text
from kafjax.inference.uncertainty import FIELD
from kafjax.segmentation_metrics import mean_pooled_dice, pooled_dice

_METRICS = ("dice", "hd95", "assd")

# The content of `evaluation.json`.
Results = dict[str, Any]


def summarize(
    counts: np.ndarray,
    metrics: dict[str, dict[str, Any]],
    classes: tuple[str, ...],
    *,
    num_regions: int = 0,
) -> Results:
    """Pooled Dice, each volume's metrics and, by class, their means and standard deviations.

    `chance` is the expected mean Dice of drawing each pixel's class with the labels' frequencies;
    for one class it is its frequency. If the first of the classes are regions, mean and chance are
    of these; the others are the labels.

    Means are over the volumes where the class has a value, `volumes` their number; `empty` counts
    those where neither labels nor prediction have the class, `missed` those where only one does.
    Missing numbers are None.
    """
    dice = pooled_dice(counts)
    scored = counts[: 1 + num_regions] if num_regions else counts
    pixels = np.delete(counts, slice(1, 1 + num_regions), axis=0)[:, 2].sum()
    by_class = {}
    for name in classes:
        of_class = [volume[name] for volume in metrics.values()]
        by_class[name] = {
            "empty": sum(m.empty for m in of_class),
            "missed": sum(m.missed for m in of_class),
            "volumes": sum(not m.empty for m in of_class),
            **{f: _mean_and_std([getattr(m, f) for m in of_class]) for f in _METRICS},
        }
    return {
        "pooled_dice": {
            "mean": _number(mean_pooled_dice(scored)),
            **{name: _number(value) for name, value in zip(classes, dice, strict=True)},
        },
        "chance": _number(_chance(scored, pixels)),
        "by_class": by_class,
        "by_volume": {
            volume: {
                name: {field: _number(value) for field, value in m._asdict().items()}
                for name, m in of_volume.items()
            }
            for volume, of_volume in metrics.items()
        },
    }


def _chance(counts: np.ndarray, pixels: int) -> float:
    labelled = counts[1:, 2]
    there = labelled[labelled > 0]
    return float(there.mean() / pixels) if len(there) else math.nan


def write_results(results: Results, stem: Path) -> None:
    """Writes STEM.json and STEM.csv, each atomically."""
    more = [FIELD] if "uncertainty" in results else []
    rows: list[list[Any]] = [["volume", "class", *_METRICS, "empty", "missed", *more]]
    for name, value in results["pooled_dice"].items():
        rows.append(["pooled", name, value, *[None] * (4 + len(more))])
    for volume, classes in results["by_volume"].items():
        for name, found in classes.items():
            flags = [int(found["empty"]), int(found["missed"])]
            numbers = [found[metric] for metric in _METRICS]
            rows.append([volume, name, *numbers, *flags, *(found[n] for n in more)])
    write_checked(stem.with_name(f"{stem.name}.json"), results)
    write_text(stem.with_name(f"{stem.name}.csv"), csv_text(rows))


def format_table(results: Results) -> str:
    """A line for each class, and the mean of pooled Dice."""
    pooled = results["pooled_dice"]
    width = max(map(len, ["class", *pooled]))
    lines = [
        f"{'class':<{width}}  pooled Dice  {'Dice':>13}  {'HD95 mm':>13}  {'ASSD mm':>13}"
        "  volumes  empty  missed"
    ]
    for name, found in results["by_class"].items():
        columns = [
            _with_spread(found[metric], digits)
            for metric, digits in zip(_METRICS, (3, 1, 2), strict=True)
        ]
        lines.append(
            f"{name:<{width}}  {_text(pooled[name], 4):>11}  "
            + "  ".join(f"{column:>13}" for column in columns)
            + f"  {found['volumes']:>7}  {found['empty']:>5}  {found['missed']:>6}"
        )
    lines.append(f"{'mean':<{width}}  {_text(pooled['mean'], 4):>11}")
    lines.append(f"{'chance':<{width}}  {_text(results['chance'], 4):>11}")
    return "\n".join(lines)


def _mean_and_std(values: list[float]) -> dict[str, float | None]:
    real = [value for value in values if not math.isnan(value)]
    if not real:
        return {"mean": None, "std": None}
    return {"mean": float(np.mean(real)), "std": float(np.std(real))}


def _number(value: Any) -> float | bool | None:
    if isinstance(value, bool):
        return value
    return None if math.isnan(value) else float(value)


def _text(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _with_spread(found: dict[str, float | None], digits: int) -> str:
    return f"{_text(found['mean'], digits)} ± {_text(found['std'], digits)}"
