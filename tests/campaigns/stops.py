"""Signals that stop a run, and runs of two processes where one is killed."""

import contextlib
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.campaigns.campaign import Tally
from tests.campaigns.cases import (
    HEARTBEAT,
    Case,
    differences,
    make_dataset,
    run_undisturbed,
    stop_at,
    unreadable,
)
from tests.campaigns.forks import Fork

_SECONDS = 6.0  # for a checkpoint, and a second for the step


def signals(folder: Path, rng: np.random.Generator, count: int) -> Iterator[Tally]:
    """With jax.distributed and without: the status is the signal's, and no step is lost."""
    dataset = make_dataset(folder)
    warm = Tally("")  # compiles what the runs share, whatever their length
    run_undisturbed(Case("segment", dataset, folder / "good", {"num_epochs": 1}), warm)
    for number in (signal.SIGTERM, signal.SIGINT):
        for distributed in (False, True):
            tally = Tally(f"{number.name} {'with' if distributed else 'without'} jax.distributed")
            tally.wrong += warm.wrong
            for i in range(max(1, count // 4)):
                name = f"{number.name}_{distributed}_{i}"
                case = Case("segment", dataset, folder / name, {"num_epochs": 40})
                options = {"address": _free_address()} if distributed else {}
                step = int(rng.integers(1, 12))
                status, seconds = stop_at(case, step, 1, number, **options)
                tally.expect(*_judge_stop(case, status, 128 + number, seconds))
            yield tally


def _judge_stop(case: Case, status: Any, expected: int, seconds: float) -> tuple[bool, str]:
    """Within the time there is a checkpoint of the last step, and the status is the signal's."""
    now, saved = case.step(), (case.saved() or [0])[-1]
    (problem,) = unreadable([case.workdir], case.workdir.with_suffix(".read.log"))
    holds = status == expected and seconds < _SECONDS and saved == now and not problem
    what = f"status {status}, {seconds:.1f} s, step {now}, checkpoint {saved} {problem}"
    return holds, f"{what}: {case.output()}"


def pairs(folder: Path, rng: np.random.Generator, count: int) -> Iterator[Tally]:
    """Two processes on this machine: one is killed, the other ends; both restarted: exact."""
    dataset = make_dataset(folder)
    tally = Tally("two processes, one killed: the other ends; both again: exact")
    good = Case("pretrain", dataset, folder / "good")
    with _pair(good) as both:
        problem = [run.wait() for run in both]
    if any(problem):
        tally.add("unclear", f"the undisturbed pair ended with {problem}: {good.output()}")
    for i in range(count):
        case = Case("pretrain", dataset, folder / f"pair_{i}")
        victim, step = i % 2, int(rng.integers(2, max(3, good.step() - 2)))
        status, seconds = _kill_one(case, victim, step)
        ended = status not in (None, 0) and seconds <= HEARTBEAT + 10
        tally.expect(ended, f"the other ended with {status} after {seconds:.0f} s")
        with _pair(case) as both:
            statuses = [run.wait() for run in both]
        problem_now = f"{statuses}: {case.output()}" if any(statuses) else differences(case, good)
        tally.expect(not problem_now, problem_now, otherwise="silent")
    yield tally


def _kill_one(case: Case, victim: int, step: int) -> tuple[int | None, float]:
    """How the other of two processes ends, and after how many seconds."""
    with _pair(case) as both:
        both[0].wait(until=lambda: case.step() >= step)
        both[victim].send(signal.SIGKILL)
        begin = time.monotonic()
        return both[1 - victim].wait(limit=HEARTBEAT + 60), time.monotonic() - begin


@contextlib.contextmanager
def _pair(case: Case) -> Iterator[tuple[Fork, Fork]]:
    options: dict[str, Any] = {"address": _free_address(), "count": 2}
    with case.fork(**options, index=0) as first, case.fork(**options, index=1) as second:
        yield first, second


def _free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"
