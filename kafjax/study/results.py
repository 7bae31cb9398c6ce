"""What a study found: tables in Markdown, CSV and JSON, every run's Dice, and a plot.

    table1.md         for reading: mean, standard error, difference from the reference row
    table1.csv        the same with all digits, and each fold: a line for each row and M
    table1.json       the same, with the scores of each run, also by class
    table1_runs.csv   the Dice of each run
    table1.{png,svg}  mean and standard error

Dice is the mean over classes, pooled over the pixels of a fold. A fold's cell is the mean over
seeds, `mean` over folds and seeds with its standard error (ddof 1), `std_over_folds` numpy's (ddof
0), as the appendix has it, and `difference` from the reference row, of runs with the same fold and
seed. A number is empty where one of its runs is missing or has no Dice: fewer runs would not
compare with other rows. Such runs are named, and so is the checkpoint that scores are of. The same
runs give the same bytes.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from kafjax.drawing.colours import CURVES
from kafjax.drawing.figures import FONT_SIZE, WIDTH, save_figure
from kafjax.files import csv_text, write_text
from kafjax.study.plan import Row, Study
from kafjax.study.runs import RunKey, complete_scores, listed, run_config
from kafjax.workdir.scores import Scores

Line = dict[
    str, Any
]  # of a table, by the names of the CSV's columns; None where there is no number

_RUN_FIELDS = ("step", "checkpoint", "pooled_dice", "chance", "by_class")


class Results(NamedTuple):
    """A study, the scores of its complete runs by row's name, and the lines of its table."""

    study: Study
    scores: Mapping[str, Mapping[RunKey, Scores]]
    lines: list[Line]

    def runs(self) -> list[tuple[Row, RunKey, Scores]]:
        """Each complete run with its scores."""
        rows = self.study.table.rows
        return [(row, *item) for row in rows for item in self.scores[row.name].items()]


def collect(study: Study) -> Results:
    """Reads the scores of all complete runs; `ValueError` names those that are damaged."""
    found: dict[str, dict[RunKey, Scores]] = {}
    for row in study.table.rows:
        configs = {seed: study.config(row, seed) for seed in study.seeds}
        scores = {
            run: complete_scores(run_config(configs[run.seed], run), study.row_dir(row) / run.name)
            for run in study.runs
        }
        found[row.name] = {run: of_run for run, of_run in scores.items() if of_run is not None}
    return tabulate(study, found)


def tabulate(study: Study, scores: Mapping[str, Mapping[RunKey, Scores]]) -> Results:
    """The table of these scores."""
    dice = {
        name: {run: of_run["pooled_dice"]["mean"] for run, of_run in found.items()}
        for name, found in scores.items()
    }
    reference, parameters = dice.get(study.table.reference, {}), study.parameters()
    lines = []
    for row, m in itertools.product(study.table.rows, study.num_labeled):
        own = dice[row.name]
        cells = [[RunKey(m, fold, seed) for seed in study.seeds] for fold in study.folds]
        runs = [run for cell in cells for run in cell]
        pairs = [(own.get(run), reference.get(run)) for run in runs]
        differences = [None if a is None or b is None else a - b for a, b in pairs]
        is_reference = row.name == study.table.reference
        mean, error = mean_of([*map(own.get, runs)])
        difference, its_error = (None, None) if is_reference else mean_of(differences)
        folds = [mean_of([*map(own.get, cell)])[0] for cell in cells]
        known = [cell for cell in folds if cell is not None]
        chosen = {scores[row.name][run]["checkpoint"] for run in runs if run in own}
        lines.append(
            {
                "row": row.name,
                "model": row.model,
                "pretraining": row.pretraining,
                **dict(zip(("w1", "w2", "w3"), row.weights or (None,) * 3, strict=True)),
                "M": m,
                "n": sum(run in own for run in runs),
                "mean": mean,
                "standard_error": error,
                "std_over_folds": float(np.std(known)) if len(known) == len(folds) else None,
                "difference": difference,
                "difference_standard_error": its_error,
                **{f"fold{fold + 1}": x for fold, x in zip(study.folds, folds, strict=True)},
                "paper": row.paper.get(study.dataset, {}).get(m),
                "parameters": parameters.get(row.name),
                "checkpoint": " or ".join(sorted(chosen)),
            }
        )
    return Results(study, scores, lines)


def mean_of(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """The mean and its standard error, which a single value has not; None where a value is None."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None, None
    error = float(np.std(known, ddof=1) / math.sqrt(len(known))) if len(known) > 1 else None
    return float(np.mean(known)), error


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
        ".csv": format_csv(results.lines),
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


def format_markdown(results: Results, command: str = "") -> str:
    """The table, what its columns mean, the checkpoint of its scores, and the missing runs."""
    study, rows = results.study, results.study.table.rows
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
    if any(row.beyond for row in rows):
        text.append(r"\* not in the appendix.")
    empty = [
        _place(study, row, run)
        for row, run, scores in results.runs()
        if scores["pooled_dice"]["mean"] is None
    ]
    of_all = f"of {len(rows) * len(study.runs)} runs:"
    for title, names in (
        ("Missing,", _missing(results)),
        ("No class in labels or predictions, so no Dice,", empty),
    ):
        if names:
            text += ["", f"{title} {len(names)} {of_all}", "", *(f"- {name}" for name in names)]
    return "\n".join(text) + "\n"


def format_csv(lines: Sequence[Line]) -> str:
    """The lines with all digits."""
    return csv_text([list(lines[0]), *(list(line.values()) for line in lines)])


def format_json(results: Results) -> str:
    """The lines with all digits, the scores of each run, and the missing runs."""
    study = results.study
    rows = [
        {
            "row": line["row"],
            "num_labeled": line["M"],
            "mean": line["mean"],
            "std": line["std_over_folds"],
            "folds": [line[f"fold{fold + 1}"] for fold in study.folds],
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
    document = {"folds": study.folds, "rows": rows, "runs": runs, "missing": _missing(results)}
    return json.dumps(document, indent=2) + "\n"


def format_runs(results: Results) -> str:
    """A line of CSV for each complete run."""
    header = ["row", "M", "fold", "seed", "dice", "step", "checkpoint"]
    body = [
        [
            *(row.name, run.num_labeled, run.fold + 1, run.seed),
            *(scores["pooled_dice"]["mean"], scores["step"], scores["checkpoint"]),
        ]
        for row, run, scores in results.runs()
    ]
    return csv_text([header, *body])


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
        known = [x for x in results.lines if x["row"] == row.name and x["mean"] is not None]
        means = [line["mean"] for line in known]
        errors = [line["standard_error"] or 0.0 for line in known]
        style: dict[str, Any] = {"marker": "o", "ms": 4, "capsize": 3, "lw": 1, "label": row.name}
        style["color"] = CURVES[i % len(CURVES)]
        if several:
            axes.errorbar([line["M"] for line in known], means, errors, **style)
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


def _columns(results: Results) -> dict[str, list[str]]:
    """The Markdown's columns by heading; those that would be empty are absent, except for folds."""
    study, lines = results.study, results.lines
    runs = len(study.folds) * len(study.seeds)
    starred = {row.name for row in study.table.rows if row.beyond}
    folds = {
        f"Fold {fold + 1}": [_number(line[f"fold{fold + 1}"], ".4f") for line in lines]
        for fold in (study.folds if study.table.with_folds else ())
    }
    columns = {
        "": [x["row"] + (r" \*" if x["row"] in starred else "") for x in lines],
        "M": [str(x["M"]) for x in lines],
        **folds,
        "Dice": [_number(x["mean"], ".3f", x["standard_error"]) for x in lines],
        "n": [str(runs) if x["n"] == runs else f"{x['n']} of {runs}" for x in lines],
        "Difference": [
            _number(x["difference"], "+.3f", x["difference_standard_error"]) for x in lines
        ],
        "Mean(Std)": [mean_and_std(x["mean"], x["std_over_folds"]) for x in lines],
        "Paper": [x["paper"] or "" for x in lines],
    }
    if study.table.with_parameters and all(x["parameters"] for x in lines):
        columns["#params"] = [f"{x['parameters'] / 1e6:.1f} M" for x in lines]
    return {name: cells for name, cells in columns.items() if any(cells) or name in folds}


def mean_and_std(mean: float | None, std: float | None) -> str:
    """As the appendix prints them, 0.392(.062); nothing where one is missing."""
    if mean is None or std is None:
        return ""
    return f"{mean:.3f}({f'{std:.3f}'.removeprefix('0')})"


def _number(value: float | None, digits: str, error: float | None = None) -> str:
    if value is None:
        return ""
    return f"{value:{digits}}" + ("" if error is None else f" ± {error:.3f}")


def _missing(results: Results) -> list[str]:
    study = results.study
    pairs = itertools.product(study.table.rows, study.runs)
    return [_place(study, row, run) for row, run in pairs if run not in results.scores[row.name]]


def _place(study: Study, row: Row, run: RunKey) -> str:
    """A run's workdir below the study's root."""
    return str((study.row_dir(row) / run.name).relative_to(study.root))
