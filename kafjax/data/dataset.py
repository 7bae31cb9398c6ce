"""A prepared dataset's slices: decoded, normalised, by volume.

Layout is NHWC; keypoints are (row, col) in pixels, and their mask marks the real ones. Images are
normalised, (x - mean) / std of their volume, each channel by itself. With a context of n slices
the channels of up to n slices on either side follow those of the slice itself.
"""

import copy
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kafjax.cores import usable_cores
from kafjax.data.dataset_files import find_dataset, make_decoder, open_builder
from kafjax.data.records import RecordReader
from kafjax.errors import UserError
from kafjax.labels import IGNORED, STORED


@dataclass(frozen=True)
class Slice:
    """One decoded slice: image float32 [h, w, c] normalised, keypoints int32 [k, 2], mask [k].

    `correspondences` int [2 * reach, k] has a row for each neighbour offset -reach..-1, 1..reach.
    `spacing` is float32 [3] mm between rows, columns and slices. `label` is int32 [h, w], `IGNORED`
    where nobody annotated, or None if not requested.
    """

    image: np.ndarray
    keypoints: np.ndarray
    mask: np.ndarray
    correspondences: np.ndarray
    index: int
    num_slices: int
    spacing: np.ndarray
    label: np.ndarray | None


class SliceDataset:
    """A prepared dataset: its metadata, the record numbers of each volume's slices, its slices.

    `volumes` maps volume names, sorted, to ranges of global record numbers in slice order.
    `context` is the number of slices on either side whose channels `read` adds.
    """

    context = 0

    def __init__(self, directory: Path):
        self.directory = directory
        builder = open_builder(directory)  # once: it takes a second for ten thousand volumes
        self.metadata: dict[str, Any] = dict(builder.info.metadata or {})
        self.reader = RecordReader(directory, builder)
        self.volumes: Mapping[str, range] = self.reader.splits
        self.classes = tuple(self.metadata["classes"])
        self._contents: dict[str, str] | None = None
        # Inflating the label takes a third of a record's time, and pretraining does not need it.
        self._decode = make_decoder(builder, without=("label",))
        self._decode_labelled = make_decoder(builder)
        self._foreground: dict[int, tuple[int, ...]] = {}

    @property
    def num_channels(self) -> int:
        """The number of a slice's channels, with those of its context."""
        return count_channels(self.metadata, self.context)

    def with_context(self, context: int) -> "SliceDataset":
        """The same dataset, whose slices are read with another context."""
        other = copy.copy(self)
        other.context = context
        return other

    def contents(self) -> dict[str, str]:
        """A digest of each volume's records, by name; computed once."""
        if self._contents is None:
            self._contents = self.reader.digests()
        return self._contents

    def identity(self) -> dict[str, str]:
        """The dataset's name, kind and version, for messages."""
        return {
            "name": self.directory.parent.name,
            "kind": str(self.metadata.get("kind", "")),
            "version": self.directory.name,
        }

    def volume_of(self, record: int) -> str:
        """The name of a record's volume."""
        return self.reader.split_of(record)

    def describe_record(self, record: int) -> str:
        """A record's volume and its slice, counted from 0, for messages."""
        name = self.volume_of(record)
        return f"{name} slice {record - self.volumes[name].start}"

    def foreground(self, record: int) -> tuple[int, ...]:
        """The foreground classes in a slice's label; each label is read once."""
        if record not in self._foreground:
            label = self._read_alone(record, with_label=True).label
            assert label is not None
            self._foreground[record] = tuple(np.unique(label[label > 0]).tolist())
        return self._foreground[record]

    def read(self, record: int, *, with_label: bool = False) -> Slice:
        """Reads one slice, with its context; raises `RecordError` if one of them is damaged."""
        alone = self._read_alone(record, with_label=with_label)
        if not self.context:
            return alone
        first = record - alone.index
        images = [
            alone.image if i == alone.index else self._read_alone(first + i).image
            for i in slices_of_context(alone.index, alone.num_slices, self.context)
        ]
        return replace(alone, image=np.concatenate(images, axis=-1))

    def _read_alone(self, record: int, *, with_label: bool = False) -> Slice:
        features = (self._decode_labelled if with_label else self._decode)(self.reader[record])
        keypoints = features["keypoints"].astype(np.int32)
        image = np.subtract(features["image"], features["mean"], dtype=np.float32)
        image /= np.float32(features["std"])
        label = features["label"][..., 0].astype(np.int32) if with_label else None
        if label is not None and self.metadata.get("sparse_labels"):
            label[label == STORED] = IGNORED
        return Slice(
            image=image,
            keypoints=keypoints,
            mask=np.arange(len(keypoints)) < features["num_keypoints"],
            correspondences=features["correspondences"],
            index=features["slice_index"],
            num_slices=features["num_slices"],
            spacing=features["spacing"],
            label=label,
        )

    def read_volume(self, name: str) -> list[Slice]:
        """All slices of a volume with their labels, read in threads."""
        with ThreadPoolExecutor(len(usable_cores())) as threads:  # inflating lets other threads run
            read = partial(self._read_alone, with_label=True)
            slices = list(threads.map(read, self.volumes[name]))
        images = add_context([one.image for one in slices], self.context)
        return [replace(one, image=image) for one, image in zip(slices, images, strict=True)]


def count_channels(metadata: Mapping[str, Any], context: int) -> int:
    """The number of channels that a network sees of a prepared dataset's slices."""
    return len(metadata.get("channels", [0])) * (1 + 2 * context)


def slices_of_context(index: int, num_slices: int, context: int) -> list[int]:
    """The slices whose channels a network sees of a slice: itself, then its neighbours in pairs.

    The nearest come first. Beyond the volume's ends its outermost slices are repeated.
    """
    offsets = [0, *(o for distance in range(1, context + 1) for o in (-distance, distance))]
    return [min(max(index + offset, 0), num_slices - 1) for offset in offsets]


def add_context(images: Sequence[np.ndarray], context: int) -> list[np.ndarray]:
    """The images [h, w, c] of all slices of a volume with the channels of their context."""
    if not context:
        return list(images)
    return [
        np.concatenate([images[k] for k in slices_of_context(i, len(images), context)], axis=-1)
        for i in range(len(images))
    ]


def context_of(config: Mapping[str, Any]) -> int:
    """The slices on either side that a run's network sees; runs of older versions saw none."""
    return config["data"].get("context") or 0


def facts_of_run(config: Mapping[str, Any]) -> dict[str, int]:
    """What a run's config says about its dataset, for `check_facts`."""
    seen = config["model"].get("num_channels") or 1
    facts = {
        "max_keypoints": config["data"]["max_keypoints"],
        "num_channels": seen // (1 + 2 * context_of(config)),
    }
    if config["task"] == "segment":  # pretraining sees no labels
        facts["num_regions"] = config["model"].get("num_regions") or 0
    return facts


def open_dataset(data_dir: str | os.PathLike[str], name: str) -> SliceDataset:
    """Opens the newest prepared version of DATA_DIR/NAME.

    If there is none, raises `ValueError` with the command that prepares the dataset.
    """
    return SliceDataset(find_dataset(data_dir, name))


def check_facts(dataset: SliceDataset, expected: Mapping[str, Any]) -> None:
    """Raises `ValueError` listing every fact that the metadata contradicts or lacks.

    `expected` maps metadata names, such as `max_keypoints` and `radius`, or `num_channels` and
    `num_regions`, to the config's values.
    """
    facts = {
        **dataset.metadata,
        "num_channels": count_channels(dataset.metadata, context=0),
        "num_regions": len(dataset.metadata.get("regions", ())),
    }
    wrong = [
        f"  {name}: the dataset has {facts.get(name, 'no such fact')}, the config says {value}"
        for name, value in expected.items()
        if name not in facts or facts[name] != value
    ]
    if wrong:
        raise UserError(
            f"{dataset.directory} was not prepared as the config expects:\n" + "\n".join(wrong)
        )


def select_volumes(dataset: SliceDataset, volumes: Sequence[str] | None = None) -> tuple[str, ...]:
    """The named volumes (all by default), sorted by name.

    Raises `ValueError` for unknown or repeated names.
    """
    names = sorted(dataset.volumes if volumes is None else volumes)
    unknown = [name for name in names if name not in dataset.volumes]
    if unknown or not names:
        raise UserError(
            f"{dataset.directory} has no volume {', '.join(unknown) or 'selected'}; "
            f"it has {', '.join(dataset.volumes)}"
        )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"volumes named twice: {', '.join(twice)}")
    return tuple(names)


def labelled_volumes(dataset: SliceDataset) -> tuple[str, ...]:
    """The volumes that have labels, in order of name."""
    facts = dataset.metadata["volumes"]
    return tuple(name for name in select_volumes(dataset) if facts[name]["labelled"])


def records_of(
    dataset: SliceDataset, volumes: Sequence[str] | None = None, *, annotated: bool | None = None
) -> list[int]:
    """Global record numbers of volumes' slices, in order of volume and slice.

    Args:
      dataset: contains the volumes.
      volumes: names, all by default.
      annotated: only slices with annotated pixels, or only those without.

    Raises:
      ValueError: unknown or repeated names.
    """
    found: list[int] = []
    for name in select_volumes(dataset, volumes):
        records, facts = dataset.volumes[name], dataset.metadata["volumes"][name]
        known = {records[i] for i in facts.get("annotated", range(len(records)))}
        found += [r for r in records if annotated is None or (r in known) == annotated]
    return found


def volumes_for_test(dataset: SliceDataset) -> tuple[str, ...]:
    """The volumes of the test set, in order of name, with labels or without."""
    facts = dataset.metadata["volumes"]
    return tuple(name for name in select_volumes(dataset) if facts[name].get("test"))


def neighbour_reach(dataset: SliceDataset, record: int) -> int:
    """The largest distance, in slices, to a slice's neighbour, from its volume's preparation."""
    reach: int = dataset.metadata["volumes"][dataset.volume_of(record)]["reach"]
    return reach
