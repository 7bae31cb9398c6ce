"""Times training on this device: the loop takes some steps in a folder that is then removed.

So an estimate covers a whole step: reading, augmentation, and the compiled program, which the run
itself then finds in the cache.
"""

import contextlib
import itertools
import math
import statistics
import tempfile
import time
from typing import Any, NamedTuple

from kafjax.data.dataset import SliceDataset
from kafjax.training.cadence import Cadence
from kafjax.training.loop import train
from kafjax.training.preflight import (
    complete_config,
    open_run_dataset,
    open_run_split,
    run_epoch,
)
from kafjax.workdir.workdir import Workdir

# A forward pass of a batch, as in validation and prediction, takes at most this share of a step.
FORWARD_SHARE = 0.4
_STEPS = 5
_ENOUGH_SECONDS = 120.0  # of slow steps three are enough


class Timing(NamedTuple):
    """Seconds of compilation, with the start of the run, and of a step."""

    compilation: float
    step: float


class Stopped(BaseException):
    """A signal stopped a run, which saved its state."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class _EnoughError(Exception):
    """Ends training: the steps so far are enough."""


def time_steps(config: Any) -> Timing:
    """Trains up to five steps by a config, without validation and without a line of output.

    Raises `Stopped` if a signal came, and what `train` raises.
    """
    config = config.copy_and_resolve_references()
    config.num_steps = _STEPS
    config.every.update({"log": 1, "picture": 0, "checkpoint": 10**6})
    if "fold" in config.data:
        config.data.update({"fold": None, "validation": None, "splits_file": None})
    begin = time.perf_counter()
    ends: list[float] = []

    def on_step(step: int, _: int) -> None:
        ends.append(time.perf_counter())
        if step >= 3 and ends[-1] - begin > _ENOUGH_SECONDS:
            raise _EnoughError

    with (
        tempfile.TemporaryDirectory(prefix="kafjax_timing_") as workdir,
        contextlib.suppress(_EnoughError),
        contextlib.redirect_stdout(None),
    ):
        if received := train(config, workdir, on_step=on_step):
            raise Stopped(received)
    if len(ends) == 1:  # all there are to train
        return Timing(0.0, ends[0] - begin)
    each = [after - before for before, after in itertools.pairwise(ends)]
    step = statistics.median(each[1:] or each)
    return Timing(max(ends[0] - begin - step, 0.0), step)


def estimate_seconds(config: Any, workdir: Workdir, dataset: SliceDataset, timing: Timing) -> float:
    """Seconds of a whole run, with its validation."""
    split = open_run_split(config, workdir, dataset).names
    epoch = run_epoch(config, dataset, split)
    steps = int(min(config.num_steps or math.inf, epoch * config.num_epochs))
    cadence = Cadence(config.every, steps, epoch, has_validation=bool(split.validation))
    batches = sum(len(dataset.volumes[name]) for name in split.validation) / config.batch_size
    validations = sum(map(cadence.validates, range(1, steps + 1)))
    forward = FORWARD_SHARE * timing.step
    return timing.compilation + timing.step * steps + forward * batches * validations


def see_time(config: Any, workdir: Workdir) -> str:
    """Takes some steps and describes how long the run takes on this device."""
    dataset = open_run_dataset(config)
    completed = complete_config(config, dataset)
    timing = time_steps(completed)
    seconds = estimate_seconds(completed, workdir, dataset, timing)
    return (
        f"about {format_seconds(seconds)} for the whole run on this device: {timing.step:.3g} s a "
        f"step, {format_seconds(timing.compilation)} to start"
    )


def format_seconds(seconds: float) -> str:
    """A length of time in its two largest units."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds // 3600:.0f} h {seconds % 3600 / 60:.0f} min"
    return f"{seconds // 86400:.0f} days {seconds % 86400 / 3600:.0f} h"
