"""The training loop: steps, logs, validation, pictures and checkpoints of one run.

What a step computes depends only on the state, the seed and the step's number, so a run resumes
from its step. The loop never learns what a keypoint is, nor what validation counts.
"""

import collections
import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from kafjax.checkpoint.checkpointer import Checkpointer, check_config
from kafjax.data.input_pipeline import (
    BatchOptions,
    SliceDataset,
    steps_per_epoch,
)
from kafjax.tasks.registry import TASKS
from kafjax.training.config_checks import check_fields
from kafjax.training.preflight import check_devices, open_run_dataset, split_run
from kafjax.training.step import (
    AXIS_NAME,
    Batch,
    TrainState,
    init_state,
    learning_rates,
    make_optimizer,
    make_update,
    on_devices,
    replicate,
    shard,
    start_averages,
    unreplicate,
)
from kafjax.training.transfer import check_facts_alike, start_from
from kafjax.training.validation import Validation
from kafjax.workdir.environment import write_environment
from kafjax.workdir.metrics import (
    METRICS_FILE,
    TENSORBOARD_DIR,
    MetricMeans,
    MetricWriter,
    read_metrics,
)
from kafjax.workdir.preparation import write_preparation


class _Signals:
    """Notes SIGTERM and Ctrl-C instead of dying of the first; a second one acts as usual.

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


class _InFlight(NamedTuple):
    """A step that was given to the devices: its number, results to come, and records."""

    step: int
    metrics: dict[str, jax.Array]
    records: np.ndarray


def train(config: Any, workdir: str | os.PathLike[str]) -> int | None:
    """Trains as `config` says, from the workdir's last checkpoint or from the start.

    Args:
      config: see `configs/`.
      workdir: holds or will hold the run's checkpoints, metrics and pictures.

    Returns:
      None when the run is complete; the signal's number when one stopped it, after a checkpoint.

    Raises:
      ValueError: the config, the dataset and the workdir do not fit each other.
      FloatingPointError: the loss is not finite; the message names the step and the slices.
    """
    check_fields(config)
    check_devices(config)
    fields = config.to_dict()
    check_config(workdir, fields)
    dataset = open_run_dataset(config)
    run = _Run(config, workdir, dataset)  # first: a mistake in the config leaves no workdir
    keep = config.checkpoint
    with Checkpointer(
        workdir,
        keep_newest=keep.keep_newest,
        keep_best=keep.keep_best,
        best_metric=run.kind.best_metric,
        best_mode=run.kind.best_mode,
        config=fields,
    ) as checkpointer:
        if jax.process_index() == 0:
            write_preparation(workdir, dataset.metadata)
            write_environment(workdir)
        received = run.run(checkpointer)
    if received is None and jax.process_index() == 0:
        _summarize(Path(workdir), run.kind.best_metric)
    return received


def _summarize(workdir: Path, best_metric: str) -> None:
    """Prints how the losses fell and where everything is."""
    rows = read_metrics(workdir)
    for name in dict.fromkeys([*(n for n in rows[0] if n.startswith("loss")), best_metric]):
        values = [row[name] for row in rows if name in row]
        if not values:
            continue
        first, last = values[0], values[-1]
        trend = "fell" if last < first else "rose" if last > first else ""
        print(f"{name:<15} {first:10.4f} -> {last:10.4f}  {trend}")
    print(f"checkpoints:    {workdir / 'checkpoints'} (the newest is of step {rows[-1]['step']})")
    print(f"metrics:        {workdir / METRICS_FILE}")
    print(f"TensorBoard:    tensorboard --logdir {workdir / TENSORBOARD_DIR}", flush=True)


class _Run:
    """One run: its parts, made once, and its loop."""

    def __init__(
        self,
        config: Any,
        workdir: str | os.PathLike[str],
        dataset: SliceDataset,
    ):
        self.kind = TASKS[config.task]
        self._config = config
        self._workdir = workdir
        self._dataset = dataset
        if "init_from" in config and not (Path(workdir) / "checkpoints").exists():
            check_facts_alike(config.init_from, config)
        self._task = self.kind.task(config, axis_name=AXIS_NAME)
        self._split = split_run(config, dataset)
        self._steps_per_epoch = steps_per_epoch(dataset, config.batch_size, self._split.train)
        schedule_steps = config.num_epochs * self._steps_per_epoch
        self._num_steps = min(config.num_steps or schedule_steps, schedule_steps)
        self._rates = learning_rates(config.optimizer, schedule_steps)
        self._optimizer = make_optimizer(config.optimizer, frozen=self.kind.frozen)
        self._in_flight: collections.deque[_InFlight] = collections.deque()
        self._last_loss = float("nan")

    def run(self, checkpointer: Checkpointer) -> int | None:
        """Trains to the end; None, or the number of the signal that stopped the run before."""
        self._checkpointer = checkpointer
        state, saved = self._begin()
        start = int(state.step)
        if start >= self._num_steps:
            print(f"{self._workdir} is complete: {start} of {self._num_steps} steps.", flush=True)
            return None
        self._means = MetricMeans(saved.get("means"))
        # The newest steps whose checkpoints are known to be whole, and were begun.
        self._whole = self._begun = start
        self._clock = _Clock(start)
        with (
            MetricWriter(
                self._workdir,
                start_step=start,
                num_steps=self._num_steps,
                enabled=jax.process_index() == 0,
            ) as self._writer,
            _Signals() as signals,
        ):
            return self._train(on_devices(state), start, signals)

    def _begin(self) -> tuple[TrainState, dict[str, Any]]:
        """The state of the last checkpoint and what was saved with it, or that of a new run."""
        averages = self._config.optimizer.average_decay > 0
        state = init_state(self._task, self._optimizer, averages=averages)
        restored = self._checkpointer.restore_latest(state)
        if restored is not None:
            print(f"Resuming {self._workdir} from step {restored[0].step}.", flush=True)
            return restored
        if "init_from" in self._config:
            fresh = {"params": state.params, "batch_stats": state.batch_stats}
            variables, report = start_from(self._config.init_from, self._config, fresh)
            state = dataclasses.replace(state, **variables)
            state = start_averages(state) if averages else state
            if jax.process_index() == 0:
                print(f"Starting from {self._config.init_from}:\n{report}", flush=True)
        return state, {}

    def _train(self, state: TrainState, start: int, signals: _Signals) -> int | None:
        decay = self._config.optimizer.average_decay
        update = make_update(self._task, self._optimizer, average_decay=decay)
        if self._split.validation:
            options, volumes = self._batch_options(), self._split.validation
            self._validation = Validation(self._task, self._dataset, options, volumes)
        with contextlib.closing(self._batches(start)) as batches:
            return self._loop(update, state, batches, start, signals)

    def _loop(
        self,
        update: Callable[..., tuple[TrainState, dict[str, jax.Array]]],
        state: TrainState,
        batches: Iterator[Batch],
        start: int,
        signals: _Signals,
    ) -> int | None:
        checkpoint_every = self._config.every.checkpoint
        for step in range(start + 1, self._num_steps + 1):
            with self._clock.waiting():
                batch = next(batches)
            self._show(step, batch)
            scalars = replicate((self._rates[step - 1], np.int32(signals.received)))
            state, metrics = update(state, shard(batch), *scalars)
            self._in_flight.append(_InFlight(step, metrics, batch["record"]))
            # One step stays in flight, so that the device never waits for the host.
            received = self._settle(keep=1)
            self._checkpointer.check()
            validates = self._validates(step)
            if received or validates or step % checkpoint_every == 0 or step == self._num_steps:
                received = self._settle(keep=0) or received
                self._save(step, state, self._validate(step, state) if validates else {})
            if received:
                self._checkpointer.wait()
                return received
        # One that came with the last step stops nothing here, but whoever runs several runs.
        return signals.received or None

    def _batches(self, start: int) -> Any:
        options, volumes = self._batch_options(), self._split.train
        return self.kind.batches(self._dataset, options, volumes=volumes, start_step=start)

    def _batch_options(self) -> BatchOptions:
        return BatchOptions(
            batch_size=self._config.batch_size,
            patch_size=tuple(self._config.data.patch_size),
            seed=self._config.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_threads=self._config.data.num_threads,
            foreground_share=self._config.data.get("foreground_share", 0.0),
        )

    def _validates(self, step: int) -> bool:
        """Whether validation follows the step: at the end of every so many epochs, and at last."""
        if not self._split.validation:
            return False
        due = self._config.every.validation_epochs * self._steps_per_epoch
        return step == self._num_steps or (due > 0 and step % due == 0)

    def _validate(self, step: int, state: TrainState) -> dict[str, float]:
        with self._clock.stopped() as seconds:
            scores = self._validation.scores(state)
            self._writer.write(step, scores, {"validation_seconds": seconds()})
            if self._shows_validation(step):
                for name, image in self._validation.pictures(state).items():
                    self._writer.picture(step, name, image)
        return scores

    def _shows_validation(self, step: int) -> bool:
        """Whether slices are drawn: first, last, and when `every.picture` steps have gone by."""
        every = self._config.every.picture
        due = self._config.every.validation_epochs * self._steps_per_epoch
        ends = step <= due or step == self._num_steps
        return bool(every) and (ends or step // every > (step - due) // every)

    def _show(self, step: int, batch: Batch) -> None:
        """Draws the first step's batch, and then one now and again; none where it is every 0."""
        every = self._config.every.picture
        if every and (step == 1 or step % every == 0) and jax.process_index() == 0:
            for name, image in self._task.picture(batch).items():
                self._writer.picture(step, name, image)

    def _settle(self, *, keep: int) -> int:
        """Takes in the results of all but the last `keep` steps; the signal that stops, or 0."""
        received = 0
        while len(self._in_flight) > keep:
            step, device_metrics, records = self._in_flight.popleft()
            self._secure(step)
            metrics = {name: float(x) for name, x in unreplicate(device_metrics).items()}
            received = max(received, int(metrics.pop("stop")))
            if not np.isfinite(metrics["loss"]):
                names = ", ".join(map(self._dataset.describe_record, np.ravel(records)))
                raise FloatingPointError(
                    f"the loss is {metrics['loss']} at step {step}; its batch holds {names}"
                )
            self._means.add(metrics)
            self._writer.advance()
            if step % self._config.every.log == 0 or step == self._num_steps:
                self._log(step)
        return received

    def _secure(self, step: int) -> None:
        """Waits for the checkpoint in work if a kill after this step would lose over an interval.

        The device goes on meanwhile: a save that takes no longer than the steps in flight is free.
        """
        if step - self._whole > self._config.every.checkpoint:
            self._checkpointer.wait()
            self._whole = self._begun

    def _log(self, step: int) -> None:
        metrics = {
            **self._means.take(),
            "learning_rate": float(self._rates[step - 1]),
            "epoch": step / self._steps_per_epoch,
        }
        self._last_loss = metrics["loss"]
        self._writer.write(step, metrics, self._clock.read(step, self._config.batch_size))

    def _save(self, step: int, state: TrainState, scores: dict[str, float]) -> None:
        self._checkpointer.save(
            step,
            unreplicate(state),
            metrics={"loss": self._last_loss, **scores},
            data={"step": step, "means": self._means.state()},
        )
        self._whole, self._begun = self._begun, step  # as a save waits for the one before


class _Clock:
    """Rates between two logs, and the share of the time spent waiting for input."""

    def __init__(self, step: int):
        self._begin(step)

    def _begin(self, step: int) -> None:
        self._step, self._time, self._waited = step, time.perf_counter(), 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts what is inside as waiting for input."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    @contextlib.contextmanager
    def stopped(self) -> Iterator[Callable[[], float]]:
        """Leaves the time that is spent inside out of the rates; gives the seconds so far."""
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
