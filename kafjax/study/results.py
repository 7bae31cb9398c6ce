"""What a study found: tables in Markdown, CSV and JSON, every run's Dice, and a plot.

    table1.md         for reading: mean, standard error, difference from the reference row
    table1.csv        the same with all digits, and each fold
    table1.json       the same, with the scores of each run, also by class
    table1_runs.csv   the Dice of each run
    table1.{png,svg}  mean and standard error

A table names the runs that are missing and says which checkpoint each score is of. Its means are of
all runs of a row: those of fewer would not compare with other rows. The same runs give the same
bytes.
"""

import csv
import functools
import io
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from kafjax.drawing.colours import CURVES
from kafjax.drawing.figures import FONT_SIZE, WIDTH, save_figure
from kafjax.files import write_text
from kafjax.study.plan import Row, Study
from kafjax.study.runs import RunKey, complete_scores, listed, run_config
from kafjax.workdir.scores import Scores

ScoresByRun = Mapping[RunKey, Scores]

_RUN_FIELDS = ("step", "checkpoint", "pooled_dice", "chance", "by_class")


class Mean(NamedTuple):
    """The mean of some values, its standard error (None for one value), and their number."""

    mean: float
    error: float | None
    number: int


class Line(NamedTuple):
    """A row of a study with one M; None where runs are missing or have no Dice.

    Attributes:
      row: which.
      num_labeled: M.
      dice: of each complete run, pooled over the pixels of its fold; None where neither labels nor
        predictions have a class.
      missing: the other runs.
      mean: over folds and seeds.
      folds: of each fold, the mean over seeds.
      std: over folds, numpy's (ddof 0), as the appendix has it.
      difference: from the reference row, of runs with the same fold and seed.
      checkpoint: how the checkpoints of the runs were chosen, each way once.
    """

    row: Row
    num_labeled: int
    dice: Mapping[RunKey, float | None]
    missing: tuple[RunKey, ...]
    mean: Mean | None
    folds: tuple[float | None, ...]
    std: float | None
    difference: Mean | None
    checkpoint: str


@dataclass(frozen=True)
class Results:
    """A study and, by row's name, the scores of its complete runs."""

    study: Study
    scores: Mapping[str, ScoresByRun]

    @functools.cached_property
    def lines(self) -> list[Line]:
        """The lines of the table, row by row."""
        reference = self.scores.get(self.study.table.reference, {})
        rows = itertools.product(self.study.table.rows, self.study.num_labeled)
        return [_line(self.study, row, m, self.scores[row.name], reference) for row, m in rows]

    @functools.cached_property
    def parameters(self) -> dict[str, int]:
        """See `Study.parameters`."""
        return self.study.parameters()

    def runs(self) -> Iterator[tuple[Row, RunKey, Scores]]:
        """Each complete run with its scores."""
        for row in self.study.table.rows:
            for run, scores in self.scores[row.name].items():
                yield row, run, scores


def collect(study: Study) -> Results:
    """Reads the scores of all complete runs; `ValueError` names those that are damaged."""
    results: dict[str, ScoresByRun] = {}
    for row in study.table.rows:
        configs = {seed: study.config(row, seed) for seed in study.seeds}
        scores = {
            run: complete_scores(run_config(configs[run.seed], run), study.row_dir(row) / run.name)
            for run in study.runs
        }
        results[row.name] = {run: found for run, found in scores.items() if found is not None}
    return Results(study, results)


def write_results(
    study: Study, name: str, *, command: str = "", suffixes: Sequence[str] | None = None
) -> str:
    """Writes the files of the table, each whole or not at all.

    Args:
      study: whose runs are collected.
      name: of the files, without extension.
      command: what makes them, to be repeated.
      suffixes: which files, as in '.md'; all by default.

    Returns:
      The Markdown.
    """
    results = collect(study)
    texts = {
        ".md": format_markdown(results, command),
        ".csv": format_csv(results),
        ".json": format_json(results),
        "_runs.csv": format_runs(results),
    }
    study.root.mkdir(parents=True, exist_ok=True)
    for suffix in (*texts, ".png", ".svg") if suffixes is None else suffixes:
        path = study.root / f"{name}{suffix}"
        if suffix in texts:
            write_text(path, texts[suffix])
        else:
            save_figure(draw(results), path)
    return texts[".md"]


def mean_of(values: Sequence[float | None]) -> Mean | None:
    """The mean with its standard error (ddof 1); None of no values, or where one is None."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    error = float(np.std(known, ddof=1) / math.sqrt(len(known))) if len(known) > 1 else None
    return Mean(float(np.mean(known)), error, len(known))


def format_markdown(results: Results, command: str = "") -> str:
    """The table, what its columns mean, the checkpoint of its scores, and the missing runs."""
    study, lines = results.study, results.lines
    columns = _columns(results)
    folds = listed([fold + 1 for fold in study.folds], ", ")
    text = [
        f"# {study.table.title}\n",
        f"Dataset {study.dataset}, folds {folds}, seeds {listed(study.seeds, ', ')}."
        + (f" By\n\n    {command}" if command else ""),
        "",
        *(
            f"| {' | '.join(cells)} |"
            for cells in (columns, ["---"] * len(columns), *zip(*columns.values(), strict=True))
        ),
        "",
        "Dice: mean over classes, pooled over the pixels of a fold; mean over folds and seeds ± "
        "its standard error, n runs. Std: over folds, of means over seeds.",
    ]
    if "Difference" in columns:
        reference = study.table.reference
        text.append(f"Difference: from the row {reference!r}, of runs with the same fold and seed.")
    if chance := [s["chance"] for _, _, s in results.runs() if s["chance"] is not None]:
        mean = float(np.mean(chance))
        text.append(f"Chance, pixels drawn with the frequencies of classes: {mean:.3f}.")
    if chosen := sorted({scores["checkpoint"] for _, _, scores in results.runs()}):
        text.append(f"Checkpoint of each run: {' or '.join(chosen)}.")
    if "Paper" in columns:
        text.append("Paper: mean and standard deviation over folds, as the appendix prints them.")
    if any(line.row.beyond for line in lines):
        text.append(r"\* not in the appendix.")
    total = len(study.table.rows) * len(study.runs)
    missing = [(line.row, run) for line in lines for run in line.missing]
    empty = [(x.row, run) for x in lines for run, dice in x.dice.items() if dice is None]
    for title, runs in (
        (f"Missing, {len(missing)} of {total} runs:", missing),
        (f"No class in labels or predictions, so no Dice, {len(empty)} of {total} runs:", empty),
    ):
        names = [f"- {_place(study, row, run)}" for row, run in runs]
        text += ["", title, "", *names] if names else []
    return "\n".join(text) + "\n"


def format_csv(results: Results) -> str:
    """A line for each row and M with all digits."""
    study = results.study
    header = [
        *("row", "model", "pretraining", "w1", "w2", "w3", "M", "n", "mean", "standard_error"),
        *("std_over_folds", "difference", "difference_standard_error"),
        *(f"fold{fold + 1}" for fold in study.folds),
        *("paper", "parameters", "checkpoint"),
    ]
    body = []
    for line in results.lines:
        row = line.row
        mean, difference = (of or (None, None) for of in (line.mean, line.difference))
        body.append(
            [
                *(row.name, row.model, row.pretraining, *(row.weights or (None,) * 3)),
                *(line.num_labeled, len(line.dice), *mean[:2], line.std, *difference[:2]),
                *(*line.folds, _paper(study, line), results.parameters.get(row.name)),
                line.checkpoint,
            ]
        )
    return _csv([header, *body])


def format_json(results: Results) -> str:
    """The lines with all digits, the scores of each run, and the missing runs."""
    study = results.study
    rows = [
        {
            "row": line.row.name,
            "num_labeled": line.num_labeled,
            "folds": line.folds,
            "mean": line.mean and line.mean.mean,
            "std": line.std,
        }
        for line in results.lines
    ]
    runs = [
        {
            "workdir": _place(study, row, run),
            "row": row.name,
            **run._asdict(),
            **{field: scores[field] for field in _RUN_FIELDS},
        }
        for row, run, scores in results.runs()
    ]
    missing = [_place(study, line.row, run) for line in results.lines for run in line.missing]
    document = {"folds": study.folds, "rows": rows, "runs": runs, "missing": missing}
    return json.dumps(document, indent=2) + "\n"


def format_runs(results: Results) -> str:
    """A line for each complete run."""
    header = ["row", "M", "fold", "seed", "dice", "step", "checkpoint"]
    body = [
        [
            *(row.name, run.num_labeled, run.fold + 1, run.seed),
            *(scores["pooled_dice"]["mean"], scores["step"], scores["checkpoint"]),
        ]
        for row, run, scores in results.runs()
    ]
    return _csv([header, *body])


def draw(results: Results) -> Figure:
    """Means with standard errors: rows below each other, or against M where there are several."""
    study = results.study
    several = len(study.num_labeled) > 1
    rows = study.table.rows
    height = 0.5 * WIDTH if several else 0.9 + 0.25 * len(rows)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.tick_params(labelsize=FONT_SIZE)
    for i, row in enumerate(rows):
        known = [(x.num_labeled, x.mean) for x in results.lines if x.row == row and x.mean]
        means = [mean.mean for _, mean in known]
        errors = [mean.error or 0.0 for _, mean in known]
        style: dict[str, Any] = {"marker": "o", "ms": 4, "capsize": 3, "lw": 1, "label": row.name}
        style["color"] = CURVES[i % len(CURVES)]
        if several:
            axes.errorbar([m for m, _ in known], means, errors, **style)
        else:
            axes.errorbar(means, [i] * len(means), xerr=errors, ls="", **style)
    if several:
        axes.set_xscale("log")
        axes.set_xticks(study.num_labeled, list(map(str, study.num_labeled)))
        axes.minorticks_off()
        axes.set_xlabel("M, labelled volumes", fontsize=FONT_SIZE)
        axes.set_ylabel("Dice", fontsize=FONT_SIZE)
        axes.legend(fontsize=FONT_SIZE, frameon=False)
    else:
        axes.set_yticks(range(len(rows)), [row.name for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(f"Dice, M = {study.num_labeled[0]}", fontsize=FONT_SIZE)
    axes.grid(alpha=0.3)
    axes.set_title(f"{study.table.title}: {study.dataset}", fontsize=FONT_SIZE + 1)
    return figure


def _line(
    study: Study, row: Row, num_labeled: int, scores: ScoresByRun, reference: ScoresByRun
) -> Line:
    def dice(of: ScoresByRun, run: RunKey) -> float | None:
        return of[run]["pooled_dice"]["mean"] if run in of else None

    cells = [[RunKey(num_labeled, fold, seed) for seed in study.seeds] for fold in study.folds]
    runs = [run for cell in cells for run in cell]
    found = {run: dice(scores, run) for run in runs if run in scores}
    folds = [mean and mean.mean for mean in (mean_of([*map(found.get, cell)]) for cell in cells)]
    pairs = [(found.get(run), dice(reference, run)) for run in runs]
    differences = [None if a is None or b is None else a - b for a, b in pairs]
    is_reference = row.name == study.table.reference
    return Line(
        row,
        num_labeled,
        found,
        tuple(run for run in runs if run in study.runs and run not in scores),
        mean_of([*map(found.get, runs)]),
        tuple(folds),
        None if None in folds else float(np.std(np.array(folds, float))),
        None if is_reference else mean_of(differences),
        " or ".join(sorted({scores[run]["checkpoint"] for run in found})),
    )


def _columns(results: Results) -> dict[str, list[str]]:
    """The Markdown's columns by heading; those that would be empty are absent, except for folds."""
    study, lines = results.study, results.lines
    table = study.table
    folds = {
        f"Fold {fold + 1}": ["" if x.folds[i] is None else f"{x.folds[i]:.4f}" for x in lines]
        for i, fold in enumerate(study.folds if table.with_folds else ())
    }
    columns = {
        "": [line.row.name + (r" \*" if line.row.beyond else "") for line in lines],
        "M": [str(line.num_labeled) for line in lines],
        **folds,
        "Dice": [_with_error(line.mean) for line in lines],
        "n": [_count(study, line) for line in lines],
        "Difference": [_with_error(line.difference, sign="+") for line in lines],
        "Mean(Std)": [_with_std(line) for line in lines],
        "Paper": [_paper(study, line) or "" for line in lines],
    }
    if table.with_parameters and results.parameters:
        columns["#params"] = [f"{results.parameters[x.row.name] / 1e6:.1f} M" for x in lines]
    return {name: cells for name, cells in columns.items() if any(cells) or name in folds}


def _count(study: Study, line: Line) -> str:
    runs = len(study.folds) * len(study.seeds)
    return str(runs) if len(line.dice) == runs else f"{len(line.dice)} of {runs}"


def _with_error(mean: Mean | None, *, sign: str = "") -> str:
    if mean is None:
        return ""
    error = "" if mean.error is None else f" ± {mean.error:.3f}"
    return f"{mean.mean:{sign}.3f}{error}"


def _with_std(line: Line) -> str:
    """As the appendix prints them, 0.392(.062); nothing where one is missing."""
    if line.mean is None or line.std is None:
        return ""
    return f"{line.mean.mean:.3f}({f'{line.std:.3f}'.removeprefix('0')})"


def _paper(study: Study, line: Line) -> str | None:
    return line.row.paper.get(study.dataset, {}).get(line.num_labeled)


def _place(study: Study, row: Row, run: RunKey) -> str:
    """A run's workdir below the study's root."""
    return str((study.row_dir(row) / run.name).relative_to(study.root))


def _csv(lines: Sequence[Sequence[Any]]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(lines)
    return stream.getvalue()
