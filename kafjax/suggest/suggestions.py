"""The volumes to label next, by a pretraining run or by segmentation runs.

Before there are labels, the subjects whose volumes are typical of many others and different from
each other: the medoids of embeddings. After, the volumes that segmentation runs are least sure of.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tqdm
from matplotlib.figure import Figure

from kafjax.data.dataset import SliceDataset, labelled_volumes, open_dataset, volumes_for_test
from kafjax.data.splits import group_subjects
from kafjax.drawing.figures import save_figure
from kafjax.errors import UserError
from kafjax.figures.choice import check_run_dataset
from kafjax.files import csv_text, write_text
from kafjax.inference.predictor import Predictor, load_predictor, views_of_each
from kafjax.inference.uncertainty import Meter, check_exclusive, mean_of_classes
from kafjax.paths import expand
from kafjax.suggest.embeddings import embed_volumes, normalise
from kafjax.suggest.medoids import k_medoids
from kafjax.suggest.pictures import UncertainSlice, draw_typical, draw_uncertain
from kafjax.workdir.split import open_split
from kafjax.workdir.workdir import Workdir

STEM = "suggestions"


class Typical(NamedTuple):
    """A suggested subject.

    Attributes:
      subject: its name.
      volumes: the names of its volumes.
      stands_for: how many subjects are nearest to it, itself included.
      distance: their mean cosine distance from it.
    """

    subject: str
    volumes: tuple[str, ...]
    stands_for: int
    distance: float


class Uncertain(NamedTuple):
    """A suggested volume: its name and `kafjax.inference.uncertainty.mean_of_classes`."""

    volume: str
    entropy: float


def suggest(
    workdirs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    number: int,
    data_dir: str | os.PathLike[str] | None = None,
    ignore_labels: bool = False,
) -> list[Typical] | list[Uncertain]:
    """Suggests what to label, prints it, and writes a table and pictures.

    Args:
      workdirs: a pretraining run, or segmentation runs on the same dataset.
      output: folder of `suggestions.csv` and `suggestions.png`.
      number: of suggestions.
      data_dir: folder of the dataset, if it has moved since the runs.
      ignore_labels: suggest among all volumes, as if none had labels.

    Raises:
      UserError: no such runs, or fewer volumes than suggestions.
    """
    if number < 1:
        raise UserError(f"number is {number}; expected 1 or more")
    folders = [Workdir(workdir) for workdir in workdirs]
    configs = [folder.read_config() for folder in folders]
    tasks = sorted({config["task"] for config in configs})
    if tasks != ["segment"] and len(folders) > 1:
        raise UserError(
            f"found {len(folders)} runs of the tasks {', '.join(tasks)}; expected one pretraining "
            "run, or segmentation runs"
        )
    data = configs[0]["data"]
    dataset = open_dataset(data_dir or data["dir"], data["name"])
    target = expand(output)
    if tasks == ["segment"]:
        uncertain, shown = suggest_uncertain(folders, dataset, number=number)
        text, figure = describe_uncertain(uncertain), draw_uncertain(shown, dataset.classes)
        _write(uncertain, figure, target)
        print(text)
        return uncertain
    typical = suggest_typical(folders[0], dataset, number=number, ignore_labels=ignore_labels)
    _write(typical, draw_typical(dataset, [found.volumes[0] for found in typical]), target)
    print(describe_typical(typical))
    return typical


def suggest_typical(
    workdir: Workdir,
    dataset: SliceDataset,
    *,
    number: int,
    ignore_labels: bool = False,
    among: Sequence[str] | None = None,
) -> list[Typical]:
    """The medoids of subjects, those that stand for most first.

    A subject's embedding is the mean of its volumes'. Labelled subjects are medoids already, so
    that the suggested ones represent what those do not.

    Args:
      workdir: of a run of any task.
      dataset: where its volumes are.
      number: of subjects.
      ignore_labels: as if no volume had labels.
      among: names of the volumes to represent; by default those that the run trained on.

    Raises:
      UserError: fewer unlabelled subjects than `number`, or another dataset than the run's.
    """
    volumes = tuple(open_split(workdir, dataset).train) if among is None else tuple(among)
    metadata = dataset.metadata
    subject = group_subjects(volumes, metadata.get("equal_images", ()), metadata.get("subjects"))
    names = list(dict.fromkeys(subject[volume] for volume in volumes))
    labelled = set() if ignore_labels else set(labelled_volumes(dataset)) & set(volumes)
    fixed = [i for i, name in enumerate(names) if any(subject[v] == name for v in labelled)]
    if number > len(names) - len(fixed):
        raise UserError(
            f"{len(names) - len(fixed)} of {len(names)} subjects have no labels, fewer than the "
            f"{number} to suggest; expected fewer, or --ignore_labels to choose among all"
        )
    of_volume = dict(zip(volumes, embed_volumes(workdir.path, dataset, volumes), strict=True))
    of = {name: tuple(v for v in volumes if subject[v] == name) for name in names}
    embeddings = normalise(np.stack([np.mean([of_volume[v] for v in of[n]], 0) for n in names]))
    distances = np.clip(1 - embeddings.astype(np.float64) @ embeddings.T, 0, None)
    medoids = k_medoids(distances, number, fixed=fixed)
    found = []
    for place, index in list(enumerate(medoids.indices))[len(fixed) :]:
        own = distances[medoids.nearest == place, index]
        mean = float(own.mean()) if own.size else 0.0
        found.append(Typical(names[index], of[names[index]], own.size, mean))
    return sorted(found, key=lambda typical: -typical.stands_for)


def suggest_uncertain(
    workdirs: Sequence[Workdir], dataset: SliceDataset, *, number: int
) -> tuple[list[Uncertain], list[UncertainSlice]]:
    """The volumes with the highest mean entropy of their classes, and a picture of each.

    Candidates are the volumes, except those of the test set, that no run trained or validated on.
    Probabilities are averaged over the runs.

    Raises:
      UserError: fewer candidates than `number`, runs on another dataset, or one with regions.
    """
    check_exclusive(dataset.metadata, "a suggestion by entropy")
    splits = [open_split(workdir, dataset) for workdir in workdirs]
    used = {name for split in splits for side in split.names for name in side}
    used |= set(volumes_for_test(dataset))
    left = [name for name in dataset.volumes if name not in used]
    if number > len(left):
        raise UserError(
            f"{len(left)} volumes that the runs did not train or validate on, fewer than the "
            f"{number} to suggest; expected fewer"
        )
    predictors = [load_predictor(workdir.path) for workdir in workdirs]
    for workdir, predictor in zip(workdirs, predictors, strict=True):
        check_run_dataset(workdir.path, predictor.config, dataset)
    found = [
        _measure(dataset, name, predictors) for name in tqdm.tqdm(left, unit="volume", disable=None)
    ]
    found.sort(key=lambda pair: -pair[0].entropy)
    return [pair[0] for pair in found[:number]], [pair[1] for pair in found[:number]]


def _measure(
    dataset: SliceDataset, name: str, predictors: Sequence[Predictor]
) -> tuple[Uncertain, UncertainSlice]:
    """A volume's numbers, and its slice with the largest total entropy."""
    records = dataset.volumes[name]
    seen = zip(predictors, views_of_each(predictors, dataset, records), strict=True)
    streams = zip(*(p.probabilities(views) for p, views in seen), strict=True)
    meter, worst = Meter(len(dataset.classes)), -1.0
    for index, members in enumerate(streams):
        probabilities = np.mean(members, axis=0)
        entropy = meter.add(probabilities)
        if entropy.sum() > worst:
            worst = float(entropy.sum())
            found = index, probabilities.argmax(axis=-1), entropy
    index, classes, entropy = found
    one = dataset.read(records[index])
    shown = UncertainSlice(
        f"{name} slice {index}",
        one.image[..., 0],
        classes,
        entropy,
        float(one.spacing[0] / one.spacing[1]),
    )
    return Uncertain(name, mean_of_classes(meter.numbers())), shown


def describe_typical(found: Sequence[Typical]) -> str:
    """A line for each suggestion."""
    width = max(len(one.subject) for one in found)
    return "\n".join(
        f"{rank}  {one.subject:<{width}}  nearest to {one.stands_for} subjects, at a mean distance "
        f"of {one.distance:.3g}: {', '.join(one.volumes)}"
        for rank, one in enumerate(found, start=1)
    )


def describe_uncertain(found: Sequence[Uncertain]) -> str:
    """A line for each suggestion."""
    width = max(len(one.volume) for one in found)
    return "\n".join(
        f"{rank}  {one.volume:<{width}}  entropy {one.entropy:.3f}"
        for rank, one in enumerate(found, start=1)
    )


def _write(found: Sequence[Any], figure: Figure, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [[rank, *map(_cell, one)] for rank, one in enumerate(found, start=1)]
    write_text(folder / f"{STEM}.csv", csv_text([["rank", *found[0]._fields], *rows]))
    save_figure(figure, folder / f"{STEM}.png")


def _cell(value: Any) -> Any:
    return " ".join(value) if isinstance(value, tuple) else value
