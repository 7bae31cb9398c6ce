"""Tables of evaluation: by class, by volume, the worst and slowest volumes, cross-validation.

Dice is in [0, 1], distances are in mm, times in seconds. A dash stands where there is no number.
"""

from collections.abc import Sequence
from pathlib import Path

from kafjax.report.html import Element, details, element, note, number, table
from kafjax.report.runs import Fields, Run, mean_dice

_METRICS = {"dice": ("Dice", 3), "hd95": ("HD95, mm", 1), "assd": ("ASSD, mm", 2)}
_SPLITS = {
    "validation": "Validation volumes",
    "test": "Test volumes",
    "train": "Training volumes",
}
_MOST_LISTED = 10


def cross_validation(place: Path, document: Fields) -> Element:
    """The table of `kafjax.cross_validate`, and which runs it misses."""
    header = ["labelled volumes M", *(f"fold {fold + 1}" for fold in document["folds"])]
    rows = [
        [
            str(row["num_labeled"]),
            *(number(cell, 4) for cell in row["folds"]),
            number(row["mean"], 3),
            number(row["std"], 3),
        ]
        for row in document["rows"]
    ]
    missing = ", ".join(document["missing"])
    title = f"{place}: pooled Dice, mean over classes" + (
        f"; missing: {missing}" if missing else ""
    )
    return table(title, [*header, "mean", "standard deviation"], rows)


def evaluations(runs: Sequence[Run]) -> list[Element]:
    """For each split the runs side by side, then each run by class and by volume."""
    parts: list[Element] = []
    for split, title in _SPLITS.items():
        found = {run.name: run.evaluations[split] for run in runs if split in run.evaluations}
        if found:
            parts += [element("h3", title), _pooled(found)]
        for name, evaluation in found.items():
            tables = [_by_class(name, evaluation), *_by_volume(name, evaluation)]
            parts.append(details(f"{name}: by class and by volume", *tables))
    lacking = [run.name for run in runs if run.task == "segment" and not run.evaluations]
    if lacking:
        names = ", ".join(lacking)
        parts.append(note(f"Not evaluated yet (kafjax evaluate): {names}."))
    return parts or [note("No run of this page segments: pretraining has nothing to evaluate.")]


def extremes(runs: Sequence[Run]) -> list[Element]:
    """The volumes with the lowest mean Dice, and those that took longest."""
    found = [
        (run.name, split, evaluation)
        for run in runs
        for split, evaluation in run.evaluations.items()
    ]
    if not found:
        return [note("No run of this page is evaluated yet.")]
    parts = [_worst(found)]
    if any("seconds" in evaluation for _, _, evaluation in found):
        parts.append(_slowest(found))
    lacking = [f"{name}, {split}" for name, split, e in found if "seconds" not in e]
    if lacking:
        names = "; ".join(lacking)
        parts.append(note(f"Times were not noted yet when these were evaluated: {names}."))
    return parts


def _pooled(found: dict[str, Fields]) -> Element:
    classes = dict.fromkeys(name for e in found.values() for name in e["pooled_dice"])
    ordered = [*(name for name in classes if name != "mean"), "mean"]
    rows = [
        [name, *(number(e["pooled_dice"].get(name), 4) for e in found.values())] for name in ordered
    ]
    if any("chance" in e for e in found.values()):
        rows.append(["by chance", *(number(e.get("chance"), 4) for e in found.values())])
    steps = [f", step {e['step']}" if e.get("step") is not None else "" for e in found.values()]
    header = ["class", *(name + step for name, step in zip(found, steps, strict=True))]
    return table("Dice pooled over all pixels, as the paper has it", header, rows)


def _by_class(run: str, evaluation: Fields) -> Element:
    rows = [
        [
            name,
            *(_with_spread(found[metric], digits) for metric, (_, digits) in _METRICS.items()),
            *(str(found[count]) for count in ("volumes", "empty", "missed")),
        ]
        for name, found in evaluation["by_class"].items()
    ]
    caption = (
        f"{run}: mean ± standard deviation over volumes. Empty: neither labels nor prediction have "
        "the class; missed: one of the two has it"
    )
    titles = (title for title, _ in _METRICS.values())
    return table(caption, ["class", *titles, "volumes", "empty", "missed"], rows)


def _by_volume(run: str, evaluation: Fields) -> list[Element]:
    classes = list(evaluation["by_class"])
    seconds = evaluation.get("seconds", {})
    means = mean_dice(evaluation)
    tables = []
    for metric, (title, digits) in _METRICS.items():
        header, rows = ["volume", *classes], []
        for volume, found in evaluation["by_volume"].items():
            cells = [number(found[name][metric], digits) for name in classes]
            if metric == "dice":
                cells += [number(means.get(volume), digits), number(seconds.get(volume), 2)]
            rows.append([volume, *cells])
        if metric == "dice":
            header += ["mean", "seconds"]
        tables.append(table(f"{run}: {title} of each volume", header, rows))
    return tables


def _worst(found: Sequence[tuple[str, str, Fields]]) -> Element:
    ranked = sorted(
        (dice, name, split, volume, evaluation["by_volume"][volume])
        for name, split, evaluation in found
        for volume, dice in mean_dice(evaluation).items()
    )
    rows = []
    for dice, name, split, volume, classes in ranked[:_MOST_LISTED]:
        known = {c: m["dice"] for c, m in classes.items() if m["dice"] is not None}
        least = min(known, key=lambda c: known[c])
        far = [m["hd95"] for m in classes.values() if m["hd95"] is not None]
        missed = [c for c, m in classes.items() if m["missed"]]
        cells = [f"{least} ({known[least]:.3f})", number(max(far), 1), ", ".join(missed) or None]
        rows.append([volume, name, split, number(dice, 3), *cells])
    header = ["volume", "run", "split", "mean Dice", "worst class", "worst HD95, mm", "missed"]
    return table(f"Lowest mean Dice over classes, {_listed(rows, ranked)}", header, rows)


def _slowest(found: Sequence[tuple[str, str, Fields]]) -> Element:
    ranked = sorted(
        (
            (-seconds, name, split, volume, "yes" if place == 0 else "no")
            for name, split, evaluation in found
            for place, (volume, seconds) in enumerate(evaluation.get("seconds", {}).items())
        ),
    )
    rows = [
        [volume, name, split, number(-negative, 2), first]
        for negative, name, split, volume, first in ranked[:_MOST_LISTED]
    ]
    header = ["volume", "run", "split", "seconds", "first, with compiling"]
    return table(f"Longest evaluation, {_listed(rows, ranked)}", header, rows)


def _listed(rows: Sequence[object], ranked: Sequence[object]) -> str:
    return f"{len(rows)} of {len(ranked)} volumes"


def _with_spread(found: dict[str, float | None], digits: int) -> str | None:
    if found["mean"] is None:
        return None
    return f"{number(found['mean'], digits)} ± {number(found['std'], digits)}"
