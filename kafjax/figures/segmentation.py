"""Figure 5 of the appendix: slices, their reference, and the predictions of runs.

Below each prediction is its Dice in that slice: the mean over the classes present in the slice or
the prediction. A star marks a run trained on the volume.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from matplotlib.figure import Figure

from kafjax.data.input_pipeline import SliceDataset, labelled_volumes, select_volumes
from kafjax.data.splits import Split
from kafjax.drawing.figures import SegmentedSlice, draw_segmentations
from kafjax.figures.choice import check_run_dataset, find_record, name_runs
from kafjax.inference.predictor import Predictor, load_predictor
from kafjax.segmentation_metrics import count_pixels, mean_pooled_dice
from kafjax.workdir.split import open_split
from kafjax.workdir.workdir import Workdir

_SEEN = "*"


def segmentation_figure(
    dataset: SliceDataset,
    workdirs: Sequence[str | os.PathLike[str]],
    *,
    volumes: Sequence[str] | None = None,
    slices: Sequence[int] | None = None,
    num_slices: int = 3,
    step: int | None = None,
) -> Figure:
    """Draws a row for each slice and a column for each run.

    Args:
      dataset: where the slices are.
      workdirs: of segmentation runs on that dataset.
      volumes: labelled, a row for each; by default the first `num_slices` that all runs were
        validated on.
      slices: one of each volume; by default the first with the largest foreground.
      num_slices: see `volumes`.
      step: of the checkpoints; by default each run's best by validation.

    Raises:
      ValueError: no such volume, slice or run, or they do not match.
    """
    devices = jax.local_device_count()
    predictors = [load_predictor(workdir, step=step, batch_size=devices) for workdir in workdirs]
    for workdir, predictor in zip(workdirs, predictors, strict=True):
        _check_dataset(dataset, workdir, predictor)
    splits = [open_split(Workdir(workdir), dataset).names for workdir in workdirs]
    names = list(volumes) if volumes else _held_out(splits, dataset)[:num_slices]
    records = choose_slices(dataset, names, slices)
    shown = [dataset.read(record, with_label=True) for record in records]
    views = [(s.image, s.keypoints, s.mask) for s in shown]
    predictions = [[p.argmax(axis=-1) for p in run.probabilities(views)] for run in predictors]
    rows = []
    for i, (name, record, one) in enumerate(zip(names, records, shown, strict=True)):
        assert one.label is not None
        found = [of_run[i] for of_run in predictions]
        notes = [
            dice_note(one.label, prediction, len(dataset.classes)) + _SEEN * (name in split.train)
            for prediction, split in zip(found, splits, strict=True)
        ]
        aspect = float(one.spacing[0] / one.spacing[1])
        title = dataset.describe_record(record)
        labels = [one.label, *found]
        rows.append(SegmentedSlice(title, one.image[..., 0], labels, ["", *notes], aspect))
    columns = ["reference", *name_runs(workdirs)]
    seen = any(note.endswith(_SEEN) for row in rows for note in row.notes)
    footnote = f"{_SEEN} trained on this volume" if seen else ""
    return draw_segmentations(rows, columns, dataset.classes, footnote=footnote)


def choose_slices(
    dataset: SliceDataset, volumes: Sequence[str], slices: Sequence[int] | None
) -> list[int]:
    """The record of one slice of each volume: as given, else with the largest foreground.

    Raises `ValueError` for a missing volume or one without labels, a missing slice, or different
    numbers of slices and volumes.
    """
    select_volumes(dataset, sorted(set(volumes)))
    unlabelled = sorted(set(volumes) - set(labelled_volumes(dataset)))
    if unlabelled:
        raise ValueError(f"{dataset.directory}: no labels in the volumes {', '.join(unlabelled)}")
    if slices is None:
        return [_largest_foreground(dataset, volume) for volume in volumes]
    if len(slices) != len(volumes):
        raise ValueError(f"{len(slices)} slices of {len(volumes)} volumes; expected one of each")
    return [find_record(dataset, *chosen) for chosen in zip(volumes, slices, strict=True)]


def dice_note(label: np.ndarray, prediction: np.ndarray, num_classes: int) -> str:
    """The Dice of a slice as text; '-' if neither label nor prediction has a class."""
    dice = mean_pooled_dice(np.asarray(count_pixels(prediction, label, num_classes)))
    return f"Dice {'-' if np.isnan(dice) else format(dice, '.3f')}"


def _check_dataset(
    dataset: SliceDataset, workdir: str | os.PathLike[str], predictor: Predictor
) -> None:
    config = predictor.config
    check_run_dataset(workdir, config, dataset)
    if config.model.num_classes != len(dataset.classes):
        raise ValueError(
            f"{workdir}: a run of {config.model.num_classes} classes; "
            f"{dataset.directory} has {len(dataset.classes)}"
        )


def _held_out(splits: Sequence[Split], dataset: SliceDataset) -> list[str]:
    names = [v for v in dataset.volumes if all(v in split.validation for split in splits)]
    if not names:
        raise ValueError(
            f"no volume is for validation in the folds of all {len(splits)} runs; expected --volume"
        )
    return names


def _largest_foreground(dataset: SliceDataset, volume: str) -> int:
    def count(record: int) -> int:
        label = dataset.read(record, with_label=True).label
        assert label is not None
        return int(np.count_nonzero(label))

    with ThreadPoolExecutor(os.cpu_count()) as threads:  # inflating lets other threads run
        counts = list(threads.map(count, dataset.volumes[volume]))
    return dataset.volumes[volume][int(np.argmax(counts))]
