"""Runs commands that need each other on slots: devices of this machine, or cores of its CPU.

A job is a command in a process of its own that resumes where it was stopped, and a test of whether
its work is done, which may be the work of another process on a shared disk.

    LOGS/NAME.log       its output, locked while it runs
    LOGS/NAME.failed    why and where it failed, for the shards that wait for it; its shard's next
                        start removes it
"""

import contextlib
import enum
import fcntl
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

from kafjax.cores import usable_cores
from kafjax.errors import UserError
from kafjax.files import read_text, write_text

_POLL_SECONDS = 0.2
# Between looks at work of other machines, which are reads from a shared disk.
_LOOK_SECONDS = 5.0
# For shards that are started anew together: how long one believes that the marks of failures that
# it finds are about to be removed.
_GRACE_SECONDS = 30.0
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

    @property
    def mark(self) -> Path:
        """The file that is there after a failure; see the module."""
        return self.log.with_suffix(".failed")

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


class _Running(NamedTuple):
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    slot: Slot
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


def run_jobs(
    jobs: Sequence[Job],
    slots: Sequence[Slot],
    *,
    is_ours: Callable[[int], bool] = lambda index: True,
) -> Outcome:
    """Runs what is not done, as soon as a slot is free and what it needs is done.

    A job that fails is named with its log's last line, and so are those that need it, in every
    shard; the others still run. SIGTERM and Ctrl-C are passed on to the running jobs, whose ends
    are waited for. A job that another process of this machine or disk is running is waited for.

    Args:
      jobs: a job comes after those that it needs.
      slots: as of `find_slots`.
      is_ours: whether the job of an index is to be run here; the others are only waited for.
    """
    with _Scheduler(jobs, slots, is_ours) as scheduler:
        return scheduler.run()


class _Scheduler:
    """The loop over jobs, and the signals that stop it."""

    def __init__(
        self, jobs: Sequence[Job], slots: Sequence[Slot], is_ours: Callable[[int], bool]
    ) -> None:
        self._jobs = {job.name: job for job in jobs}
        self._free = list(slots)
        self._states = {
            job.name: _State.DONE if job.is_done() else _State.WAITING
            for i, job in enumerate(jobs)
            if is_ours(i)
        }
        self._total = sum(state is _State.WAITING for state in self._states.values())
        self._started = 0
        self._running: dict[str, _Running] = {}
        self._looks: dict[str, tuple[float, _State]] = {}
        self._said: set[str] = set()
        self._signals: list[int] = []
        self._begin = time.monotonic()
        for name in self._states:
            self._jobs[name].mark.unlink(missing_ok=True)
        self._old_marks = {job.name: _stamp(job.mark) for job in jobs}

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
        """Runs all of our jobs to completion."""
        done = len(self._states) - self._total
        _say(f"{len(self._states)} jobs, {done} done before, {len(self._free)} slots")
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
            running.log.close()
            del self._running[name]
            self._free.append(running.slot)
            self._end(self._jobs[name], status, time.monotonic() - running.begin)

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
            self._fail(job, spent, f"({what}): {_last_line(_tail(job.log))} [{job.log}]")

    def _start_ready(self) -> None:
        for name in self._names(_State.WAITING):
            job = self._jobs[name]
            states = {needed: self._state_of(needed) for needed in job.needs}
            if failed := [n for n, state in states.items() if state is _State.FAILED]:
                reasons = ", ".join(map(self._describe_failure, failed))
                self._fail(job, f"{name}:", f"not started, it needs {reasons}")
            elif self._free and set(states.values()) <= {_State.DONE}:
                self._start(job)

    def _fail(self, job: Job, what: str, why: str) -> None:
        self._states[job.name] = _State.FAILED
        _say(f"FAILED   {what} {why}")
        job.mark.parent.mkdir(parents=True, exist_ok=True)
        write_text(job.mark, f"on {platform.node()}: {why}\n")

    def _describe_failure(self, name: str) -> str:
        """The name of a failed job, with the reason where another shard ran it."""
        if name in self._states:
            return name
        return f"{name}, which failed {read_text(self._jobs[name].mark).strip()}"

    def _state_of(self, name: str) -> _State:
        """The state of a job that another needs; says once that it is another shard's."""
        if name in self._states:
            return self._states[name]
        state = self._look(name)
        if state is _State.WAITING:
            self._say_once(name, f"waiting  for {name}, which another shard runs")
        return state

    def _look(self, name: str) -> _State:
        """What another process has done, as of the last look; looks again only after some time."""
        due, state = self._looks.get(name, (0.0, _State.WAITING))
        if state is not _State.DONE and time.monotonic() >= due:
            job = self._jobs[name]
            failed = _State.FAILED if self._is_marked(job) else _State.WAITING
            state = _State.DONE if job.is_done() else failed
            self._looks[name] = (time.monotonic() + _LOOK_SECONDS, state)
        return state

    def _is_marked(self, job: Job) -> bool:
        stamp = _stamp(job.mark)
        grace = time.monotonic() < self._begin + _GRACE_SECONDS
        return stamp is not None and not (grace and stamp == self._old_marks[job.name])

    def _start(self, job: Job) -> None:
        if self._looks.get(job.name, (0.0,))[0] > time.monotonic():
            return  # another process had it a moment ago
        log = _claim(job.log)
        if log is None:
            self._look(job.name)
            self._say_once(job.name, f"waiting  for {job.name}, which another process runs")
            return
        if job.name in self._looks and job.is_done():
            log.close()
            self._states[job.name] = _State.DONE
            _say(f"done     {job.name}, by another process")
            return
        slot = self._free.pop(0)
        self._started += 1
        log.write(f"$ {job}\n".encode(errors="backslashreplace"))
        log.flush()
        # In a session of its own, so that Ctrl-C at a terminal reaches it once, through us.
        process = subprocess.Popen(
            [sys.executable, *job.command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **slot.environment},
            start_new_session=True,
        )
        if slot.cores and hasattr(os, "sched_setaffinity"):
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(process.pid, slot.cores)
        self._states[job.name] = _State.RUNNING
        self._running[job.name] = _Running(process, log, slot, time.monotonic(), [])
        _say(f"start    {job.name} ({self._started} of {self._total}) on {slot.name}: {job}")

    def _say_once(self, name: str, text: str) -> None:
        if name not in self._said:
            self._said.add(name)
            _say(text)


def _claim(path: Path) -> IO[bytes] | None:
    """The log, open to append and locked while it is open; None while another process has it.

    A job's process has it too, so that one whose parent was killed is not started again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    log = path.open("ab")
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.close()
        return None
    return log


def _environment(backend: str, index: int) -> dict[str, str]:
    """Shows a process the device of an index among those that this process may see."""
    environment = dict(_ALONE.get(backend, {}))
    for variable in _VISIBLE.get(backend, ()):
        visible = [part for part in os.environ.get(variable, "").split(",") if part]
        environment[variable] = visible[index] if visible else str(index)
    return environment


def _stamp(mark: Path) -> int | None:
    """Tells a mark from one that replaces it; None where there is none."""
    with contextlib.suppress(FileNotFoundError):
        return mark.stat().st_mtime_ns
    return None


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        return file.read().decode(errors="replace")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)
