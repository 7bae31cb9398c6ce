"""How do time and memory of a training step grow with image, keypoints, layers and batch?

One of them is varied at a time around a small step. Exponents are fitted to all points, and to the
last two, where constant parts weigh least. Memory is the compiled step's temporaries.
"""

import argparse
import dataclasses
import functools
import gc
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.case import Case
from benchmarks.flags import integers, make_parser, run, settings
from benchmarks.report import Result, Table, gigabytes, seconds
from benchmarks.workers import time_paired

# What is varied, with what it means and why it should grow so.
REASONS = {
    "size": "Image edge: convolutions grow with its square; attention, of K alone, is constant.",
    "num_keypoints": (
        "Keypoints: linear maps and the scattered convolution grow with K, the attention weights' "
        "time with K squared; the rest of the network is constant."
    ),
    "num_attention_layers": (
        "Attention layers: linear in time on top of the constant UNet; their activations are "
        "rematerialised, so that memory grows by the layers' inputs and parameters alone."
    ),
    "batch_size": "Batch: linear, on top of the optimiser and other work on the parameters.",
}
PICTURE = "growth.png"


class Point(NamedTuple):
    """A measured step."""

    value: int  # of what is varied
    seconds: float
    temporaries: float  # bytes


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    flags = make_parser(__doc__)
    flags.add_argument("--filters", type=int, default=16)
    flags.add_argument("--base_size", type=int, default=128, help="pixels where others are varied")
    flags.add_argument("--base_num_keypoints", type=int, default=256)
    flags.add_argument("--base_num_attention_layers", type=int, default=4)
    flags.add_argument("--size", type=integers, default=(128, 512, 1024))
    flags.add_argument("--num_keypoints", type=integers, default=(64, 256, 2048))
    flags.add_argument("--num_attention_layers", type=integers, default=(4, 16))
    flags.add_argument("--batch_size", type=integers, default=(1, 4))
    flags.add_argument("--turns", type=int, default=3)
    return flags


def measure(arguments: argparse.Namespace) -> Result:
    """Varies one thing after the other."""
    base = Case(
        size=arguments.base_size,
        num_keypoints=arguments.base_num_keypoints,
        num_attention_layers=arguments.base_num_attention_layers,
        filters=arguments.filters,
    )
    curves = {
        field: [
            Point(
                value,
                *measure_point(dataclasses.replace(base, **{field: value}), arguments.turns),
            )
            for value in getattr(arguments, field)
        ]
        for field in REASONS
    }
    draw(curves, arguments.output / PICTURE)
    tables = [_table(base, field, points) for field, points in curves.items()]
    tables[-1].notes.append(f"![Growth of time and memory]({PICTURE})")
    numbers = {field: [point._asdict() for point in points] for field, points in curves.items()}
    return Result("growth", "Growth", tables, numbers, settings(arguments))


@functools.cache  # the curves meet in the base
def measure_point(case: Case, turns: int) -> tuple[float, float]:
    """Times one step, and frees its memory; seconds and bytes of temporaries."""
    from benchmarks.ours import TrainingStep  # JAX, which --help does not need

    step = TrainingStep(case)
    measured = time_paired(step, turns), step.facts["temporaries"]
    del step
    gc.collect()
    return measured


def exponent(values: Sequence[float], results: Sequence[float]) -> float:
    """The p of `results = a * values^p` by least squares of logarithms; NaN of fewer than two."""
    if len(values) < 2:
        return math.nan
    return float(np.polyfit(np.log(values), np.log(results), 1)[0])


def draw(curves: dict[str, list[Point]], path: Path) -> None:
    """Draws time and memory of each curve, with logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(curves), 5), layout="constrained")
    panels = figure.subplots(2, len(curves), squeeze=False)
    for column, (field, points) in enumerate(curves.items()):
        values = [point.value for point in points]
        quantities = [point.seconds for point in points], [p.temporaries / 1e9 for p in points]
        for row, (quantity, name) in enumerate(zip(quantities, ("s", "GB"), strict=True)):
            panel = panels[row][column]
            panel.loglog(values, quantity, "o-", base=2)
            panel.set(xlabel=field, ylabel=name if column == 0 else "")
            panel.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _table(base: Case, field: str, points: list[Point]) -> Table:
    values = [float(point.value) for point in points]
    curves = [point.seconds for point in points], [point.temporaries for point in points]
    rows = [[str(p.value), seconds(p.seconds), gigabytes(p.temporaries)] for p in points]
    for label, last in (("exponent", 0), ("exponent of the last two", -2)):
        fits = [exponent(values[last:], curve[last:]) for curve in curves]
        rows.append([label, *(f"{fit:.2f}" for fit in fits)])
    return Table(f"{field} around {base}", [field, "step", "temporaries"], rows, [REASONS[field]])


if __name__ == "__main__":
    run(parser(), measure)
