"""Trains a kafjax config with a stopwatch, in a process of its own, for `benchmarks.nnunet`.

    python -m benchmarks.nnunet_ours --config own_finetune:scratch ... --seconds 600 --report FILE

Without `--num_steps` it takes a few steps, to time them. The clock starts with the process, so
imports, compilation and the last checkpoint count; `benchmarks.nnunet` turns off XLA's cache.
"""

import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags

from kafjax.commands import parse_flags, run_command
from kafjax.config_files import define_config
from kafjax.training.loop import train
from kafjax.training.preflight import open_run_dataset, run_epoch, split_run
from kafjax.xla import leave_out_ynnpack

TIMED_STEPS = 20


def set_length(config: Any, num_steps: int | None, epoch: int) -> None:
    """Makes a run and its schedule as long as `num_steps`, to within half an epoch.

    Args:
      config: to change. It validates and draws nothing and saves only its end, so that all of its
        time is training.
      num_steps: None for the few that are timed.
      epoch: steps.
    """
    steps = num_steps or TIMED_STEPS
    if num_steps is None or steps < epoch:
        config.num_epochs, config.num_steps = math.ceil(steps / epoch), steps
    else:
        config.num_epochs, config.num_steps = round(steps / epoch), None
    config.every.update({"picture": 0, "validation_epochs": 0, "checkpoint": 10**6})
    config.checkpoint.select = "last"


def report_of(seconds: list[float], end: float) -> dict[str, Any]:
    """The times of a run, from the clock after each of its steps and at its end.

    The first two steps compile or wait for what does, so the pace is the mean of the others.
    """
    steps = [b - a for a, b in itertools.pairwise(seconds[1:])]
    return {
        "steps": len(seconds),
        "first_step_seconds": seconds[0],
        "step_seconds": statistics.fmean(steps) if steps else None,
        "seconds": end,
    }


def _clock() -> Callable[[], float]:
    return (
        time.process_time if flags.FLAGS.clock == "cpu" else lambda: time.time() - flags.FLAGS.begin
    )


def _run() -> int | None:
    config, clock, seconds = flags.FLAGS.config, _clock(), list[float]()
    dataset = open_run_dataset(config)
    split = split_run(config, dataset)
    set_length(config, flags.FLAGS.num_steps, run_epoch(config, dataset, split))
    received = train(config, flags.FLAGS.workdir, on_step=lambda *_: seconds.append(clock()))
    if received is None:
        Path(flags.FLAGS.report).write_text(json.dumps(report_of(seconds, clock())))
    return received


def main(_: list[str]) -> None:
    """Runs the command line."""
    leave_out_ynnpack()
    run_command(_run)


def _define_flags() -> None:
    """Not at import, because flags are those of the process and this module is imported too."""
    define_config("The run.")
    flags.DEFINE_string("workdir", None, "The run's folder.", required=True)
    flags.DEFINE_integer("num_steps", None, "About how many; default: only times some.")
    flags.DEFINE_enum("clock", "wall", ("wall", "cpu"), "Which seconds count.")
    flags.DEFINE_float("begin", None, "time.time() at the process's start.", required=True)
    flags.DEFINE_string("report", None, "JSON file of the times.", required=True)


if __name__ == "__main__":
    _define_flags()
    app.run(main, flags_parser=parse_flags)
