"""Figure 5 of the appendix: slices, their reference, and the predictions of runs.

Below each prediction is its Dice in that slice: the mean over the classes present in the slice or
the prediction. A star marks a run trained on the volume.
"""

import os
from collections.abc import Sequence

import jax
from matplotlib.figure import Figure

from kafjax.data.dataset import SliceDataset, labelled_volumes, select_volumes
from kafjax.data.splits import Split
from kafjax.drawing.segmentations import SegmentedSlice, draw_segmentations
from kafjax.errors import UserError
from kafjax.figures.choice import check_run_dataset, find_record, largest_foreground
from kafjax.inference.predictor import Predictor, load_predictor, views_of_each
from kafjax.regions import most_probable
from kafjax.segmentation_metrics import slice_dice
from kafjax.workdir.split import open_split
from kafjax.workdir.workdir import Workdir, name_runs

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
    predictions = [
        [most_probable(p, dataset.metadata) for p in run.probabilities(views)]
        for run, views in zip(predictors, views_of_each(predictors, dataset, records), strict=True)
    ]
    rows = []
    for i, (name, record, one) in enumerate(zip(names, records, shown, strict=True)):
        assert one.label is not None
        found = [of_run[i] for of_run in predictions]
        rows.append(
            SegmentedSlice(
                title=dataset.describe_record(record),
                image=one.image[..., 0],
                reference=one.label,
                predictions=found,
                dice=[slice_dice(p, one.label, len(dataset.classes)) for p in found],
                marks=[_SEEN * (name in split.train) for split in splits],
                pixel_aspect=float(one.spacing[0] / one.spacing[1]),
            )
        )
    seen = any(row.marks and _SEEN in row.marks for row in rows)
    footnote = f"{_SEEN} trained on this volume" if seen else ""
    return draw_segmentations(rows, name_runs(workdirs), dataset.classes, footnote=footnote)


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
        raise UserError(f"{dataset.directory}: no labels in the volumes {', '.join(unlabelled)}")
    if slices is None:
        return [largest_foreground(dataset, volume) for volume in volumes]
    if len(slices) != len(volumes):
        raise UserError(f"{len(slices)} slices of {len(volumes)} volumes; expected one of each")
    return [find_record(dataset, *chosen) for chosen in zip(volumes, slices, strict=True)]


def _check_dataset(
    dataset: SliceDataset, workdir: str | os.PathLike[str], predictor: Predictor
) -> None:
    config = predictor.config
    check_run_dataset(workdir, config, dataset)
    if config.model.num_classes != len(dataset.classes):
        raise UserError(
            f"{workdir}: a run of {config.model.num_classes} classes; "
            f"{dataset.directory} has {len(dataset.classes)}"
        )


def _held_out(splits: Sequence[Split], dataset: SliceDataset) -> list[str]:
    names = [v for v in dataset.volumes if all(v in split.validation for split in splits)]
    if not names:
        raise UserError(
            f"no volume is for validation in the folds of all {len(splits)} runs; expected --volume"
        )
    return names
