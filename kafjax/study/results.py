"""What an experiment found: a table in Markdown and CSV, every run's Dice, and a plot.

    ROOT/table1.md         for reading: mean, standard error, difference from the reference row
    ROOT/table1.csv        the same with all digits, and each fold
    ROOT/table1_runs.csv   each run
    ROOT/table1.{png,svg}  mean and standard error

The same runs give the same bytes.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from kafjax.drawing.figures import FONT_SIZE, WIDTH, save_figure
from kafjax.files import write_text
from kafjax.study.cross_validation import Run, collect_results, mean_and_std, tabulate
from kafjax.study.plan import Experiment, Row
from kafjax.training.describe import count_parameters
from kafjax.training.preflight import with_classes

_PLOTS = (".png", ".svg")
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


class Mean(NamedTuple):
    """Of some runs: their mean, its standard error (None of one run), and their number."""

    mean: float
    error: float | None
    number: int


class Line(NamedTuple):
    """A row of an experiment's table with one M; None where runs are missing.

    Attributes:
      row: which.
      num_labeled: M.
      dice: of each run that there is, pooled over the pixels of its fold.
      missing: names of the others.
      mean: over folds and seeds.
      folds: of each fold, the mean over seeds.
      std: over folds, as the appendix has it.
      difference: from the reference row, of runs with the same fold and seed.
    """

    row: Row
    num_labeled: int
    dice: Mapping[Run, float]
    missing: tuple[str, ...]
    mean: Mean | None
    folds: tuple[float | None, ...]
    std: float | None
    difference: Mean | None


class Results(NamedTuple):
    """All that is in the files.

    Attributes:
      lines: row by row.
      chance: Dice of pixels drawn with the frequencies of classes; None without any run.
      parameters: of the segmentation networks, by row's name.
      checkpoints: how the checkpoints of the runs were chosen, each way once.
    """

    lines: tuple[Line, ...]
    chance: float | None
    parameters: Mapping[str, int]
    checkpoints: tuple[str, ...]


def collect(experiment: Experiment) -> Results:
    """Reads the evaluations of all complete runs; `ValueError` names one that is damaged."""
    found, chance, checkpoints = {}, [], set()
    for row in experiment.table.rows:
        dice: dict[Run, float] = {}
        for seed in experiment.seeds:
            config = experiment.segmentation(row, seed).config()
            runs = [run for run in experiment.runs() if run.seed == seed]
            for run, results in collect_results(config, experiment.row_dir(row), runs).items():
                dice[run] = results["pooled_dice"]["mean"]
                checkpoints.add(results["checkpoint"])
                chance += [results["chance"]] if results["chance"] is not None else []
        found[row.name] = dice
    reference = found[experiment.table.reference]
    lines = [
        _line(experiment, row, m, found[row.name], reference)
        for row in experiment.table.rows
        for m in experiment.num_labeled
    ]
    return Results(
        tuple(lines),
        float(np.mean(chance)) if chance else None,
        _count_parameters(experiment),
        tuple(sorted(checkpoints)),
    )


def write_results(experiment: Experiment, name: str, command: str) -> str:
    """Writes the files of the table; gives the Markdown.

    Args:
      experiment: whose runs are collected.
      name: of the files, without extension.
      command: what makes them, to be repeated.
    """
    results = collect(experiment)
    markdown = format_markdown(experiment, results, command)
    experiment.root.mkdir(parents=True, exist_ok=True)
    write_text(experiment.root / f"{name}.md", markdown)
    write_text(experiment.root / f"{name}.csv", format_csv(experiment, results))
    write_text(experiment.root / f"{name}_runs.csv", format_runs(results))
    for suffix in _PLOTS:
        save_figure(draw(experiment, results), experiment.root / f"{name}{suffix}")
    return markdown


def mean_of(values: Sequence[float]) -> Mean | None:
    """The mean with its standard error (ddof 1); None of no values."""
    if not values:
        return None
    number = len(values)
    error = float(np.std(values, ddof=1) / math.sqrt(number)) if number > 1 else None
    return Mean(float(np.mean(values)), error, number)


def format_markdown(experiment: Experiment, results: Results, command: str) -> str:
    """The table and what its columns mean, and the runs that are missing."""
    table, lines = experiment.table, results.lines
    columns = _columns(experiment, results)
    cells = [list(columns), *(list(row) for row in zip(*columns.values(), strict=True))]
    cells.insert(1, ["---"] * len(columns))
    text = [
        f"# {table.title}\n",
        f"Dataset {experiment.dataset}, folds {_numbers(f + 1 for f in experiment.folds)}, "
        f"seeds {_numbers(experiment.seeds)}. By\n",
        f"    {command}\n",
        *(f"| {' | '.join(line)} |" for line in cells),
        "",
        "Dice: mean over classes, pooled over the pixels of a fold; mean over folds and seeds ± "
        "its standard error, n runs.",
        f"Difference: from the row {table.reference!r}, of runs with the same fold and seed. "
        "Std: over folds, of means over seeds.",
    ]
    if results.chance is not None:
        text.append(f"Chance, pixels drawn with the frequencies of classes: {results.chance:.3f}.")
    if results.checkpoints:
        text.append(f"Checkpoint of each run: {' or '.join(results.checkpoints)}.")
    if "Paper" in columns:
        text.append("Paper: mean and standard deviation over folds, as the appendix prints them.")
    if any(line.row.beyond for line in lines):
        text.append(r"\* not in the appendix.")
    missing = [f"{line.row.name}: {name}" for line in lines for name in line.missing]
    if missing:
        total = len(lines) * len(experiment.folds) * len(experiment.seeds)
        text += ["", f"Missing, {len(missing)} of {total} runs:", ""]
        text += [f"- {name}" for name in missing]
    return "\n".join(text) + "\n"


def format_csv(experiment: Experiment, results: Results) -> str:
    """A line for each row and M with all digits."""
    header = [
        *("row", "model", "pretraining", "w1", "w2", "w3", "M", "n", "mean", "standard_error"),
        *("std_over_folds", "difference", "difference_standard_error"),
        *(f"fold{fold + 1}" for fold in experiment.folds),
        *("paper", "parameters"),
    ]
    body = []
    for line in results.lines:
        row = line.row
        mean, difference = (of or Mean(math.nan, None, 0) for of in (line.mean, line.difference))
        values = [
            *(row.name, row.model, row.pretraining, *(row.weights or (None,) * 3)),
            *(line.num_labeled, len(line.dice), mean.mean, mean.error, line.std),
            *(difference.mean, difference.error, *line.folds),
            *(_paper(experiment, line), results.parameters.get(row.name)),
        ]
        body.append([None if value != value else value for value in values])
    return _csv([header, *body])


def format_runs(results: Results) -> str:
    """A line for each run that there is."""
    body = [
        [line.row.name, run.num_labeled, run.fold + 1, run.seed, dice]
        for line in results.lines
        for run, dice in line.dice.items()
    ]
    return _csv([["row", "M", "fold", "seed", "dice"], *body])


def draw(experiment: Experiment, results: Results) -> Figure:
    """Means with standard errors: rows below each other, or against M where there are several."""
    several = len(experiment.num_labeled) > 1
    rows = experiment.table.rows
    height = 0.5 * WIDTH if several else 0.9 + 0.25 * len(rows)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.tick_params(labelsize=FONT_SIZE)
    style: dict[str, Any] = {"marker": "o", "ms": 4, "capsize": 3, "lw": 1}
    for i, row in enumerate(rows):
        known = [(line.num_labeled, line.mean) for line in results.lines if line.row == row]
        there = [(m, mean) for m, mean in known if mean is not None]
        means = [mean.mean for _, mean in there]
        errors = [mean.error or 0.0 for _, mean in there]
        colour = _COLOURS[i % len(_COLOURS)]
        if several:
            ms = [m for m, _ in there]
            axes.errorbar(ms, means, errors, color=colour, label=row.name, **style)
        else:
            axes.errorbar(means, [i] * len(means), xerr=errors, color=colour, ls="", **style)
    if several:
        axes.set_xscale("log")
        axes.set_xticks(experiment.num_labeled, list(map(str, experiment.num_labeled)))
        axes.minorticks_off()
        axes.set_xlabel("M, labelled volumes", fontsize=FONT_SIZE)
        axes.set_ylabel("Dice", fontsize=FONT_SIZE)
        axes.legend(fontsize=FONT_SIZE, frameon=False)
    else:
        axes.set_yticks(range(len(rows)), [row.name for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(f"Dice, M = {experiment.num_labeled[0]}", fontsize=FONT_SIZE)
    axes.grid(alpha=0.3)
    axes.set_title(f"{experiment.table.title}: {experiment.dataset}", fontsize=FONT_SIZE + 1)
    return figure


def _line(
    experiment: Experiment,
    row: Row,
    num_labeled: int,
    dice: Mapping[Run, float],
    reference: Mapping[Run, float],
) -> Line:
    """A row with one M; means are of all its runs, as those of fewer would not compare."""
    runs = [run for run in experiment.runs() if run.num_labeled == num_labeled]
    there = {run: dice[run] for run in runs if run in dice}
    (summary,) = tabulate(runs, there)
    whole = len(there) == len(runs)
    pairs = [there[run] - reference[run] for run in there if run in reference]
    is_other = row.name != experiment.table.reference
    return Line(
        row,
        num_labeled,
        there,
        tuple(f"{experiment.row_dir(row) / run.name}" for run in runs if run not in there),
        mean_of(list(there.values())) if whole else None,
        summary.folds,
        summary.std,
        mean_of(pairs) if is_other and len(pairs) == len(runs) else None,
    )


def _columns(experiment: Experiment, results: Results) -> dict[str, list[str]]:
    """The Markdown's columns by heading; those that would be empty are left out."""
    table, lines = experiment.table, results.lines
    columns = {
        "": [line.row.name + (r" \*" if line.row.beyond else "") for line in lines],
        "M": [str(line.num_labeled) for line in lines],
    }
    if table.with_folds:
        for i, fold in enumerate(experiment.folds):
            columns[f"Fold {fold + 1}"] = [_digits(line.folds[i], 4) for line in lines]
    columns |= {
        "Dice": [_with_error(line.mean) for line in lines],
        "n": [_count(experiment, line) for line in lines],
        "Difference": [_with_error(line.difference, sign="+") for line in lines],
        "Mean(Std)": [mean_and_std(line.mean and line.mean.mean, line.std) for line in lines],
        "Paper": [_paper(experiment, line) or "" for line in lines],
    }
    if table.with_parameters and results.parameters:
        parameters = [results.parameters[line.row.name] for line in lines]
        columns["#params"] = [f"{number / 1e6:.1f} M" for number in parameters]
    return {name: cells for name, cells in columns.items() if any(cells)}


def _count(experiment: Experiment, line: Line) -> str:
    runs = len(experiment.folds) * len(experiment.seeds)
    return str(runs) if len(line.dice) == runs else f"{len(line.dice)} of {runs}"


def _with_error(mean: Mean | None, *, sign: str = "") -> str:
    if mean is None:
        return ""
    error = "" if mean.error is None else f" ± {mean.error:.3f}"
    return f"{mean.mean:{sign}.3f}{error}"


def _paper(experiment: Experiment, line: Line) -> str | None:
    return line.row.paper.get(experiment.dataset, {}).get(line.num_labeled)


def _count_parameters(experiment: Experiment) -> dict[str, int]:
    """By row's name; none where the dataset, which knows the number of classes, is not there."""
    counts: dict[str, int] = {}
    for row in experiment.table.rows:
        if row.model not in counts:
            config = experiment.segmentation(row, experiment.seeds[0]).config()
            try:
                counts[row.model] = sum(count_parameters(with_classes(config)).values())
            except ValueError:
                return {}
    return {row.name: counts[row.model] for row in experiment.table.rows}


def _digits(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _numbers(numbers: Any) -> str:
    return ", ".join(map(str, numbers))


def _csv(lines: Sequence[Sequence[Any]]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(lines)
    return stream.getvalue()
