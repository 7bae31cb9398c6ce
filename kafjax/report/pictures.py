"""The pictures of a report: predictions of a few slices, and what the runs wrote to TensorBoard.

Pictures are uint8 [h, w, 3], slices [h, w]. Of the volumes that a run was evaluated on, the one
with the lowest and the one with the highest mean Dice are shown, each by the slice with the most
labelled pixels.
"""

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from tensorboardX.proto.event_pb2 import Event

from kafjax.data.dataset import Slice, SliceDataset, check_facts, facts_of_run, open_dataset
from kafjax.drawing.overlay import class_colours
from kafjax.drawing.segmentations import SegmentedSlice
from kafjax.errors import UserError
from kafjax.figures.choice import largest_foreground
from kafjax.inference.predictor import load_predictor
from kafjax.regions import most_probable
from kafjax.report.html import Element, element, figure, legend, note
from kafjax.report.runs import Fields, Run, mean_dice
from kafjax.segmentation_metrics import slice_dice
from kafjax.workdir.scores import SPLITS
from kafjax.workdir.workdir import Workdir

_PNG = b"\x89PNG\r\n\x1a\n"


def show_samples(
    runs: Sequence[Run], *, data_dir: str | os.PathLike[str] | None = None, most: int
) -> list[Element]:
    """Image, reference and each run's prediction, dataset by dataset, or why there is none.

    Args:
      runs: of any task; those that segment are shown.
      data_dir: where the datasets are, if not where the runs had them.
      most: how many slices of each dataset; 0 for none.
    """
    segmenting = [run for run in runs if run.task == "segment"]
    if not segmenting or not most:
        return [note("No run of this page segments." if most else "Left out, as asked for.")]
    parts = [
        note(f"{run.name}: not evaluated yet, which chooses the slices.")
        for run in segmenting
        if not run.evaluations
    ]
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in segmenting:
        if run.evaluations:
            place = (str(data_dir or run.config["data"]["dir"]), run.config["data"]["name"])
            groups.setdefault(place, []).append(run)
    for (folder, name), group in groups.items():
        try:
            parts += _show_dataset(open_dataset(folder, name), name, group, most)
        except (UserError, OSError) as error:
            parts.append(note(f"{name}: the dataset is not at hand, so no slices: {error}"))
    return parts


def choose_volumes(scores: Sequence[Mapping[str, float]], *, most: int) -> list[str]:
    """The worst and the best volume of each run, each once, the worst of all runs first.

    Args:
      scores: for each run the mean Dice of its volumes.
      most: how many in all.
    """
    ranked = [sorted(of_run, key=lambda name: (of_run[name], name)) for of_run in scores if of_run]
    chosen = [names[0] for names in ranked] + [names[-1] for names in ranked]
    return list(dict.fromkeys(chosen))[:most]


def predict_slices(
    workdir: str | os.PathLike[str],
    dataset: SliceDataset,
    records: Sequence[int],
    *,
    step: int | None = None,
) -> list[np.ndarray]:
    """The class numbers, int [h, w], that a run as it was at `step` (its best) predicts.

    Raises:
      ValueError: the run has no such checkpoint, or a damaged one.
    """
    predictor = load_predictor(workdir, step=step)
    found = predictor.probabilities(predictor.views(dataset, records))
    return [most_probable(probabilities, dataset.metadata) for probabilities in found]


def read_board(workdir: str | os.PathLike[str]) -> dict[str, tuple[int, bytes]]:
    """The newest picture of each name that a run wrote to TensorBoard: its step, and a PNG.

    Raises `ValueError` where a file is damaged.
    """
    found: dict[str, tuple[int, bytes]] = {}
    # In order of start, so that what a resumed run wrote again replaces what was there.
    for path in sorted(Workdir(workdir).tensorboard.glob("events.out.tfevents.*")):
        for event in _read_events(path):
            for value in event.summary.value:
                data = value.image.encoded_image_string
                if data.startswith(_PNG) and event.step >= found.get(value.tag, (0,))[0]:
                    found[value.tag] = (event.step, data)
    return dict(sorted(found.items()))


def _show_dataset(
    dataset: SliceDataset, name: str, runs: Sequence[Run], most: int
) -> list[Element]:
    scores = [mean_dice(_evaluation(run)) for run in runs]
    volumes = choose_volumes(scores, most=most)
    faults = [note(f"{v}: not in {dataset.directory}") for v in volumes if v not in dataset.volumes]
    records = {v: largest_foreground(dataset, v) for v in volumes if v in dataset.volumes}
    slices = {v: dataset.read(record, with_label=True) for v, record in records.items()}
    predicted: dict[str, dict[str, np.ndarray]] = {volume: {} for volume in slices}
    for run, of_run in zip(runs, scores, strict=True):
        own = [volume for volume in slices if volume in of_run]
        print(f"Segmenting {len(own)} slices by {run.name}", flush=True)
        try:
            check_facts(dataset, facts_of_run(run.config))
            step = _evaluation(run).get("step")
            shown = [records[volume] for volume in own]
            found = predict_slices(run.workdir, dataset, shown, step=step)
        except (UserError, OSError) as error:
            faults.append(note(f"{run.name}: {error}"))
            continue
        # A run has no prediction of other volumes: it may have trained on them.
        for volume, label in zip(own, found, strict=True):
            predicted[volume][run.name] = label
    explained = note(
        f"{name}: of each run the volume with the lowest and the one with the highest mean Dice, "
        f"{len(slices)} in all, each by its slice with the most labelled pixels; below a "
        "prediction, that slice's Dice, mean over classes."
    )
    rows = [
        part
        for volume, one in slices.items()
        for part in _show_slice(dataset, records[volume], one, predicted[volume])
    ]
    return [explained, _class_legend(dataset.classes), *rows, *faults]


def _show_slice(
    dataset: SliceDataset, record: int, one: Slice, predicted: Mapping[str, np.ndarray]
) -> list[Element]:
    assert one.label is not None
    num_classes = len(dataset.classes)
    drawn = SegmentedSlice(
        title=dataset.describe_record(record),
        image=one.image[..., 0],
        reference=one.label,
        predictions=list(predicted.values()),
        dice=[slice_dice(label, one.label, num_classes) for label in predicted.values()],
    )
    names = ["image", "reference", *(f"{run}: " for run in predicted)]
    figures = []
    for name, (picture, dice) in zip(names, drawn.panels(), strict=True):
        what = f"prediction of {name}{dice}" if dice else name
        figures.append(figure(picture, f"{drawn.title}: {what}", name + dice))
    return [element("h3", drawn.title), element("div", *figures, class_="pictures pixels")]


def _class_legend(classes: Sequence[str]) -> Element:
    colours = [f"#{bytes(colour).hex()}" for colour in class_colours(len(classes))]
    swatches = [element("i", style=f"background:{c}", class_="swatch") for c in colours]
    return legend(list(zip(swatches, classes, strict=True))[1:])


def _evaluation(run: Run) -> Fields:
    """The evaluation of the first evaluated split: validation if available."""
    return next(run.evaluations[split] for split in SPLITS if split in run.evaluations)


def _read_events(path: Path) -> Iterator[Any]:
    """The events of a file, up to one that a killed run left unfinished."""
    with path.open("rb") as stream:
        # A TFRecord: length uint64, its checksum, that many bytes, their checksum.
        while len(head := stream.read(12)) == 12:
            (length,) = struct.unpack("<Q", head[:8])
            body = stream.read(length + 4)
            if len(body) < length + 4:
                return
            try:
                yield Event.FromString(body[:length])
            except DecodeError as error:
                raise UserError(f"{path}: damaged ({error})") from None
