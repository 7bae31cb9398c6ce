"""Scores anyone's predictions: a folder of labels against a folder of reference labels.

    kafjax evaluate --predictions DIR --labels DIR [--output DIR]

Files match by name, whatever tool wrote them and in whatever format: with or without a channel's
`_0000`, and `x_image` with `x_label`. A prediction lies on its reference's grid, by shape and
affine; its axes may have another order or direction. Writes `evaluation.json` and `.csv`, as
`kafjax.inference.evaluation` does for a run, and `volumes.csv`; with `uncertainty.csv` among the
predictions, also its numbers and their correlation with Dice. Without `--labels` only the
volumes. Needs the extra `data`.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import tqdm

from data_prep.dataset_json import read_classes
from data_prep.entries import SCANS, file_stem, list_entries
from data_prep.faults import DatasetError, Fault
from data_prep.formats import read_labels, read_scan
from data_prep.scan import Scan
from data_prep.volumes import MAX_CLASSES, grid_faults, label_problem
from kafjax.errors import UserError
from kafjax.files import printable
from kafjax.inference.prediction_files import MAPS
from kafjax.inference.results import Results, format_table, summarize, write_results
from kafjax.inference.uncertainty import (
    FILE,
    compare_with_dice,
    format_correlations,
    read_table,
)
from kafjax.inference.volumes import count_mm3, write_volumes
from kafjax.labels import IGNORED
from kafjax.paths import expand
from kafjax.regions import Groups, structures_of
from kafjax.segmentation_metrics import count_pixels, volume_metrics
from kafjax.workdir.environment import describe_environment

# What names add to a case's own, and how a reference is called next to its scan.
_ADDED = re.compile(r"_(0000|image|label|labels|gt|seg|mask|pred)$")

_MAP = re.compile(rf"_({'|'.join(MAPS)})$")


def evaluate_folders(
    predictions: str | os.PathLike[str],
    labels: str | os.PathLike[str] | None = None,
    *,
    output: str | os.PathLike[str] | None = None,
    classes: Sequence[str] = (),
    numbers: Sequence[int] | None = None,
    ignore_label: int | None = None,
    dataset_json: str | os.PathLike[str] | None = None,
) -> Results | None:
    """Scores a folder of predictions, prints a table and writes it.

    Args:
      predictions: folder of files of whole numbers, of any format.
      labels: folder of the references; without it only volumes are measured.
      output: folder of the results, by default that of the predictions.
      classes: names of the files' numbers in ascending order, without 0; if there are not as many,
        of 1, 2, ..., and higher numbers are background. By default those of `uncertainty.csv`, if
        there, or class_<number>.
      numbers: of the background and the classes in the files, if known.
      ignore_label: the number in the references of voxels that nobody annotated, which do not
        count.
      dataset_json: nnU-Net's, instead of classes, numbers and ignore label; its regions are scored
        too.

    Returns:
      What `evaluation.json` holds; None without `labels`.

    Raises:
      UserError: a folder is not there, no names match, or files cannot be compared: all faults.
    """
    folder = expand(predictions)
    num_regions, groups = 0, None
    if dataset_json is not None:
        if classes or ignore_label is not None:
            raise UserError("dataset.json has classes and ignore label; expected no others")
        facts = read_classes(expand(dataset_json))
        classes, ignore_label = facts["classes"][1:], facts["ignore_label"]
        numbers, num_regions = range(len(facts["classes"])), len(facts["regions"])
    found, faults = _scans(folder)
    pairs: dict[str, Path | None] = dict.fromkeys(found)
    if labels is not None:
        references, more = _scans(expand(labels), beside=True)
        faults += more
        pairs, notes = match_names(found, references)
        if not faults and not any(pairs.values()):
            raise UserError(
                f"no file of {folder} has the name of one of {labels}; expected such as "
                f"{next(iter(references.values())).name}"
            )
        if not faults:
            for line in notes:
                print(f"note: {line}", flush=True)
    table = read_table(folder / FILE) if (folder / FILE).exists() else {}
    classes = tuple(classes) or tuple(next(iter(table.values()), ()))
    seen, more = _numbers(found, pairs, classes, ignore_label)
    numbers = seen if numbers is None else numbers
    if faults := [*faults, *more]:
        raise DatasetError(faults)
    names = classes or tuple(f"class_{number}" for number in numbers[1:])
    if num_regions:
        names, groups = structures_of(facts)
    target = folder if output is None else expand(output)
    target.mkdir(parents=True, exist_ok=True)
    results, mm3 = _compare(found, pairs, numbers, names, groups, num_regions, ignore_label)
    write_volumes(mm3, target / "volumes.csv")
    if results is None:
        print(f"{folder}: {len(found)} predictions; volumes: {target / 'volumes.csv'}")
        return None
    results = {"predictions": str(folder), "labels": str(labels), **results}
    if table:
        results["uncertainty"] = compare_with_dice(results["by_volume"], table)
    write_results(results, target / "evaluation")
    print(f"{folder} against {labels}: {len(results['by_volume'])} volumes\n")
    print(format_table(results))
    if "uncertainty" in results:
        print(f"\n{format_correlations(results['uncertainty'])}")
    return results


def match_names(
    predictions: Mapping[str, Path], references: Mapping[str, Path]
) -> tuple[dict[str, Path | None], list[str]]:
    """The reference of each prediction by its name without ending, and lines about the others.

    A name that is the same comes first, then one that is the same without what tools add to it. Of
    `x_image` and `x_label` among the references the latter is meant.
    """
    plain: dict[str, list[Path]] = {}
    for stem, path in references.items():
        plain.setdefault(_ADDED.sub("", stem), []).append(path)
    pairs: dict[str, Path | None] = {}
    for stem in predictions:
        alike = plain.get(_ADDED.sub("", stem), [])
        labels = [path for path in alike if not file_stem(path).endswith("_image")]
        same = references.get(stem)
        pairs[stem] = same if same in labels else next(iter(labels), None)
    used = {path for path in pairs.values() if path is not None}
    notes = [f"{printable(predictions[s])}: no reference" for s, path in pairs.items() if not path]
    left = [p for p in references.values() if p not in used and not file_stem(p).endswith("_image")]
    if left:
        some = ", ".join(printable(path.name) for path in left[:5])
        notes.append(f"{len(left)} references without prediction are not scored: {some}")
    return pairs, notes


def _scans(folder: Path, *, beside: bool = False) -> tuple[dict[str, Path], list[Fault]]:
    """The scans of a folder by name without ending, and what cannot be read of it."""
    if not folder.is_dir():
        return {}, [Fault(folder, "is not a folder", "expected a folder of labels")]
    entries = list_entries(folder)
    # Tables and notes may lie there: only what is named as a scan matters.
    faults = [fault for fault in entries.faults if fault.path in entries.broken]
    files: dict[str, Path] = {}
    for path in entries.scans:
        if (stem := file_stem(path)) in files:
            found = f"has the name of {files[stem].name}"
            faults.append(Fault(path, found, "move one of them away"))
        files.setdefault(stem, path)
    if not beside:
        files = {stem: path for stem, path in files.items() if not _MAP.search(stem)}
    if not files:
        faults.append(Fault(folder, "holds no scan", f"expected {SCANS}"))
    return files, faults


def _read_pair(path: Path, reference: Path | None) -> list[tuple[Path, Scan]]:
    """A prediction on the axes of its reference, and the reference. Raises `DatasetError`."""
    if reference is None:
        return [(path, read_labels(path))]
    there = read_scan(reference)
    return [(path, read_labels(path, there)), (reference, there)]


def _numbers(
    predictions: Mapping[str, Path],
    pairs: Mapping[str, Path | None],
    classes: Sequence[str],
    ignore_label: int | None,
) -> tuple[list[int], list[Fault]]:
    """The classes' numbers, the background first, and all faults of the files."""
    numbers = {0}
    faults: list[Fault] = []
    for stem, path in predictions.items():
        reference = pairs[stem]
        try:
            files = _read_pair(path, reference)
        except DatasetError as error:
            faults += error.faults
            continue
        for place, file in files:
            values = np.unique(file.array)
            if problem := label_problem(values):
                faults.append(Fault(place, problem, "expected whole numbers of classes"))
            numbers |= set(map(int, values)) - {ignore_label}
        if len(files) == 2:
            faults += grid_faults(*files[1], *files[0], of="the reference")
    if classes and len(numbers) != len(classes) + 1:
        return list(range(len(classes) + 1)), faults
    if len(numbers) > MAX_CLASSES and not faults:
        first = next(iter(predictions.values()))
        remedy = f"expected labels of at most {MAX_CLASSES} classes; are these scans?"
        faults.append(Fault(first.parent, f"holds {len(numbers)} different values", remedy))
    return sorted(numbers), faults


def _compare(
    predictions: Mapping[str, Path],
    pairs: Mapping[str, Path | None],
    numbers: Sequence[int],
    names: Sequence[str],
    groups: Groups | None,
    num_regions: int,
    ignore_label: int | None,
) -> tuple[Results | None, dict[str, dict[str, Any]]]:
    """Results as of a run, and the volumes of all predictions."""
    counts = np.zeros((1 + len(names), 3), np.int64)
    metrics, mm3 = {}, {}
    for stem, path in tqdm.tqdm(predictions.items(), unit="volume", disable=None):
        (_, predicted), *there = _read_pair(path, pairs[stem])
        spacing = nib.affines.voxel_sizes(predicted.affine)
        found = _as_classes(predicted, numbers)
        label = None
        if there:
            drawn = there[0][1]
            label = _as_classes(drawn, numbers).astype(np.int16)
            label[drawn.array == ignore_label] = IGNORED
        mm3[stem] = count_mm3(found, label, names, spacing, groups=groups)
        if label is None:
            continue
        # By slice: a call counts up to 2^31 pixels.
        for a, b in zip(np.moveaxis(found, -1, 0), np.moveaxis(label, -1, 0), strict=True):
            counts += np.asarray(count_pixels(a, b, len(numbers), groups=groups))
        of_volume = volume_metrics(
            found, label, num_classes=len(numbers), spacing=spacing, groups=groups
        )
        metrics[stem] = dict(zip(names, of_volume, strict=True))
    if not metrics:
        return None, mm3
    summary = summarize(counts, metrics, tuple(names), num_regions=num_regions)
    return {**summary, "environment": describe_environment()}, mm3


def _as_classes(file: Scan, numbers: Sequence[int]) -> np.ndarray:
    """Class numbers 0, 1, 2, ... of a file's values; values that are no class are background."""
    values = np.array(numbers)
    places = np.minimum(np.searchsorted(values, file.array), len(values) - 1)
    return np.where(values[places] == file.array, places, 0).astype(np.uint8)
