"""Chooses a figure's dataset, volumes and slices, and makes pairs of slices as training does.

Slices are counted from 0; keypoints are (row, col) in pixels. Mistakes raise `ValueError`s that
list the choices.
"""

import itertools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kafjax.augment import AugmentConfig, augment_pair
from kafjax.data.dataset import (
    SliceDataset,
    check_facts,
    facts_of_run,
    neighbour_reach,
    open_dataset,
    select_volumes,
)
from kafjax.data.dataset_files import prepared_names
from kafjax.data.patches import PatchSize
from kafjax.data.samples import Batch, draw_neighbour, make_pair
from kafjax.drawing.figures import Pair
from kafjax.errors import UserError
from kafjax.tasks.base import sample_keys

_augment_pair = jax.jit(augment_pair, static_argnames=("mode", "config"))


def open_only_dataset(data_dir: str | os.PathLike[str], name: str | None = None) -> SliceDataset:
    """Opens DATA_DIR/NAME or, without a name, the folder's only prepared dataset."""
    if name is not None:
        return open_dataset(data_dir, name)
    names = prepared_names(data_dir)
    if len(names) != 1:
        found = f"has the datasets {', '.join(names)}" if names else "has no prepared dataset"
        raise UserError(f"{data_dir}: {found}; expected one, or its name as --dataset")
    return open_dataset(data_dir, names[0])


def check_run_dataset(workdir: str | os.PathLike[str], config: Any, dataset: SliceDataset) -> None:
    """Raises `ValueError` if a run's dataset is another one, or prepared differently."""
    name = dataset.directory.parent.name
    if config.data.name != name:
        raise UserError(f"{workdir}: a run on the dataset {config.data.name}; expected {name}")
    check_facts(dataset, facts_of_run(config))


def find_record(dataset: SliceDataset, volume: str, index: int) -> int:
    """The record number of a volume's slice."""
    select_volumes(dataset, [volume])
    records = dataset.volumes[volume]
    if not 0 <= index < len(records):
        raise UserError(f"{volume} has the slices 0 to {len(records) - 1}; found --slice {index}")
    return records[index]


def largest_foreground(dataset: SliceDataset, volume: str) -> int:
    """The record of a volume's slice with the most labelled pixels, the first of equals."""
    labels = [one.label for one in dataset.read_volume(volume)]
    counts = [0 if label is None else int(np.count_nonzero(label)) for label in labels]
    return dataset.volumes[volume][int(np.argmax(counts))]


def choose_offset(dataset: SliceDataset, record: int, offset: int | None = None) -> int:
    """The offset of a slice's neighbour: as given, else the next slice, else the previous one."""
    records = dataset.volumes[dataset.volume_of(record)]
    reach = neighbour_reach(dataset, record)
    near = (1, -1, *range(-reach, reach + 1))
    possible = [o for o in near if o and abs(o) <= reach and record + o in records]
    if not possible:
        raise UserError(f"{dataset.describe_record(record)} has no neighbour in its volume")
    if offset is not None and offset not in possible:
        raise UserError(
            f"{dataset.describe_record(record)} has no neighbour at offset {offset}; expected "
            f"{', '.join(map(str, sorted(set(possible))))}"
        )
    return possible[0] if offset is None else offset


def make_chosen_pair(
    dataset: SliceDataset, record: int, offset: int, *, patch_size: PatchSize, seed: int
) -> Batch:
    """A seed's first pretraining sample that pairs a slice with its neighbour at an offset.

    Fields as in `kafjax.data.samples.make_pair`.
    """
    records = dataset.volumes[dataset.volume_of(record)]
    reach, index = neighbour_reach(dataset, record), record - records.start
    sample = next(
        number
        for number in itertools.count()
        if draw_neighbour(np.random.default_rng((seed, number)), index, len(records), reach)
        == index + offset
    )
    return make_pair(dataset, sample, record, patch_size=patch_size, seed=seed)


def augment_sample(sample: Batch, *, mode: str, config: AugmentConfig) -> Batch:
    """A pretraining sample after augmentation, with the key that training would use."""
    key = sample_keys({name: jnp.asarray(sample[name])[None] for name in ("seed", "sample")})[0]
    fields = ("image", "keypoints", "keypoint_mask")
    views = [tuple(sample[field][i] for field in fields) for i in range(2)]
    *moved, correspondence = _augment_pair(
        key, *views, sample["correspondence"], mode=mode, config=config
    )
    stacked = {field: np.stack(both) for field, *both in zip(fields, *moved, strict=True)}
    return {**sample, **stacked, "correspondence": np.asarray(correspondence)}


def as_pair(sample: Batch) -> Pair:
    """A pretraining sample as a `Pair` to draw."""
    keypoints, masks = list(sample["keypoints"]), list(sample["keypoint_mask"])
    return Pair(sample["image"][..., 0], keypoints, masks, sample["correspondence"])
