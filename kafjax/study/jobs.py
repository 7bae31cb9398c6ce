"""Runs commands that need each other on slots of this machine, or on the workers of a cluster.

A slot is a device, or a core of the CPU. A job is a command in a process of its own that resumes
where it was stopped, and a test of whether its work is done, which may be the work of another
process on a shared disk. LOGS/NAME.log takes its output and is locked while it runs.
"""

import contextlib
import enum
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, Self

from kafjax.cores import usable_cores
from kafjax.errors import UserError
from kafjax.study.processes import KILLED, Cluster, claim, open_process

_POLL_SECONDS = 0.2
# Between looks at work of other processes, which are reads from a shared disk.
_LOOK_SECONDS = 5.0
_QUERY = "import jax; print(jax.default_backend(), jax.local_device_count())"
# Variables that make a slot's device the only one its process sees.
_VISIBLE = {"gpu": ("CUDA_VISIBLE_DEVICES",), "tpu": ("TPU_VISIBLE_CHIPS",)}
_ALONE = {"tpu": {"TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1", "TPU_PROCESS_BOUNDS": "1,1,1"}}


class Job(NamedTuple):
    """A command and what it is for.

    Attributes:
      name: unique.
      command: arguments of Python, as in ("-m", "kafjax.main").
      log: the file that takes its output, after that of earlier starts.
      is_done: whether nothing is left to do.
      needs: names of the jobs that must be done before.
      work: of a network by name, how much of each kind, for a plan.
    """

    name: str
    command: tuple[str, ...]
    log: Path
    is_done: Callable[[], bool]
    needs: tuple[str, ...] = ()
    work: Mapping[str, tuple[int, ...]] = {}

    def __str__(self) -> str:
        return shlex.join(("python", *self.command))


class Slot(NamedTuple):
    """Where one job at a time runs: an environment, and the cores it may use (all if none)."""

    name: str
    environment: Mapping[str, str] = {}
    cores: tuple[int, ...] = ()


class Outcome(NamedTuple):
    """How it ended: names of jobs that failed, and the signal that stopped the rest, if any."""

    failed: tuple[str, ...] = ()
    received: int | None = None


class _State(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    DONE = enum.auto()
    FAILED = enum.auto()


class _Process(Protocol):
    """What this module needs of `subprocess.Popen`."""

    def poll(self) -> int | None:
        """The exit status, or None while it runs."""

    def send_signal(self, sig: int, /) -> None:
        """Sends a signal."""

    def terminate(self) -> None:
        """Stops it."""


class _Running(NamedTuple):
    process: _Process
    log: IO[bytes] | None
    slot: Slot | None
    begin: float
    told: list[int]  # the signals that were passed on


def find_slots(number: int | None = None) -> list[Slot]:
    """One slot for each local GPU or TPU chip; on CPU `number`, by default one for each core.

    The devices are asked for in another process, which gives them back.

    Raises:
      ValueError: JAX finds no device, or `number` is not from 1 to the number of devices or cores.
    """
    found = subprocess.run(
        [sys.executable, "-c", _QUERY], capture_output=True, text=True, check=False
    )
    if found.returncode:
        raise UserError(f"JAX finds no device: {_last_line(found.stderr)}")
    backend, count = found.stdout.split()[-2:]
    cores = usable_cores()
    most = len(cores) if backend == "cpu" else int(count)
    number = most if number is None else number
    if not 1 <= number <= most:
        what = "cores" if backend == "cpu" else f"{backend} devices"
        raise UserError(f"slots is {number}, expected 1 to {most}, the {what} there are")
    if backend == "cpu":
        # A job on a core of its own is faster than threads of several jobs over all.
        return [Slot(f"core {i}", {}, tuple(cores[i::number])) for i in range(number)]
    return [Slot(f"{backend} {i}", _environment(backend, i)) for i in range(number)]


def run_jobs(jobs: Sequence[Job], slots: Sequence[Slot], *, client: Any = None) -> Outcome:
    """Runs what is not done, as soon as a slot is free and what it needs is done.

    A job that fails is named with its log's last line, and so are those that need it; the others
    still run. SIGTERM and Ctrl-C are passed on to the running jobs, whose ends are waited for. A
    job that another process of this machine or disk is running is waited for.

    Args:
      jobs: a job comes after those that it needs.
      slots: as of `find_slots`.
      client: of a cluster (`kafjax.cluster`), whose workers take the place of the slots. A job
        whose worker dies resumes on another.
    """
    with _Scheduler(jobs, slots, client) as scheduler:
        return scheduler.run()


class _Scheduler:
    """The loop over jobs, and the signals that stop it."""

    def __init__(self, jobs: Sequence[Job], slots: Sequence[Slot], client: Any) -> None:
        self._jobs = {job.name: job for job in jobs}
        self._free = list(slots)
        self._remote = None if client is None else Cluster(client)
        self._states = {job.name: _State.DONE if job.is_done() else _State.WAITING for job in jobs}
        self._total = sum(state is _State.WAITING for state in self._states.values())
        self._started = 0
        self._running: dict[str, _Running] = {}
        self._looks: dict[str, float] = {}  # when to look again for what another process runs
        self._signals: list[int] = []

    def __enter__(self) -> Self:
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number: int, _: Any) -> None:
        self._signals.append(number)

    def __exit__(self, *_: object) -> None:
        for running in self._running.values():  # only after a mistake of ours
            running.process.terminate()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self) -> Outcome:
        """Runs all jobs to completion."""
        done = len(self._states) - self._total
        where = "a cluster" if self._remote else f"{len(self._free)} slots"
        _say(f"{len(self._states)} jobs, {done} done before, {where}")
        while True:
            self._reap()
            if not self._signals:
                self._start_ready()
            self._pass_on_signals()
            if not self._running and (self._signals or not self._names(_State.WAITING)):
                break
            time.sleep(_POLL_SECONDS)
        return Outcome(tuple(self._names(_State.FAILED)), next(iter(self._signals), None))

    def _names(self, state: _State) -> list[str]:
        return [name for name, found in self._states.items() if found is state]

    def _pass_on_signals(self) -> None:
        """Tells running jobs of each signal once: the first stops them well, the second at once."""
        for name, running in self._running.items():
            if (number := len(self._signals)) > len(running.told):
                running.told[:] = self._signals[:number]
                running.process.send_signal(signal.SIGTERM)
                _say(f"stopping {name}, which saves what it has")

    def _reap(self) -> None:
        for name, running in list(self._running.items()):
            status = running.process.poll()
            if status is None:
                continue
            del self._running[name]
            if running.log is not None and running.slot is not None:
                running.log.close()
                self._free.append(running.slot)
            self._end(self._jobs[name], status, _now() - running.begin)

    def _end(self, job: Job, status: int, seconds: float) -> None:
        spent = f"{job.name} after {timedelta(seconds=round(seconds))}"
        if status == 0 and job.is_done():
            self._states[job.name] = _State.DONE
            left = len(self._names(_State.WAITING)) + len(self._running)
            _say(f"done     {spent}; {left} left")
        elif self._signals:
            self._states[job.name] = _State.WAITING
            _say(f"stopped  {spent}")
        else:
            what = f"status {status}" if status else "its work is not done"
            if self._remote and status == KILLED:
                what = "its workers were killed, one after the other"
            self._fail(job, spent, f"({what}): {_last_line(_tail(job.log))} [{job.log}]")

    def _start_ready(self) -> None:
        for name in self._names(_State.WAITING):
            job = self._jobs[name]
            states = {needed: self._states[needed] for needed in job.needs}
            if failed := [n for n, state in states.items() if state is _State.FAILED]:
                self._fail(job, f"{name}:", f"not started, it needs {', '.join(failed)}")
            elif set(states.values()) - {_State.DONE}:
                continue
            elif self._remote:
                self._set_running(
                    job,
                    _Running(
                        self._remote.start(str(job), job.command, job.log, job.is_done),
                        None,
                        None,
                        _now(),
                        [],
                    ),
                )
            elif self._free:
                self._start(job)

    def _fail(self, job: Job, what: str, why: str) -> None:
        self._states[job.name] = _State.FAILED
        _say(f"FAILED   {what} {why}")

    def _start(self, job: Job) -> None:
        if self._looks.get(job.name, 0.0) > _now():
            return  # another process had it a moment ago
        log = claim(job.log)
        if log is None:
            if job.name not in self._looks:
                _say(f"waiting  for {job.name}, which another process runs")
            self._looks[job.name] = _now() + _LOOK_SECONDS
            return
        if job.name in self._looks and job.is_done():
            log.close()
            self._states[job.name] = _State.DONE
            _say(f"done     {job.name}, by another process")
            return
        slot = self._free.pop(0)
        process = open_process(str(job), job.command, log, slot.environment)
        if slot.cores and hasattr(os, "sched_setaffinity"):
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(process.pid, slot.cores)
        self._set_running(job, _Running(process, log, slot, _now(), []))

    def _set_running(self, job: Job, running: _Running) -> None:
        self._states[job.name] = _State.RUNNING
        self._running[job.name] = running
        self._started += 1
        where = running.slot.name if running.slot else "the cluster"
        _say(f"start    {job.name} ({self._started} of {self._total}) on {where}: {job}")


def _environment(backend: str, index: int) -> dict[str, str]:
    """Shows a process the device of an index among those that this process may see."""
    environment = dict(_ALONE.get(backend, {}))
    for variable in _VISIBLE.get(backend, ()):
        visible = [part for part in os.environ.get(variable, "").split(",") if part]
        environment[variable] = visible[index] if visible else str(index)
    return environment


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        return file.read().decode(errors="replace")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def _now() -> float:
    return time.monotonic()


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)
