"""Checks everything that a run needs, in seconds, before anything is compiled.

`kafjax train --config ... --check` prints the results: the config, the dataset with its volumes and
shards, the devices and their estimated memory, the workdir and its disk, and the run to start from.
`kafjax.training.loop` makes the same checks one after the other.
"""

import itertools
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from kafjax.buckets.mirror import sizes
from kafjax.checkpoint.checkpointer import saved_steps
from kafjax.data.batches import BatchOptions, steps_per_epoch
from kafjax.data.dataset import (
    SliceDataset,
    check_facts,
    context_of,
    labelled_volumes,
    open_dataset,
    records_of,
    volumes_for_test,
)
from kafjax.data.patches import count_places
from kafjax.data.splits import (
    PAPER_KINDS,
    Split,
    group_subjects,
    read_splits_file,
    split_by_names,
    split_volumes,
    unlabelled_volumes,
)
from kafjax.errors import UserError
from kafjax.regions import regions_of
from kafjax.tasks.base import HEADS_OF_TASKS, make_model, network_shapes
from kafjax.tasks.registry import make_task
from kafjax.training.config_checks import check_fields
from kafjax.training.step import make_optimizer
from kafjax.training.transfer import start_from
from kafjax.workdir.split import RunSplit, describe_split, open_split
from kafjax.workdir.workdir import Workdir


class Finding(NamedTuple):
    """A checked item, the result, and whether it is wrong."""

    name: str
    text: str
    wrong: bool = False

    def __str__(self) -> str:
        lines = self.text.splitlines() or [""]
        mark = "WRONG" if self.wrong else "ok"
        return "\n".join(
            [f"{mark:<6}{self.name:<10} {lines[0]}", *(f"{'':17}{x}" for x in lines[1:])]
        )


def look(config: Any, workdir: str | os.PathLike[str]) -> list[Finding]:
    """Checks everything that a run of `config` in `workdir` needs; writes and compiles nothing.

    A wrong config hides the rest; otherwise all faults are reported at once.
    """
    findings: list[Finding] = []

    def find(name: str, see: Callable[[], str]) -> None:
        try:
            findings.append(Finding(name, see()))
        except (UserError, OSError, FloatingPointError) as error:
            findings.append(Finding(name, str(error), wrong=True))

    find("config", lambda: _see_config(config))
    if findings[0].wrong:
        return findings
    dataset: SliceDataset | None = None
    completed = config

    def see_dataset() -> str:
        nonlocal completed, dataset
        opened = open_run_dataset(config)
        completed = complete_config(config, opened)
        dataset = opened
        return _see_dataset(dataset)

    find("dataset", see_dataset)
    if dataset is not None:
        opened: SliceDataset = dataset
        find("volumes", lambda: _see_volumes(completed, Workdir(workdir), opened))
        find("memory", lambda: _see_memory(completed, opened))
    find("devices", lambda: check_devices(config))
    find("workdir", lambda: _see_workdir(config, Path(workdir)))
    if config.task == "segment" and completed.model.get("num_classes") is None:
        return findings  # without the dataset the network is unknown
    find("disk", lambda: _see_disk(completed, Path(workdir)))
    if "init_from" in config and not saved_steps(workdir):
        find("init_from", lambda: _see_start(completed))
    return findings


def open_run_dataset(config: Any) -> SliceDataset:
    """Opens the config's dataset; raises `ValueError` if it contradicts the config."""
    try:
        dataset = open_dataset(config.data.dir, config.data.name)
    except OSError as error:  # a name too long, a folder without permission
        raise UserError(
            f"config.data.dir is {config.data.dir!r}, expected the folder of a prepared dataset "
            f"{config.data.name!r} that can be read: {error}"
        ) from error
    dataset = dataset.with_context(context_of(config))
    given = {name: config.data.get(name) for name in ("max_keypoints", "radius")}
    check_facts(dataset, {name: value for name, value in given.items() if value is not None})
    num_classes = config.model.get("num_classes")
    if num_classes not in (None, len(dataset.classes)):
        raise UserError(
            f"config.model.num_classes is {num_classes}, expected {len(dataset.classes)}: "
            f"{dataset.directory} has {', '.join(dataset.classes)}"
        )
    num_channels = config.model.get("num_channels")
    if num_channels not in (None, dataset.num_channels):
        raise UserError(
            f"config.model.num_channels is {num_channels}, expected {dataset.num_channels}, what "
            f"slices of {dataset.directory} have with config.data.context"
        )
    return dataset


def complete_config(config: Any, dataset: SliceDataset) -> Any:
    """A copy of the config with missing fields filled in from the dataset.

    These are K, the radius of correspondences, the slots for a patch's keypoints (`count_places`),
    the number of channels unless it is 1, and, for segmentation, the number of classes, the regions
    and whether labels are sparse; and the network's head, from the task: `FROM_DATASET`.
    """
    complete = config.copy_and_resolve_references()
    with complete.unlocked():
        for name in ("max_keypoints", "radius"):
            if complete.data.get(name) is None:
                complete.data[name] = dataset.metadata[name]
        complete.model.head = HEADS_OF_TASKS[config.task]
        if dataset.num_channels > 1:
            complete.model.num_channels = dataset.num_channels
        if complete.data.get("patch_keypoints") is None:
            size = tuple(complete.data.patch_size)
            complete.data.patch_keypoints = count_places(dataset.metadata, size)
        if config.task == "segment" and dataset.metadata.get("sparse_labels"):
            complete.data.sparse_labels = True
        if config.task == "segment" and (regions := regions_of(dataset.metadata)):
            complete.data.regions = tuple(region.labels for region in regions)
            complete.data.regions_class_order = tuple(region.written for region in regions)
            complete.model.num_regions = len(regions)
        if config.task == "segment" and complete.model.get("num_classes") is None:
            complete.model.num_classes = len(dataset.classes)
    check_fields(complete)  # again, with the values filled in
    return complete


def with_classes(config: Any) -> Any:
    """The completed config (`complete_config`) if the dataset is there, else the config.

    Raises:
      ValueError: the config lacks the number of classes, and the dataset is missing.
    """
    try:
        return complete_config(config, open_run_dataset(config))
    except UserError as error:
        if config.task != "segment" or config.model.get("num_classes") is not None:
            return config
        raise UserError(
            f"config.model.num_classes is None, expected it or the prepared dataset: {error}"
        ) from None


def open_run_split(config: Any, workdir: Workdir, dataset: SliceDataset) -> RunSplit:
    """The split recorded in the workdir, else the one that the config defines.

    Raises:
      ValueError: the dataset differs from the recorded split's, or cannot be split this way; or the
        workdir holds checkpoints of a run without a recorded split.
    """
    if workdir.split_file.exists() or saved_steps(workdir):
        return open_split(workdir, dataset, training=True)
    return describe_split(split_run(config, dataset), dataset)


def split_run(config: Any, dataset: SliceDataset) -> Split:
    """The training and validation volumes, by the config's `data` fields.

    Volumes of the test set are on neither side. Pretraining trains on all others, and on the test
    set too if `include_test` is true. Otherwise the validation volumes are the labelled ones that
    `validation` names, those of a fold of `splits_file` (nnU-Net's splits_final.json) or of the
    paper's folds, or none if `fold` is None. `num_labeled` subjects are chosen from the others.
    Equal images count as one subject, except in the paper's protocol, whose folds are fixed.
    Semi-supervised runs use all other volumes without labels, except those of held-out subjects and
    images equal to theirs.
    """
    split = _split_labelled(config, dataset)
    if "semi" not in config:
        return split
    metadata = dataset.metadata
    volumes = tuple(dataset.volumes)
    unlabelled = unlabelled_volumes(
        volumes,
        split,
        apart=() if config.data.get("include_test") else volumes_for_test(dataset),
        subject=group_subjects(volumes, metadata.get("equal_images", ()), metadata.get("subjects")),
    )
    if not unlabelled and not records_of(dataset, split.train, annotated=False):
        raise UserError(
            f"{dataset.directory}: no volume is left to train on without labels, next to "
            f"{len(split.train)} to train on and {len(split.validation)} to validate on; expected "
            "one, fewer labelled ones (config.data.num_labeled), or a config without config.semi"
        )
    return split._replace(unlabelled=unlabelled)


def _split_labelled(config: Any, dataset: SliceDataset) -> Split:
    """`split_run` without the unlabelled volumes."""
    data, metadata = config.data, dataset.metadata
    apart = frozenset(() if data.get("include_test") else volumes_for_test(dataset))
    if "fold" not in data:
        volumes = tuple(name for name in dataset.volumes if name not in apart)
        if not volumes:
            raise UserError(
                f"{dataset.directory} has no volume but those of its test set; expected others, or "
                "config.data.include_test=True to pretrain on them"
            )
        return Split(volumes, ())
    volumes = tuple(name for name in labelled_volumes(dataset) if name not in apart)
    equal_images = () if metadata.get("kind") in PAPER_KINDS else metadata.get("equal_images", ())
    common = {
        "num_labeled": data.num_labeled,
        "subject": group_subjects(volumes, equal_images, metadata.get("subjects")),
    }
    if data.get("validation"):
        return split_by_names(volumes, validation=data.validation, **common)
    if data.get("splits_file"):
        train, validation = read_splits_file(data.splits_file, data.fold)
        return split_by_names(volumes, train=train, validation=validation, **common)
    if data.fold is None:
        return split_by_names(volumes, **common)
    return split_volumes(volumes, fold=data.fold, num_folds=data.num_folds, **common)


def run_epoch(config: Any, dataset: SliceDataset, split: Split) -> int:
    """Steps of one pass over the run's labelled slices, or of pretraining over all.

    Raises `ValueError` if they do not fill one batch.
    """
    labelled = config.task == "segment"
    size = batch_options(config).num_labelled
    return steps_per_epoch(dataset, size, split.train, labelled=labelled)


def batch_options(config: Any) -> BatchOptions:
    """The options of the run's batches in this process."""
    return BatchOptions(
        batch_size=config.batch_size,
        patch_size=tuple(config.data.patch_size),
        patch_keypoints=config.data.get("patch_keypoints"),
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=config.data.num_threads,
        foreground_share=config.data.get("foreground_share", 0.0),
        unlabelled_share=config.data.get("unlabelled_share", 0.0),
    )


def check_devices(config: Any) -> str:
    """The devices in words; `ValueError` if they, and microbatches, do not divide the batch."""
    devices, parts, together = jax.device_count(), config.num_microbatches, _kept_together(config)
    if config.batch_size % (devices * parts * together):
        times = f" times num_microbatches {parts}" if parts > 1 else ""
        times += " times 2, for pairs of slices" if together > 1 else ""
        raise UserError(
            f"config.batch_size is {config.batch_size}, "
            f"expected a multiple of the {devices} devices{times}"
        )
    kind = jax.local_devices()[0].device_kind
    return f"{devices} x {kind}, {config.batch_size // devices} samples per device"


def _kept_together(config: Any) -> int:
    """The number of a batch's slices that must be on one device, in one microbatch."""
    return 2 if "semi" in config and config.semi.method == "copy_paste" else 1


def estimate_memory(config: Any, dataset: SliceDataset) -> int:
    """The estimated bytes of a training step on one device.

    The sum of the activations stored for the backward pass, found by tracing, not compiling;
    parameters, gradients, updates and the optimiser's state; and the batch. Fusion reduces the
    first, temporary arrays add to it. Compared with XLA's numbers for the compiled step on CPU: 5 %
    and 8 % more for two UNets of 26 and 158 MiB, 48 % more for pretraining a KAF-UNet of 249 MiB.
    """
    share = max(1, config.batch_size // jax.device_count())
    part = max(_kept_together(config), share // config.num_microbatches)
    part -= part % _kept_together(config)
    alone = config.copy_and_resolve_references()
    alone.num_microbatches = 1
    task = make_task(alone)
    sample = task.sample(dataset, next(iter(dataset.volumes.values()))[0])
    batch = {
        name: jax.ShapeDtypeStruct((part, *value.shape), value.dtype)
        for name, value in sample.items()
    }
    variables = _shapes(config)

    def residuals(params: Any, batch_stats: Any, batch: Any) -> Any:
        return jax.vjp(lambda p: task.loss(p, batch_stats, batch), params, has_aux=True)[1]

    kept = jax.eval_shape(residuals, variables["params"], variables["batch_stats"], batch)
    return _bytes(kept) + 2 * _bytes(variables["params"]) + _state_bytes(config) + _bytes(batch)


def _see_config(config: Any) -> str:
    check_fields(config)
    make_model(config, None)
    return f"{config.task}, {config.model.name}, every field has a valid type and range"


def _see_dataset(dataset: SliceDataset) -> str:
    shards = sum(".tfrecord" in name for name in sizes(dataset.directory))
    return f"{dataset.directory}: {len(dataset.volumes)} volumes, {shards} shards, index good"


def _see_volumes(config: Any, workdir: Workdir, dataset: SliceDataset) -> str:
    """Counts steps, and reads a record of each of the run's volumes."""
    split = open_run_split(config, workdir, dataset).names
    steps = run_epoch(config, dataset, split)
    for name in itertools.chain(*split):
        dataset.read(dataset.volumes[name][0])
    total = min(config.num_steps or math.inf, steps * config.num_epochs)
    without = f"{len(split.unlabelled)} without labels, " if split.unlabelled else ""
    return (
        f"{len(split.train)} to train on, {without}{len(split.validation)} to validate on; {steps} "
        f"steps an epoch, {total:.0f} in all"
    )


def _see_memory(config: Any, dataset: SliceDataset) -> str:
    needed, there = estimate_memory(config, dataset), device_memory()
    text = f"about {_gib(needed)} on each device (estimate), which has {_gib(there)}"
    if needed > there:
        raise UserError(
            f"{text}; expected less: a smaller config.batch_size or more config.num_microbatches"
        )
    return text


def device_memory() -> int:
    """Bytes of memory of a local device; a CPU's share of this machine's."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


def _see_workdir(config: Any, workdir: Path) -> str:
    Workdir(workdir).check_config(config.to_dict())
    steps = saved_steps(workdir)
    return f"{workdir}: " + (f"resumes from step {steps[-1]}" if steps else "starts from scratch")


def _see_disk(config: Any, workdir: Path) -> str:
    there = next(p for p in (workdir.absolute(), *workdir.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{there}: cannot be written to; expected a folder for the run")
    keep = config.checkpoint
    # One more is written before another is removed.
    copies = max(1, keep.keep_newest + keep.keep_best + 1 - len(saved_steps(workdir)))
    needed, free = copies * _state_bytes(config), shutil.disk_usage(there).free
    text = f"{copies} checkpoints of {_gib(_state_bytes(config))} to be written, {_gib(free)} free"
    if needed > free:
        raise UserError(f"{there}: {text}; expected room for all of them")
    return text


def _see_start(config: Any) -> str:
    _, report = start_from(config.init_from, config, _shapes(config))
    return f"{config.init_from}\n{report}"


def _shapes(config: Any) -> dict[str, Any]:
    """Shapes of the variables of the run's network."""
    return {"batch_stats": {}, **network_shapes(config)}


def _state_bytes(config: Any) -> int:
    """Bytes of a checkpoint's state."""
    variables = _shapes(config)
    moments = jax.eval_shape(make_optimizer(config.optimizer).init, variables["params"])
    copies = 2 if config.optimizer.average_decay else 1
    return copies * _bytes(variables) + _bytes(moments)


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def _gib(number: float) -> str:
    return f"{number / 2**30:.2f} GiB"
