"""Host batches of NumPy arrays from a prepared dataset, resumable from one integer.

Layout is NHWC; keypoints are (row, col) in pixels of the patch, and their mask marks the real ones.
Masked keypoints are (0, 0). Images are normalised, (x - mean) / std of their volume, and zero
outside the slice; augmentation runs on the device.

Training samples are numbered through an endless stream: sample `step * batch_size + place` is at
that place of that step's global batch, and everything random about it depends only on the seed and
that number. So batches depend neither on threads nor on the number of processes, each of which
makes its contiguous part of every global batch, and a run resumes from its step number.

Sources: Yang et al., NeurIPS 2023 (KAF), appendix on data; the neighbour rules are the release's.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grain
import numpy as np

from kafjax.cores import usable_cores
from kafjax.data.patches import (
    PatchSize,
    choose_keypoints,
    cut_patch,
    cut_view,
    follow_correspondence,
    keypoints_inside,
    patch_origin,
    patch_origin_around,
)
from kafjax.data.records import RecordReader, find_dataset, load_decoder, open_builder
from kafjax.errors import UserError

Batch = dict[str, np.ndarray]

_ENDLESS = 2**40  # steps


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """Options of batches: `batch_size` is that of the global batch, `patch_size` in pixels (h, w).

    `patch_keypoints` is p, the slots for a patch's keypoints; None keeps the slice's, p = k. A
    process makes the part `process_index` of `process_count` of each global batch, with
    `num_threads` reading threads. In labelled batches at least the fraction `foreground_share` of
    the samples, and at least one if it is not 0, show a pixel of a class other than the background.
    Raises `ValueError` if the processes do not divide the batch.
    """

    batch_size: int
    patch_size: PatchSize
    seed: int
    process_index: int = 0
    process_count: int = 1
    num_threads: int = 16
    patch_keypoints: int | None = None
    foreground_share: float = 0.0

    def needs_foreground(self, sample: int) -> bool:
        """Whether a sample is at one of its batch's last places, reserved for foreground."""
        kept = max(round(self.foreground_share * self.batch_size), self.foreground_share > 0)
        return sample % self.batch_size >= self.batch_size - kept

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.batch_size % self.process_count:
            raise UserError(
                f"batch_size is {self.batch_size}; expected a positive multiple of the "
                f"{self.process_count} processes"
            )


@dataclass(frozen=True)
class Slice:
    """One decoded slice: image float32 [h, w, 1] normalised, keypoints int32 [k, 2], mask [k].

    `correspondences` int [2 * reach, k] has a row for each neighbour offset -reach..-1, 1..reach.
    `spacing` is float32 [3] mm between rows, columns and slices. `label` is int32 [h, w], or None
    if not requested.
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
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.metadata: dict[str, Any] = dict(open_builder(directory).info.metadata or {})
        self.reader = RecordReader(directory)
        self.volumes: Mapping[str, range] = self.reader.splits
        self.classes = tuple(self.metadata["classes"])
        self._contents: dict[str, str] | None = None
        # Inflating the label takes a third of a record's time, and pretraining does not need it.
        self._decode = load_decoder(directory, without=("label",))
        self._decode_labelled = load_decoder(directory)
        self._foreground: dict[int, tuple[int, ...]] = {}

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
        return next(name for name, records in self.volumes.items() if record in records)

    def describe_record(self, record: int) -> str:
        """A record's volume and its slice, counted from 0, for messages."""
        name = self.volume_of(record)
        return f"{name} slice {record - self.volumes[name].start}"

    def foreground(self, record: int) -> tuple[int, ...]:
        """The foreground classes in a slice's label; each label is read once."""
        if record not in self._foreground:
            label = self.read(record, with_label=True).label
            assert label is not None
            self._foreground[record] = tuple(np.unique(label[label > 0]).tolist())
        return self._foreground[record]

    def read(self, record: int, *, with_label: bool = False) -> Slice:
        """Reads one slice; raises `RecordError` if it is damaged."""
        features = (self._decode_labelled if with_label else self._decode)(self.reader[record])
        keypoints = features["keypoints"].astype(np.int32)
        image = np.subtract(features["image"], features["mean"], dtype=np.float32)
        image /= np.float32(features["std"])
        return Slice(
            image=image,
            keypoints=keypoints,
            mask=np.arange(len(keypoints)) < features["num_keypoints"],
            correspondences=features["correspondences"],
            index=features["slice_index"],
            num_slices=features["num_slices"],
            spacing=features["spacing"],
            label=features["label"][..., 0].astype(np.int32) if with_label else None,
        )

    def read_volume(self, name: str) -> list[Slice]:
        """All slices of a volume with their labels, read in threads."""
        with ThreadPoolExecutor(len(usable_cores())) as threads:  # inflating lets other threads run
            return list(threads.map(partial(self.read, with_label=True), self.volumes[name]))


def open_dataset(data_dir: str | Path, name: str) -> SliceDataset:
    """Opens the newest prepared version of DATA_DIR/NAME.

    If there is none, raises `ValueError` with the command that prepares the dataset.
    """
    return SliceDataset(find_dataset(data_dir, name))


def check_facts(dataset: SliceDataset, expected: Mapping[str, Any]) -> None:
    """Raises `ValueError` listing every fact that the metadata contradicts or lacks.

    `expected` maps metadata names, such as `max_keypoints` and `radius`, to the config's values.
    """
    wrong = [
        f"  {name}: the dataset has {dataset.metadata.get(name, 'no such fact')}, "
        f"the config says {value}"
        for name, value in expected.items()
        if name not in dataset.metadata or dataset.metadata[name] != value
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
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"volumes named twice: {', '.join(twice)}")
    return tuple(names)


def labelled_volumes(dataset: SliceDataset) -> tuple[str, ...]:
    """The volumes that have labels, in order of name."""
    facts = dataset.metadata["volumes"]
    return tuple(name for name in select_volumes(dataset) if facts[name]["labelled"])


def volumes_for_test(dataset: SliceDataset) -> tuple[str, ...]:
    """The volumes of the test set, in order of name, with labels or without."""
    facts = dataset.metadata["volumes"]
    return tuple(name for name in select_volumes(dataset) if facts[name].get("test"))


def steps_per_epoch(
    dataset: SliceDataset, batch_size: int, volumes: Sequence[str] | None = None
) -> int:
    """Full global batches in one pass over the volumes; `ValueError` if not even one."""
    num_slices = len(_records(dataset, volumes))
    if not 1 <= batch_size <= num_slices:
        raise UserError(
            f"batch_size is {batch_size}; expected 1 to {num_slices}, the number of slices"
        )
    return num_slices // batch_size


def neighbour_reach(dataset: SliceDataset, record: int) -> int:
    """The largest distance, in slices, to a slice's neighbour, from its volume's preparation."""
    reach: int = dataset.metadata["volumes"][dataset.volume_of(record)]["reach"]
    return reach


def draw_neighbour(rng: np.random.Generator, index: int, num_slices: int, reach: int) -> int:
    """Index of a slice at a uniformly random non-zero offset in -reach..reach, clamped.

    At a volume's border the clamp can return `index` itself.
    """
    offset = int(rng.integers(2 * reach)) - reach
    offset += offset >= 0
    return min(max(index + offset, 0), num_slices - 1)


def make_pair(
    dataset: SliceDataset,
    sample: int,
    record: int,
    *,
    patch_size: PatchSize,
    seed: int,
    patch_keypoints: int | None = None,
) -> Batch:
    """One pretraining sample: the slice `record` and a neighbour, drawn for (seed, sample).

    Returns `image` float32 [2, h, w, 1], `keypoints` int32 [2, p, 2], `keypoint_mask` bool [2, p],
    `correspondence` int32 [p] (view 1's keypoint to view 2's index, or -1), `position` int32 [2]
    (the anchor's number, from 1, and the number of slices), `record` int32 [2], `sample` and `seed`
    uint32. In a slice that is its own neighbour every keypoint corresponds to itself. p is
    `patch_keypoints`, or k.
    """
    rng = np.random.default_rng((seed, sample))
    anchor = dataset.read(record)
    reach = neighbour_reach(dataset, record)
    offset = draw_neighbour(rng, anchor.index, anchor.num_slices, reach) - anchor.index
    neighbour = dataset.read(record + offset) if offset else anchor
    both = (anchor, neighbour)
    origins = [patch_origin(view.image.shape[:2], patch_size, rng) for view in both]
    crops = (
        _crop(dataset, view, origin, patch_size, patch_keypoints, rng)
        for view, origin in zip(both, origins, strict=True)
    )
    views, chosen = zip(*crops, strict=True)
    return {
        **{field: np.stack([view[field] for view in views]) for field in views[0]},
        "correspondence": follow_correspondence(_correspondence(anchor, offset), *chosen),
        "position": np.array([anchor.index + 1, anchor.num_slices], np.int32),
        "record": np.array([record, record + offset], np.int32),
        "sample": np.array(sample % 2**32, np.uint32),
        "seed": np.array(seed % 2**32, np.uint32),
    }


def make_labelled(
    dataset: SliceDataset,
    sample: int,
    record: int,
    *,
    patch_size: PatchSize,
    seed: int | None,
    patch_keypoints: int | None = None,
) -> Batch:
    """One labelled slice, cropped at random for (seed, sample), or centrally if seed is None.

    Returns `image` float32 [h, w, 1], `label` int32 [h, w], `keypoints` int32 [p, 2],
    `keypoint_mask` bool [p], `record` int32, `sample`, `seed` uint32. p is `patch_keypoints`, or k.
    """
    rng = None if seed is None else np.random.default_rng((seed, sample))
    labelled = dataset.read(record, with_label=True)
    assert labelled.label is not None
    origin = patch_origin(labelled.label.shape, patch_size, rng)
    view, _ = _crop(dataset, labelled, origin, patch_size, patch_keypoints, rng)
    return _labelled_sample(view, labelled, origin, patch_size, (sample, record, seed))


def make_foreground(
    dataset: SliceDataset,
    sample: int,
    record: int,
    *,
    records: Sequence[int],
    patch_size: PatchSize,
    seed: int,
    patch_keypoints: int | None = None,
) -> Batch:
    """One labelled slice, cropped at random around a pixel of its foreground, for (seed, sample).

    A slice without foreground is replaced by another of `records`, drawn at random, unless none has
    any. A class is drawn among the slice's, then one of its pixels, as in nnU-Net (Isensee et al.,
    Nature Methods 2021), so that small classes are seen equally often.

    Returns the fields of `make_labelled`.
    """
    rng = np.random.default_rng((seed, sample))
    others = rng.permutation(records)
    record = next((r for r in (record, *others.tolist()) if dataset.foreground(r)), record)
    labelled = dataset.read(record, with_label=True)
    assert labelled.label is not None
    classes = dataset.foreground(record)
    if classes:
        pixels = np.argwhere(labelled.label == rng.choice(classes))
        pixel = pixels[rng.integers(len(pixels))]
        origin = patch_origin_around(pixel, labelled.label.shape, patch_size, rng)
    else:
        origin = patch_origin(labelled.label.shape, patch_size, rng)
    view, _ = _crop(dataset, labelled, origin, patch_size, patch_keypoints, rng)
    return _labelled_sample(view, labelled, origin, patch_size, (sample, record, seed))


def _labelled_sample(
    view: Batch,
    labelled: Slice,
    origin: np.ndarray,
    patch_size: PatchSize,
    numbers: tuple[int, int, int | None],
) -> Batch:
    """The fields of `make_labelled`; `numbers` are the sample, the record and the seed."""
    assert labelled.label is not None
    sample, record, seed = numbers
    return {
        **view,
        "label": cut_patch(labelled.label, origin, patch_size),
        "record": np.array(record, np.int32),
        "sample": np.array(sample % 2**32, np.uint32),
        "seed": np.array((seed or 0) % 2**32, np.uint32),
    }


def pretraining_batches(
    dataset: SliceDataset,
    options: BatchOptions,
    *,
    volumes: Sequence[str] | None = None,
    start_step: int = 0,
) -> grain.DatasetIterator:
    """Endless batches of pairs; each slice of the volumes is the anchor of one pair per epoch.

    The fields are those of `make_pair` with a leading b = batch_size / process_count. An epoch's
    last incomplete batch is dropped. Raises `ValueError` if the slices do not fill one batch.
    """
    make = partial(make_pair, dataset, **_patch(options), seed=options.seed)
    return _training_batches(dataset, options, make, volumes, start_step)


def segmentation_batches(
    dataset: SliceDataset,
    options: BatchOptions,
    *,
    volumes: Sequence[str] | None = None,
    start_step: int = 0,
) -> grain.DatasetIterator:
    """Endless batches of labelled slices, randomly cropped; ordered as `pretraining_batches`.

    With a `foreground_share` the last places of a batch hold `make_foreground`'s slices. The fields
    are those of `make_labelled` with a leading b. Raises `ValueError` if the slices do not fill one
    batch or a volume has no labels.
    """
    _check_labelled(dataset, select_volumes(dataset, volumes))
    common: dict[str, Any] = {**_patch(options), "seed": options.seed}
    records = _records(dataset, volumes)

    def make(sample: int, record: int) -> Batch:
        if options.needs_foreground(sample):
            return make_foreground(dataset, sample, record, records=records, **common)
        return make_labelled(dataset, sample, record, **common)

    return _training_batches(dataset, options, make, volumes, start_step)


def evaluation_batches(
    dataset: SliceDataset, options: BatchOptions, *, volumes: Sequence[str] | None = None
) -> grain.DatasetIterator:
    """All slices of the volumes once, in order of volume and slice, centrally cropped.

    The fields are those of `make_labelled` with a leading b, and `valid` bool [b]: the last batch
    is padded with zero slices, with `valid` false and `record` -1. Raises `ValueError` if a volume
    has no labels.
    """
    _check_labelled(dataset, select_volumes(dataset, volumes))
    records = _records(dataset, volumes)
    steps = -(-len(records) // options.batch_size)

    def make(sample: int) -> Batch:
        if sample < len(records):
            labelled = make_labelled(dataset, sample, records[sample], **_patch(options), seed=None)
            return {**labelled, "valid": np.array(True)}
        padding = {field: np.zeros_like(value) for field, value in make(0).items()}
        return {**padding, "record": np.array(-1, np.int32)}

    return _own_batches(options, make, range(steps))


def _training_batches(
    dataset: SliceDataset,
    options: BatchOptions,
    make: Callable[[int, int], Batch],
    volumes: Sequence[str] | None,
    start_step: int,
) -> grain.DatasetIterator:
    samples_per_epoch = steps_per_epoch(dataset, options.batch_size, volumes) * options.batch_size
    # Grain seeds epoch e with seed + e, so runs with neighbouring seeds would share orders.
    seed = int(np.random.SeedSequence(options.seed).generate_state(1)[0])
    order = grain.MapDataset.source(_records(dataset, volumes)).shuffle(seed)
    stream = order[:samples_per_epoch].repeat().map_with_index(make)
    return _own_batches(options, stream.__getitem__, range(start_step, _ENDLESS))


def _own_batches(
    options: BatchOptions, make: Callable[[int], Batch], steps: range
) -> grain.DatasetIterator:
    """Batches of this process's contiguous part of each global batch; `make` takes sample numbers.

    Threads work on single samples, so the first batch is ready soon and memory stays small.
    """
    share = options.batch_size // options.process_count
    first = options.process_index * share

    def own_sample(i: int) -> Batch:
        step, place = divmod(i, share)
        return make((steps.start + step) * options.batch_size + first + place)

    read_options = grain.ReadOptions(
        num_threads=options.num_threads,
        prefetch_buffer_size=max(options.num_threads, 2 * share),
    )
    samples = grain.MapDataset.range(len(steps) * share).map(own_sample)
    return iter(samples.to_iter_dataset(read_options).batch(share))


def _records(dataset: SliceDataset, volumes: Sequence[str] | None) -> list[int]:
    """Global record numbers of the volumes' slices, in order of volume and slice."""
    return [i for name in select_volumes(dataset, volumes) for i in dataset.volumes[name]]


def _check_labelled(dataset: SliceDataset, volumes: Sequence[str]) -> None:
    unlabelled = sorted(set(volumes) - set(labelled_volumes(dataset)))
    if unlabelled:
        raise UserError(f"{dataset.directory}: no labels in the volumes {', '.join(unlabelled)}")


def _correspondence(anchor: Slice, offset: int) -> np.ndarray:
    """Indices int [k] of the keypoints at a slice offset that match the anchor's, or -1."""
    if offset == 0:
        return np.where(anchor.mask, np.arange(len(anchor.mask)), -1)
    reach = len(anchor.correspondences) // 2
    return anchor.correspondences[offset + reach - (offset > 0)]


def _patch(options: BatchOptions) -> dict[str, Any]:
    return {"patch_size": options.patch_size, "patch_keypoints": options.patch_keypoints}


def _crop(
    dataset: SliceDataset,
    whole: Slice,
    origin: np.ndarray,
    patch_size: PatchSize,
    places: int | None,
    rng: np.random.Generator | None,
) -> tuple[Batch, np.ndarray]:
    """A slice's patch, and the index of the slice's keypoint in each slot: int [p], or -1."""
    inside = keypoints_inside(whole.keypoints, whole.mask, origin, patch_size)
    strongest = dataset.metadata.get("keypoint_order") == "strength"
    chosen = choose_keypoints(inside, places, rng, strongest=strongest)
    view = cut_view(whole.image, whole.keypoints, whole.mask, origin, patch_size, chosen=chosen)
    return view, chosen
