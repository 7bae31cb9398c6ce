"""The training loop: steps, logs, validation, pictures and checkpoints of one run.

A step depends only on the state, the seed and the step number, so a run resumes from its step. The
loop is independent of keypoints and of what validation counts.
"""

import collections
import contextlib
import dataclasses
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import optax

from kafjax.buckets import url_of
from kafjax.checkpoint.checkpointer import Checkpointer
from kafjax.data.dataset import SliceDataset
from kafjax.data.splits import Split
from kafjax.files import checksum, flatten, printable
from kafjax.processes import check_same, together
from kafjax.tasks.base import Task
from kafjax.tasks.registry import make_task
from kafjax.training.cadence import Cadence
from kafjax.training.config_checks import check_fields
from kafjax.training.plateau import Plateau, describe_plateau
from kafjax.training.preflight import (
    batch_options,
    check_devices,
    complete_config,
    open_run_dataset,
    open_run_split,
    run_epoch,
)
from kafjax.training.step import (
    AXIS_NAME,
    TrainState,
    init_state,
    learning_rates,
    make_optimizer,
    make_update,
    replicate,
    start_averages,
    step_inputs,
    to_host,
)
from kafjax.training.transfer import check_architecture, start_from
from kafjax.training.validation import Validation
from kafjax.workdir.environment import write_environment
from kafjax.workdir.metrics import (
    MetricMeans,
    MetricWriter,
    OnStep,
    read_metrics,
)
from kafjax.workdir.preparation import write_preparation
from kafjax.workdir.split import describe_later, write_split
from kafjax.workdir.workdir import Workdir

# Fields of the config that may differ between the processes of a run.
_OF_HOST = ("data.dir", "data.num_threads")


def train(
    config: Any, workdir: str | os.PathLike[str], *, on_step: OnStep | None = None
) -> int | None:
    """Trains by `config`, from the workdir's last checkpoint or from scratch.

    Args:
      config: see `configs/`.
      workdir: folder of the run's checkpoints, metrics and pictures.
      on_step: called after each step with its number and the last one's.

    Returns:
      None if the run is complete; the signal's number if one stopped it, after a checkpoint.

    Raises:
      ValueError: the config, the dataset and the workdir do not match.
      FloatingPointError: the loss is not finite; the message names the step and the slices.
    """
    with together():
        check_fields(config)
        check_devices(config)
        dataset = open_run_dataset(config)
        config = complete_config(config, dataset)
        folder, fields = Workdir(workdir), config.to_dict()
        folder.check_config(fields)
        split = open_run_split(config, folder, dataset)
        # Before the workdir is created, so a mistake in the config leaves none behind.
        run = _make_run(config, folder, dataset, split.names, on_step)
    check_same("the config", checksum({**flatten(fields), **dict.fromkeys(_OF_HOST)}))
    check_same("the dataset", checksum({**dataset.identity(), **dataset.contents()}))
    check_same("the split", split.digest)
    is_first = jax.process_index() == 0
    keep = config.checkpoint
    with contextlib.ExitStack() as stack:
        with together():
            if is_first:
                stack.enter_context(folder.lock())
                folder.write_config(fields)
                write_split(folder, split)
                write_preparation(folder, dataset.metadata)
                write_environment(folder)
                if later := describe_later(split, dataset):
                    print(later, flush=True)
        if url_of(folder.path):  # all processes read back the first save, which is not there yet
            what = "their copy of the run; several hosts need one KAFJAX_CACHE, which they share"
            check_same(what, folder.owner())
        checkpointer = stack.enter_context(
            Checkpointer(
                folder,
                keep_newest=keep.keep_newest,
                keep_best=keep.keep_best,
                best_metric=run.task.best_metric,
                best_mode=run.task.best_mode,
            )
        )
        received = _take_steps(run, checkpointer)
    if received is None and is_first:
        _summarize(folder, run.task.best_metric, fields)
    return received


class _InFlight(NamedTuple):
    """A step in progress on the devices: its number, pending results, and records."""

    step: int
    metrics: dict[str, jax.Array]
    records: np.ndarray


class _Run(NamedTuple):
    """The parts of a run that exist before its workdir."""

    config: Any
    workdir: Workdir
    dataset: SliceDataset
    task: Task
    split: Split
    cadence: Cadence
    optimizer: optax.GradientTransformation
    rates: np.ndarray
    on_step: OnStep | None


def _make_run(
    config: Any, workdir: Workdir, dataset: SliceDataset, split: Split, on_step: OnStep | None
) -> _Run:
    if "init_from" in config and not workdir.checkpoints.exists():
        check_architecture(config.init_from, config)
    task = make_task(config, axis_name=AXIS_NAME)
    epoch = run_epoch(config, dataset, split)
    schedule_steps = config.num_epochs * epoch
    num_steps = min(config.num_steps or schedule_steps, schedule_steps)
    return _Run(
        config=config,
        workdir=workdir,
        dataset=dataset,
        task=task,
        split=split,
        cadence=Cadence(config.every, num_steps, epoch, has_validation=bool(split.validation)),
        optimizer=make_optimizer(config.optimizer, frozen=task.frozen),
        rates=learning_rates(config.optimizer, schedule_steps),
        on_step=on_step,
    )


def _take_steps(run: _Run, checkpointer: Checkpointer) -> int | None:
    """The run's loop; returns None at its end, or the number of the signal that stopped it."""
    config, task, cadence = run.config, run.task, run.cadence
    state, saved = _first_state(run, checkpointer)
    start = int(state.step)
    if start >= cadence.num_steps:
        print(f"{run.workdir} is complete: {start} of {cadence.num_steps} steps.", flush=True)
        return None
    if jax.process_index() == 0:
        print(f"{_describe_steps(run, start)}; the first compiles the network.", flush=True)
    means, clock, loss = MetricMeans(saved.get("means")), _Clock(start), float("nan")
    plateau = Plateau(config, [row for row in read_metrics(run.workdir) if row["step"] <= start])
    saves = _Saves(checkpointer, start, every=config.every.checkpoint)
    in_flight: collections.deque[_InFlight] = collections.deque()
    options = batch_options(config)
    validation = Validation(task, run.dataset, options, run.split.validation)
    update = make_update(task, run.optimizer, average_decay=config.optimizer.average_decay)
    state = replicate(state)
    batches = task.batches(run.dataset, options, run.split, start_step=start)
    with contextlib.closing(batches), _open_writer(run, start) as writer, _Signals() as signals:
        for step in range(start + 1, cadence.num_steps + 1):
            with clock.waiting():
                batch = next(batches)
            if cadence.draws(step) and jax.process_index() == 0:
                _draw(writer, step, task.picture(batch))
            rate = run.rates[step - 1]
            state, metrics = update(state, *step_inputs(batch, rate, signals.received))
            in_flight.append(_InFlight(step, metrics, batch["record"]))

            # Keep one step in flight so that the device never waits for the host, unless this
            # step's state is saved.
            saves_now, stop = cadence.saves(step), 0
            while len(in_flight) > (0 if saves_now or stop else 1):
                done = in_flight.popleft()
                saves.secure(done.step)
                values = _fetch(done, run.dataset)
                stop = max(stop, int(values.pop("stop")))
                means.add(values)
                writer.advance()
                if cadence.logs(done.step):
                    logged = means.take()
                    loss = logged["loss"]
                    logged["learning_rate"] = float(run.rates[done.step - 1])
                    logged["epoch"] = done.step / cadence.steps_per_epoch
                    writer.write(done.step, logged, clock.read(done.step, config.batch_size))
                    if told := plateau.see(done.step, logged):
                        writer.note(told)
            checkpointer.check()

            scores: dict[str, float] = {}
            if cadence.validates(step):
                with clock.stopped() as seconds:
                    scores = validation.scores(state)
                    writer.write(step, scores, {"validation_seconds": seconds()})
                    if cadence.draws_validation(step):
                        _draw(writer, step, validation.pictures(state))
            if saves_now or stop:
                data = {"step": step, "means": means.state()}
                saves.save(step, to_host(state), {"loss": loss, **scores}, data)
            if stop:
                checkpointer.wait()
                return stop
    # A signal during the last step stops a caller with several runs.
    return signals.received or None


def _describe_steps(run: _Run, start: int) -> str:
    """The steps to take, the size of a batch, the number of volumes, and the devices."""
    count, kind = jax.device_count(), jax.devices()[0].platform
    volumes = len(run.split.train)
    return (
        f"Steps {start + 1} to {run.cadence.num_steps} of {run.config.batch_size} "
        f"samples from {volumes} volume{'s' * (volumes != 1)} on {count} {kind} "
        f"device{'s' * (count != 1)}"
    )


def _first_state(run: _Run, checkpointer: Checkpointer) -> tuple[TrainState, dict[str, Any]]:
    """The last checkpoint's state and data, or those of a new run, on the host."""
    averages = run.config.optimizer.average_decay > 0
    state = init_state(run.task, run.optimizer, averages=averages)
    restored = checkpointer.restore_latest(state)
    if restored is not None:
        print(f"Resuming {run.workdir} from step {restored[0].step}.", flush=True)
        return restored
    if "init_from" in run.config:
        variables, report = start_from(run.config.init_from, run.config, state.variables)
        state = dataclasses.replace(state, **variables)
        state = start_averages(state) if averages else state
        if jax.process_index() == 0:
            print(f"Starting from {run.config.init_from}:\n{report}", flush=True)
    return state, {}


def _open_writer(run: _Run, start: int) -> MetricWriter:
    return MetricWriter(
        run.workdir,
        start_step=start,
        num_steps=run.cadence.num_steps,
        enabled=jax.process_index() == 0,
        on_step=run.on_step,
    )


def _draw(writer: MetricWriter, step: int, pictures: Mapping[str, np.ndarray]) -> None:
    for name, image in pictures.items():
        writer.picture(step, name, image)


def _fetch(done: _InFlight, dataset: SliceDataset) -> dict[str, float]:
    """Waits for a step's metrics; raises `FloatingPointError` if the loss is not finite."""
    metrics = {name: float(value) for name, value in to_host(done.metrics).items()}
    if not np.isfinite(metrics["loss"]):
        names = ", ".join(map(dataset.describe_record, np.ravel(done.records)))
        raise FloatingPointError(
            f"the loss is {metrics['loss']} at step {done.step}; its batch holds {names}"
        )
    return metrics


class _Signals:
    """Records the first SIGTERM or Ctrl-C instead of exiting; a second one acts as usual.

    Attributes:
      received: the signal's number, 0 before any.
    """

    def __enter__(self) -> Self:
        self.received = 0
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number: int, _: Any) -> None:
        self.received = number
        self.__exit__()

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class _Saves:
    """Saves states such that a kill loses at most `every` logged steps."""

    def __init__(self, checkpointer: Checkpointer, start: int, *, every: int):
        self._checkpointer = checkpointer
        self._every = every
        # The newest steps with a complete checkpoint, and with one in progress.
        self._whole = self._begun = start

    def secure(self, step: int) -> None:
        """Waits for the save in progress if a kill now would lose more than an interval.

        The device computes meanwhile, so a save no longer than the steps in flight is free.
        """
        if step - self._whole > self._every:
            self._checkpointer.wait()
            self._whole = self._begun

    def save(
        self, step: int, state: TrainState, metrics: Mapping[str, float], data: Mapping[str, Any]
    ) -> None:
        """Starts to save a state of host arrays."""
        self._checkpointer.save(step, state, metrics=metrics, data=data)
        self._whole, self._begun = self._begun, step  # because a save waits for the previous one


class _Clock:
    """Rates between two logs, and the fraction of the time spent waiting for input."""

    def __init__(self, step: int):
        self._begin(step)

    def _begin(self, step: int) -> None:
        self._step, self._time, self._waited = step, time.perf_counter(), 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the enclosed time as waiting for input."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    @contextlib.contextmanager
    def stopped(self) -> Iterator[Callable[[], float]]:
        """Excludes the enclosed time from the rates; yields a function for the seconds so far."""
        begin = time.perf_counter()
        yield lambda: time.perf_counter() - begin
        self._time += time.perf_counter() - begin

    def read(self, step: int, batch_size: int) -> dict[str, float]:
        """The rates since the last call."""
        seconds, steps = time.perf_counter() - self._time, step - self._step
        rates = {
            "seconds_per_step": seconds / steps,
            "samples_per_second": steps * batch_size / seconds,
            "input_wait_share": self._waited / seconds,
        }
        self._begin(step)
        return rates


def _summarize(workdir: Workdir, best_metric: str, config: Mapping[str, Any]) -> None:
    """Prints the change of the losses, a plateau warning if any, and the output paths."""
    rows = read_metrics(workdir)
    if not rows:
        return
    for name in dict.fromkeys([*(n for n in rows[0] if n.startswith("loss")), best_metric]):
        values = [row[name] for row in rows if name in row]
        if not values:
            continue
        first, last = values[0], values[-1]
        trend = "fell" if last < first else "rose" if last > first else ""
        print(f"{name:<15} {first:10.4f} -> {last:10.4f}  {trend}")
    if plateau := describe_plateau(rows, config):
        print(plateau)
    print(f"checkpoints:    {printable(workdir.checkpoints)} (newest: step {rows[-1]['step']})")
    print(f"metrics:        {printable(workdir.metrics_file)}")
    logdir = shlex.quote(str(workdir.tensorboard))
    print(f"TensorBoard:    tensorboard --logdir {logdir}", flush=True)
