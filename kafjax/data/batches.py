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

from kafjax.data.dataset import SliceDataset, labelled_volumes, records_of, select_volumes
from kafjax.data.patches import PatchSize
from kafjax.data.samples import (
    Batch,
    make_foreground,
    make_labelled,
    make_pair,
    make_unlabelled,
)
from kafjax.errors import UserError

_ENDLESS = 2**40  # steps


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """Options of batches: `batch_size` is that of the global batch, `patch_size` in pixels (h, w).

    `patch_keypoints` is p, the slots for a patch's keypoints; None keeps the slice's, p = k. A
    process makes the part `process_index` of `process_count` of each global batch, with
    `num_threads` reading threads. In labelled batches at least the fraction `foreground_share` of
    the samples, and at least one if it is not 0, show a pixel of a class other than the background.
    In semi-supervised batches `unlabelled_share` of the places, spread evenly, are for unlabelled
    slices, and the others are a labelled batch. Raises `ValueError` if the processes do not divide
    the batch.
    """

    batch_size: int
    patch_size: PatchSize
    seed: int
    process_index: int = 0
    process_count: int = 1
    num_threads: int = 16
    patch_keypoints: int | None = None
    foreground_share: float = 0.0
    unlabelled_share: float = 0.0

    @property
    def num_unlabelled(self) -> int:
        """The places of a global batch for unlabelled slices."""
        return round(self.unlabelled_share * self.batch_size)

    @property
    def num_labelled(self) -> int:
        """The places of a global batch for labelled slices."""
        return self.batch_size - self.num_unlabelled

    def unlabelled_before(self, place: int) -> int:
        """The number of places for unlabelled slices before a place of a batch."""
        return place * self.num_unlabelled // self.batch_size

    def needs_foreground(self, number: int) -> bool:
        """Whether a labelled sample is one of its batch's last, reserved for foreground.

        Labelled samples are numbered by themselves.
        """
        kept = max(round(self.foreground_share * self.num_labelled), self.foreground_share > 0)
        return number % self.num_labelled >= self.num_labelled - kept

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.batch_size % self.process_count:
            raise UserError(
                f"batch_size is {self.batch_size}; expected a positive multiple of the "
                f"{self.process_count} processes"
            )


def steps_per_epoch(
    dataset: SliceDataset,
    batch_size: int,
    volumes: Sequence[str] | None = None,
    *,
    labelled: bool = False,
) -> int:
    """Full global batches in one pass over the volumes' slices, or only their annotated ones.

    Raises `ValueError` if not even one.
    """
    return _steps(records_of(dataset, volumes, annotated=labelled or None), batch_size)


def _steps(records: Sequence[int], batch_size: int) -> int:
    if not 1 <= batch_size <= len(records):
        raise UserError(
            f"batch_size is {batch_size}; expected 1 to {len(records)}, the number of slices"
        )
    return len(records) // batch_size


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
    return _training_batches(options, make, records_of(dataset, volumes), start_step)


def segmentation_batches(
    dataset: SliceDataset,
    options: BatchOptions,
    *,
    volumes: Sequence[str] | None = None,
    start_step: int = 0,
) -> grain.DatasetIterator:
    """Endless batches of annotated slices, randomly cropped; ordered as `pretraining_batches`.

    With a `foreground_share` the last places of a batch hold `make_foreground`'s slices. The fields
    are those of `make_labelled` with a leading b. Raises `ValueError` if the slices do not fill one
    batch or a volume has no labels.
    """
    make = _labelled_maker(dataset, options, volumes)

    def make_numbered(sample: int, record: int) -> Batch:
        return make(sample, sample, record)

    records = records_of(dataset, volumes, annotated=True)
    return _training_batches(options, make_numbered, records, start_step)


def semi_supervised_batches(
    dataset: SliceDataset,
    options: BatchOptions,
    *,
    volumes: Sequence[str],
    unlabelled: Sequence[str],
    labelled_steps: int,
    schedule_steps: int,
    start_step: int = 0,
) -> grain.DatasetIterator:
    """Endless batches of labelled slices, as in `segmentation_batches`, and unlabelled ones.

    The labelled places hold `options.num_labelled` slices, ordered as a batch of that size; an
    epoch is a pass over them. The labels of the volumes `unlabelled` are never read.

    Args:
      dataset: contains the volumes.
      options: of the batches.
      volumes: names of labelled volumes.
      unlabelled: names of others; slices of `volumes` that nobody annotated join them.
      labelled_steps: first steps whose unlabelled places hold labelled slices instead, drawn
        independently of the others.
      schedule_steps: length of the run's schedule.
      start_step: steps to skip.

    Returns:
      The fields of `make_labelled` with a leading b; `labelled` bool [b], whether the slice's label
      was read; and `progress` float32 [b], the fraction of the schedule before this step.

    Raises:
      ValueError: no place is left for one kind of slices, the labelled slices do not fill one
        batch, a labelled volume has no labels, or a volume is on both sides.
    """
    if both := sorted({*volumes} & {*unlabelled}):
        raise UserError(f"{', '.join(both)}: labelled and unlabelled; expected one of both")
    size, places = options.batch_size, options.num_unlabelled
    if not 0 < places < size:
        raise UserError(
            f"{places} of the batch's {size} slices are unlabelled, expected 1 to {size - 1}"
        )
    make = _labelled_maker(dataset, options, volumes)
    labelled_records = records_of(dataset, volumes, annotated=True)
    others_records = records_of(dataset, volumes, annotated=False)
    others_records += records_of(dataset, unlabelled) if unlabelled else []
    labelled_order = _order(labelled_records, options.num_labelled, options.seed)
    others, partners = np.random.SeedSequence(options.seed).spawn(2)
    unlabelled_order = _order(others_records, 1, others)
    partner_order = _order(labelled_records, 1, partners)
    common: dict[str, Any] = {**_patch(options), "seed": options.seed}

    def make_any(sample: int) -> Batch:
        step, place = divmod(sample, size)
        before = options.unlabelled_before(place)
        is_unlabelled = options.unlabelled_before(place + 1) > before
        if not is_unlabelled:
            number = step * options.num_labelled + place - before
            fields = make(sample, number, labelled_order[number])
        elif step < labelled_steps:
            record = partner_order[step * places + before]
            fields = make_labelled(dataset, sample, record, **common)
        else:
            record = unlabelled_order[(step - labelled_steps) * places + before]
            fields = make_unlabelled(dataset, sample, record, **common)
        return {
            **fields,
            "labelled": np.array(not is_unlabelled or step < labelled_steps),
            "progress": np.array(step / schedule_steps, np.float32),
        }

    return _own_batches(options, make_any, range(start_step, _ENDLESS))


def evaluation_batches(
    dataset: SliceDataset, options: BatchOptions, *, volumes: Sequence[str] | None = None
) -> grain.DatasetIterator:
    """All slices of the volumes once, in order of volume and slice, centrally cropped.

    The fields are those of `make_labelled` with a leading b, and `valid` bool [b]: the last batch
    is padded with zero slices, with `valid` false and `record` -1. Raises `ValueError` if a volume
    has no labels.
    """
    _check_labelled(dataset, select_volumes(dataset, volumes))
    records = records_of(dataset, volumes)
    steps = -(-len(records) // options.batch_size)

    def make(sample: int) -> Batch:
        if sample < len(records):
            labelled = make_labelled(dataset, sample, records[sample], **_patch(options), seed=None)
            return {**labelled, "valid": np.array(True)}
        padding = {field: np.zeros_like(value) for field, value in make(0).items()}
        return {**padding, "record": np.array(-1, np.int32)}

    return _own_batches(options, make, range(steps))


def _labelled_maker(
    dataset: SliceDataset, options: BatchOptions, volumes: Sequence[str] | None
) -> Callable[[int, int, int], Batch]:
    """Makes labelled slices from (sample, its number among the labelled ones, record)."""
    _check_labelled(dataset, select_volumes(dataset, volumes))
    common: dict[str, Any] = {**_patch(options), "seed": options.seed}
    records = np.array(records_of(dataset, volumes, annotated=True))

    def make(sample: int, number: int, record: int) -> Batch:
        if options.needs_foreground(number):
            return make_foreground(dataset, sample, record, records=records, **common)
        return make_labelled(dataset, sample, record, **common)

    return make


def _training_batches(
    options: BatchOptions,
    make: Callable[[int, int], Batch],
    records: Sequence[int],
    start_step: int,
) -> grain.DatasetIterator:
    stream = _order(records, options.batch_size, options.seed).map_with_index(make)
    return _own_batches(options, stream.__getitem__, range(start_step, _ENDLESS))


def _order(
    records: Sequence[int], batch_size: int, seed: int | np.random.SeedSequence
) -> grain.MapDataset:
    """Endless record numbers, shuffled in each epoch of full batches."""
    samples_per_epoch = _steps(records, batch_size) * batch_size
    # Grain seeds epoch e with seed + e, so runs with neighbouring seeds would share orders.
    sequence = seed if isinstance(seed, np.random.SeedSequence) else np.random.SeedSequence(seed)
    shuffled = grain.MapDataset.source(records).shuffle(int(sequence.generate_state(1)[0]))
    return shuffled[:samples_per_epoch].repeat()


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


def _check_labelled(dataset: SliceDataset, volumes: Sequence[str]) -> None:
    unlabelled = sorted(set(volumes) - set(labelled_volumes(dataset)))
    if unlabelled:
        raise UserError(f"{dataset.directory}: no labels in the volumes {', '.join(unlabelled)}")


def _patch(options: BatchOptions) -> dict[str, Any]:
    return {"patch_size": options.patch_size, "patch_keypoints": options.patch_keypoints}
