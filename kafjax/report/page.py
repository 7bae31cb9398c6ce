"""The report's page, section by section."""

import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from kafjax.errors import UserError
from kafjax.files import flatten, printable, write_text
from kafjax.regions import regions_of
from kafjax.report.charts import Curve, chart, curve_legend
from kafjax.report.html import (
    Child,
    Element,
    details,
    element,
    figure,
    note,
    number,
    page,
    table,
)
from kafjax.report.pictures import read_board, show_samples
from kafjax.report.runs import Run, expand, read_runs
from kafjax.report.tables import cross_validation, evaluations, extremes
from kafjax.training.plateau import describe_plateau
from kafjax.workdir.environment import describe_environment

NUM_SAMPLES = 4

_TASKS = {
    "pretrain": "Pretraining",
    "local_contrast": "Local contrast",
    "segment": "Segmentation",
}


def report(
    workdirs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    data_dir: str | os.PathLike[str] | None = None,
    num_samples: int = NUM_SAMPLES,
) -> None:
    """Writes the page, whole or not at all.

    Args:
      workdirs: of runs, imports and cross-validations.
      output: the HTML file.
      data_dir: where the runs' datasets are, if not where the runs had them.
      num_samples: how many slices of each dataset are predicted; 0 for none.

    Raises:
      ValueError: folders that are no workdirs, all in one line, a place that the page cannot have,
        or a negative number of samples.
    """
    if num_samples < 0:
        raise UserError(f"samples is {num_samples}, expected 0 or more")
    target = Path(output)
    if target.is_dir() or not target.absolute().parent.is_dir():
        raise UserError(f"{output}: expected a file in a folder that exists")
    places, tables = expand([Path(workdir) for workdir in workdirs])
    runs = read_runs(places)
    sections = {
        "Runs": _overview(runs),
        "Curves": _curves(runs),
        "Evaluation": [*itertools.starmap(cross_validation, tables), *evaluations(runs)],
        "Volumes, worst and slowest": extremes(runs),
        "Samples of segmentation": show_samples(runs, data_dir=data_dir, most=num_samples),
        "Pictures of training": _board(runs),
        "Configuration": _configuration(runs),
        "Environment": _environment(runs),
    }
    text = page(*_body(sections))
    # A file name that is not Unicode still makes a page.
    write_text(target, text, errors="xmlcharrefreplace")
    print(f"{printable(output)}: {len(runs)} runs, {len(text) / 2**20:.1f} MiB", flush=True)


def _body(sections: Mapping[str, Sequence[Child]]) -> Iterator[Element]:
    names = {title: title.split()[0].strip(",").lower() for title in sections}
    links = [element("li", element("a", title, href=f"#{names[title]}")) for title in sections]
    yield element("nav", element("ul", *links), aria_label="Sections")
    for title, parts in sections.items():
        name = names[title]
        yield element("section", element("h2", title, id=name), *parts, aria_labelledby=name)


def _overview(runs: Sequence[Run]) -> list[Element]:
    header = ("run", "task", "network", "starts from", "steps", "epochs", "training time")
    scores = ("last loss", "best validation Dice", "Dice of evaluation", "workdir")
    rows = [
        [
            run.name,
            run.task,
            run.config.get("model", {}).get("name"),
            run.config.get("init_from"),
            *_progress(run),
            *_scores(run),
            str(run.workdir),
        ]
        for run in runs
    ]
    notes = [note(f"{run.name}: {fault}") for run in runs for fault in run.faults]
    for run in runs:
        if plateau := describe_plateau(run.metrics, run.config):
            notes.append(note(f"{run.name}: {plateau}"))
    return [table("The runs of this page", (*header, *scores), rows), *notes]


def _progress(run: Run) -> tuple[str | None, str | None, str | None]:
    """Steps, epochs, and the time of training without validation."""
    logged = [row for row in run.metrics if "seconds_per_step" in row.get("time", {})]
    if not logged:
        return None, None, None
    starts = [0, *(row["step"] for row in logged)]
    seconds = sum(
        row["time"]["seconds_per_step"] * (row["step"] - start)
        for start, row in zip(starts, logged, strict=False)
    )
    return (
        f"{logged[-1]['step']:,}",
        number(logged[-1].get("epoch"), 1),
        str(timedelta(seconds=round(seconds))),
    )


def _scores(run: Run) -> tuple[str | None, str | None, str | None]:
    losses = [row["loss"] for row in run.metrics if "loss" in row]
    dice = [(row.get("validation_dice"), row["step"]) for row in run.metrics]
    # None and NaN do not equal themselves or are no numbers; the later of equals is kept.
    best = max(((d, s) for d, s in dice if d is not None and d == d), default=None)
    evaluated = run.evaluations.get("validation", {}).get("pooled_dice", {}).get("mean")
    return (
        number(losses[-1] if losses else None, 4),
        None if best is None else f"{best[0]:.4f} (step {best[1]:,})",
        number(evaluated, 4),
    )


def _curves(runs: Sequence[Run]) -> list[Element]:
    """Charts by task: the losses of different tasks do not compare."""
    parts = [
        note(f"{run.name}: no metrics; an import, or a run that has not begun.")
        for run in runs
        if not run.metrics
    ]
    for task in dict.fromkeys(run.task for run in runs if run.metrics):
        group = [run for run in runs if run.task == task and run.metrics]
        shown, folded = _charts(group)
        parts += [
            element("h3", _TASKS.get(task, task)),
            curve_legend({run.number: run.name for run in group}),
            element("div", *shown, class_="charts"),
        ]
        if folded:
            parts.append(details("More curves", element("div", *folded, class_="charts")))
    return parts


def _charts(runs: Sequence[Run]) -> tuple[list[Element], list[Element]]:
    """Charts of losses and mean Dice, and of all else."""
    curves: dict[str, list[Curve]] = {}
    for run in runs:
        for name, points in _points(run).items():
            steps, values = zip(*points, strict=True)
            curves.setdefault(name, []).append(Curve(run.name, run.number, steps, values))
    titles = _titles(runs)
    shown: list[Element] = []
    folded: list[Element] = []
    for name in sorted(curves):
        first = name.startswith("loss") or name in ("dice", "validation_dice")
        (shown if first else folded).append(chart(titles.get(name, name), curves[name]))
    return shown, folded


def _points(run: Run) -> dict[str, list[tuple[float, float]]]:
    """(step, value) of each metric, in the order of the file."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in run.metrics:
        times = {f"time/{name}": value for name, value in row.get("time", {}).items()}
        for name, value in {**row, **times}.items():
            if name not in ("step", "epoch", "time") and isinstance(value, (int, float)):
                points.setdefault(name, []).append((row["step"], value))
    return points


def _titles(runs: Sequence[Run]) -> dict[str, str]:
    """What metrics of classes are called, where all runs have the same classes."""
    found = {_scored(run.preparation) for run in runs}
    names = found.pop() if len(found) == 1 else ()
    return {f"validation_dice_{i}": f"validation_dice of {n}" for i, n in enumerate(names, start=1)}


def _scored(preparation: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of what validation scores, in order: regions, or classes without the background."""
    regions = tuple(region.name for region in regions_of(preparation))
    return regions or tuple(preparation.get("classes", ())[1:])


def _board(runs: Sequence[Run]) -> list[Element]:
    shown, parts = [], []
    for run in runs:
        try:
            found = read_board(run.workdir)
        except (UserError, OSError) as error:
            parts.append(note(f"{run.name}: {error}"))
            continue
        if not found:
            parts.append(note(f"{run.name}: no pictures in TensorBoard's files."))
        for name, (step, image) in found.items():
            told = f"{run.name}: {name}, step {step:,}"
            shown.append(figure(image, told, told))
    return [element("div", *shown, class_="pictures wide"), *parts] if shown else parts


def _configuration(runs: Sequence[Run]) -> list[Element]:
    """By task, whose fields are not the same: what differs, and folded away what does not."""
    parts = []
    for task in dict.fromkeys(run.task for run in runs):
        group = [run for run in runs if run.task == task]
        fields = [dict(sorted(flatten(run.config).items())) for run in group]
        names = sorted({name for of_run in fields for name in of_run})
        rows = {name: [_value(of_run, name) for of_run in fields] for name in names}
        differing = [[name, *row] for name, row in rows.items() if len(set(row)) > 1]
        common = [[name, row[0]] for name, row in rows.items() if len(set(row)) == 1]
        parts.append(element("h3", _TASKS.get(task, task)))
        if differing:
            caption = "Fields that differ; a dash where a run's config has no such field"
            parts.append(table(caption, ["field", *(run.name for run in group)], differing))
        shared = f"The fields that {', '.join(run.name for run in group)} share"
        title = shared if len(group) > 1 else f"The fields of {group[0].name}"
        parts.append(details(title, table(title, ["field", "value"], common)))
    return parts


def _value(fields: Mapping[str, Any], name: str) -> str | None:
    if name not in fields:
        return None
    return fields[name] if isinstance(fields[name], str) else json.dumps(fields[name])


def _environment(runs: Sequence[Run]) -> list[Element]:
    """The environments of training, evaluation and preparation; equal ones share a column."""
    noted: list[tuple[str, Mapping[str, Any] | None]] = [("this page", describe_environment())]
    for run in runs:
        noted.append((f"training of {run.name}", run.environment))
        for split, evaluation in run.evaluations.items():
            noted.append((f"evaluation of {run.name} ({split})", evaluation.get("environment")))
        noted.append((f"preparation for {run.name}", run.preparation.get("libraries")))
    columns: dict[str, tuple[list[str], Mapping[str, Any]]] = {}
    for title, found in noted:
        if found:
            columns.setdefault(json.dumps(found), ([], found))[0].append(title)
    header = ["", *("; ".join(titles) for titles, _ in columns.values())]
    names = dict.fromkeys(name for _, found in columns.values() for name in found)
    rows = [[name, *(_value(found, name) for _, found in columns.values())] for name in names]
    parts = [table("Versions and devices", header, rows)]
    if lacking := [title for title, found in noted if not found]:
        parts.append(note(f"Not noted: the environment of {', '.join(lacking)}."))
    return parts
