"""Host batches of NumPy arrays from a prepared dataset, resumable from one integer.

Training samples are numbered through an endless stream: sample `step * batch_size + place` is at
that place of that step's global batch, and everything random about it depends only on the seed and
that number (`kafjax.data.samples`). So batches depend neither on threads nor on the number of
processes, each of which makes its contiguous part of every global batch, and a run resumes from its
step number.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import grain
import numpy as np

from kafjax.data.dataset import SliceDataset, labelled_volumes, select_volumes
from kafjax.data.patches import PatchSize
from kafjax.data.samples import Batch, make_foreground, make_labelled, make_pair
from kafjax.errors import UserError

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


def _patch(options: BatchOptions) -> dict[str, Any]:
    return {"patch_size": options.patch_size, "patch_keypoints": options.patch_keypoints}
