"""The pictures of a report: predictions of a few slices, and what the runs wrote to TensorBoard.

Pictures are uint8 [h, w, 3], slices [h, w]. Of the volumes that a run was evaluated on, the one
with the lowest and the one with the highest mean Dice are shown, each by the slice with the most
labelled pixels.
"""

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError
from tensorboardX.proto.event_pb2 import Event

from kafjax.data.input_pipeline import Slice, SliceDataset, check_facts, open_dataset
from kafjax.drawing.overlay import class_colours, draw_labels, grey
from kafjax.inference.predictor import load_predictor
from kafjax.report.html import Element, element, note, number, picture, swatch
from kafjax.report.runs import Fields, Run, mean_dice
from kafjax.segmentation_metrics import count_pixels, mean_pooled_dice
from kafjax.workdir.scores import SPLITS
from kafjax.workdir.workdir import Workdir

_PNG = b"\x89PNG\r\n\x1a\n"


class Sample(NamedTuple):
    """A labelled slice of a volume; `place` counts from 0."""

    volume: str
    place: int
    slice: Slice

    @property
    def label(self) -> np.ndarray:
        """Class numbers, uint8 [h, w]."""
        assert self.slice.label is not None
        return self.slice.label.astype(np.uint8)


class Prediction(NamedTuple):
    """Class numbers, uint8 [h, w], and Dice, the mean over classes; None where there are none."""

    label: np.ndarray
    dice: float | None


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
        except (ValueError, OSError) as error:
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


def read_sample(dataset: SliceDataset, volume: str) -> Sample:
    """The volume's slice with the most labelled pixels, the first of equals."""
    records = dataset.volumes[volume]
    slices = (dataset.read(record, with_label=True) for record in records)
    sizes = [0 if s.label is None else np.count_nonzero(s.label) for s in slices]
    place = max(range(len(sizes)), key=lambda i: sizes[i])
    return Sample(volume, place, dataset.read(records[place], with_label=True))


def predict_samples(
    workdir: str | os.PathLike[str],
    samples: Sequence[Sample],
    *,
    num_classes: int,
    step: int | None = None,
) -> list[Prediction]:
    """Predicts slices by a run, as it was at `step`, by default its best.

    Raises:
      ValueError: the run has no such checkpoint, or a damaged one.
    """
    predictor = load_predictor(workdir, step=step)
    views = [(s.slice.image, s.slice.keypoints, s.slice.mask) for s in samples]
    labels = [p.argmax(axis=-1).astype(np.uint8) for p in predictor.probabilities(views)]
    return [
        Prediction(label, _mean_dice(label, sample.label, num_classes))
        for label, sample in zip(labels, samples, strict=True)
    ]


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
    samples = [read_sample(dataset, v) for v in volumes if v in dataset.volumes]
    shown: dict[str, dict[str, Prediction]] = {}
    faults = [note(f"{v}: not in {dataset.directory}") for v in volumes if v not in dataset.volumes]
    for run, of_run in zip(runs, scores, strict=True):
        own = [sample for sample in samples if sample.volume in of_run]
        print(f"Segmenting {len(own)} slices by {run.name}", flush=True)
        try:
            check_facts(dataset, {"max_keypoints": run.config["data"]["max_keypoints"]})
            step = _evaluation(run).get("step")
            found = predict_samples(run.workdir, own, num_classes=len(dataset.classes), step=step)
        except (ValueError, OSError) as error:
            faults.append(note(f"{run.name}: {error}"))
            continue
        shown[run.name] = {s.volume: p for s, p in zip(own, found, strict=True)}
    explained = note(
        f"{name}: of each run the volume with the lowest and the one with the highest mean Dice, "
        f"{len(samples)} in all, each by its slice with the most labelled pixels; below a "
        "prediction, that slice's Dice, mean over classes."
    )
    rows = [part for sample in samples for part in _show_sample(sample, shown)]
    return [explained, _class_legend(dataset.classes), *rows, *faults]


def _show_sample(sample: Sample, shown: Mapping[str, Mapping[str, Prediction]]) -> list[Element]:
    place = f"{sample.volume}, slice {sample.place + 1} of {sample.slice.num_slices}"
    image = sample.slice.image[..., 0]
    figures = [
        picture(grey(image), f"{place}: image", "image"),
        picture(draw_labels(image, sample.label), f"{place}: reference labels", "reference"),
    ]
    for run, predictions in shown.items():
        if sample.volume not in predictions:
            continue  # not among the run's evaluated volumes; it may have trained on it
        found = predictions[sample.volume]
        told = f"{run}: Dice {number(found.dice, 3) or '-'}"
        drawn = draw_labels(image, found.label)
        figures.append(picture(drawn, f"{place}: prediction of {told}", told))
    return [element("h3", place), element("div", *figures, class_="pictures pixels")]


def _class_legend(classes: Sequence[str]) -> Element:
    colours = [f"#{bytes(colour).hex()}" for colour in class_colours(len(classes))]
    entries = [swatch(*entry) for entry in zip(colours[1:], classes[1:], strict=True)]
    return element("ul", *entries, class_="legend")


def _evaluation(run: Run) -> Fields:
    """Of the first split that is evaluated, which is validation if that is."""
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
                raise ValueError(f"{path}: damaged ({error})") from None


def _mean_dice(prediction: np.ndarray, label: np.ndarray, num_classes: int) -> float | None:
    dice = mean_pooled_dice(np.asarray(count_pixels(prediction, label, num_classes)))
    return None if np.isnan(dice) else dice
