"""Curves of Dice against minutes: the finished runs of `benchmarks.nnunet` as table and picture."""

import csv
import io
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from kafjax.errors import UserError
from kafjax.files import write_text

_COLUMNS = (
    *("side", "num_labeled", "fold", "seed", "minutes", "dice", "volume_dice", "seconds", "steps"),
    *("first_step_seconds", "pretraining_minutes"),
)


def read_results(output: Path) -> list[dict[str, Any]]:
    """The finished runs, by side, M, minutes, fold and seed."""
    found = [json.loads(path.read_text()) for path in output.glob("runs/*/result.json")]
    keys = ("side", "num_labeled", "minutes", "fold", "seed")
    return sorted(found, key=lambda result: [result[key] for key in keys])


def collect(output: Path) -> str:
    """Writes results.csv, results.md and results.svg; the table.

    Raises `UserError` where no run is finished.
    """
    results = read_results(output)
    if not results:
        raise UserError(f"{output}: no run is finished")
    stream = io.StringIO()
    writer = csv.DictWriter(stream, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(results)
    write_text(output / "results.csv", stream.getvalue())
    points = summarize(results)
    table = make_table(points)
    dates = sorted({result["date"] for result in results})
    machines = {report.describe(result["machine"]) for result in results}
    clocks = {result["asked"]["clock"] for result in results}
    table.notes.append(
        f"{' to '.join(sorted({dates[0], dates[-1]}))}, {' / '.join(sorted(clocks))} minutes; "
        + " ".join(sorted(machines))
    )
    write_text(output / "results.md", table.markdown() + "\n")
    draw(points, output / "results.svg")
    return table.markdown()


def summarize(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The mean, its standard error and n of each point of the curves, over folds and seeds."""

    def key(result: Mapping[str, Any]) -> tuple[Any, ...]:
        return result["side"], result["num_labeled"], result["minutes"]

    points = []
    for (side, num_labeled, minutes), group in itertools.groupby(sorted(results, key=key), key):
        runs = list(group)
        point = {"side": side, "num_labeled": num_labeled, "minutes": minutes, "n": len(runs)}
        for name in ("dice", "volume_dice", "seconds", "steps", "first_step_seconds"):
            values = [run[name] for run in runs]
            point[name] = statistics.fmean(values)
            point[f"{name}_error"] = (
                statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
            )
        point["pretraining_minutes"] = statistics.fmean(
            run.get("pretraining_minutes", 0) for run in runs
        )
        points.append(point)
    return points


def make_table(points: Sequence[Mapping[str, Any]]) -> report.Table:
    """A row for each point."""
    rows = [
        [
            p["side"],
            str(p["num_labeled"]),
            f"{p['minutes']:g}",
            _with_error(p, "dice"),
            _with_error(p, "volume_dice"),
            str(p["n"]),
            f"{p['seconds'] / 60:.1f}",
            f"{p['first_step_seconds'] / 60:.1f}",
            f"{p['steps']:.0f}",
            f"{p['pretraining_minutes']:.1f}",
        ]
        for p in points
    ]
    columns = ["", "M", "minutes", "pooled Dice", "Dice by volume", "n", "taken"]
    columns += ["of it to the first step", "steps", "minutes of pretraining, not in them"]
    return report.Table("Dice against minutes", columns, rows)


def draw(points: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Curves of pooled Dice with standard errors, a panel for each M."""
    from matplotlib.figure import Figure

    numbers = sorted({p["num_labeled"] for p in points})
    figure = Figure(figsize=(3 + 4 * len(numbers), 3.6), layout="constrained")
    panels = figure.subplots(1, len(numbers), sharey=True, squeeze=False)[0]
    for axes, m in zip(panels, numbers, strict=True):
        for side in dict.fromkeys(p["side"] for p in points):
            own = [p for p in points if (p["side"], p["num_labeled"]) == (side, m)]
            axes.errorbar(
                [p["seconds"] / 60 for p in own],
                [p["dice"] for p in own],
                yerr=[p["dice_error"] or 0.0 for p in own],
                marker="o",
                capsize=3,
                label=side,
            )
        axes.set(xscale="log", xlabel="minutes of training", title=f"M = {m}")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("pooled Dice")
    # Every panel has every side, in the same colours. Inside a panel it would hide points.
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path)


def _with_error(point: Mapping[str, Any], name: str) -> str:
    error = point[f"{name}_error"]
    return f"{point[name]:.3f}" + ("" if error is None else f" ± {error:.3f}")
