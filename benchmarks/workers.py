"""The protocol: each side in a fresh process, called turn about, medians of paired calls.

A fresh process gives each side its own memory (so that its peak can be measured), its own start,
and the C library's settings, which only a process's start can change. In its turn a side makes each
call twice, and the second is timed: a call after idling is slower, for XLA by up to 40 %. A long
call is made once; where there are shorter ones too, they come before it.
"""

import contextlib
import importlib
import math
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

_FEWEST_TURNS = 3
_LONG = 5.0  # seconds of a call that is not repeated
# Compile times are of a first start.
NO_CACHE = {"JAX_ENABLE_COMPILATION_CACHE": "false"}


class Side(NamedTuple):
    """One of the compared.

    Attributes:
      calls: by name; each returns when its work is done.
      facts: what making it has shown, such as seconds of compilation.
    """

    calls: dict[str, Callable[[], Any]]
    facts: dict[str, float]


class SideError(RuntimeError):
    """A side that could not be made or called, such as for lack of memory."""


class Worker:
    """A process that makes a side and then waits for calls."""

    def __init__(self, make: str, *args: Any, environment: Mapping[str, str] = {}):
        """Starts making the side that `make`, 'module:function', gives for the arguments."""
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, make, args), daemon=False)
        with _environment(environment):
            self._process.start()
        other.close()
        self.facts: dict[str, float] = {}

    def wait(self) -> dict[str, float]:
        """Waits for the side to be made; its facts. Raises `SideError`."""
        self.facts = self._receive()
        return self.facts

    def seconds(self, call: str) -> float:
        """The second of two calls, or a long one. Raises `SideError`."""
        self._pipe.send(("call", call))
        return self._receive()

    def ask(self, call: str) -> Any:
        """What one call returns. Raises `SideError`."""
        self._pipe.send(("ask", call))
        return self._receive()

    def peak_memory(self) -> int:
        """Most bytes that the process has ever had in memory."""
        self._pipe.send(("peak", ""))
        return self._receive()

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(OSError):
            self._pipe.send(("end", ""))
        self._process.join(10)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def _receive(self) -> Any:
        try:
            ok, value = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise SideError(
                f"the process ended with {self._process.exitcode} (-9: out of memory)"
            ) from None
        if not ok:
            raise SideError(value)
        return value


@contextlib.contextmanager
def workers(
    makers: Mapping[str, tuple[Any, ...]], environment: Mapping[str, str] = {}
) -> Iterator[dict[str, Worker]]:
    """Sides by name, each ('module:function', arguments...) in a process, made one after the other.

    Raises `SideError` where one cannot be made.
    """
    started: dict[str, Worker] = {}
    try:
        for name, (make, *args) in makers.items():
            started[name] = Worker(make, *args, environment=environment)
            started[name].wait()
        yield started
    finally:
        for worker in started.values():
            worker.close()


def take_turns(
    sides: Mapping[str, Worker], calls: Sequence[str], turns: int, limit: float = math.inf
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each call of each side, [side][call], a number for each turn.

    After three turns none is begun when `limit` seconds are over.
    """
    seconds: dict[str, dict[str, list[float]]] = {
        side: {call: [] for call in calls} for side in sides
    }
    begin = time.perf_counter()
    for turn in range(turns):
        if turn >= _FEWEST_TURNS and time.perf_counter() - begin > limit:
            break
        for side, worker in sides.items():
            for call in calls:
                seconds[side][call].append(worker.seconds(call))
    return seconds


def time_paired(call: Callable[[], Any], turns: int) -> float:
    """Median seconds of the second of two calls, or of long ones."""
    return statistics.median(_paired(call) for _ in range(turns))


def peak_memory() -> int:
    """Most bytes that this process has ever had in memory."""
    with contextlib.suppress(OSError), open("/proc/self/status") as lines:
        # Linux's getrusage would count the process that started this one.
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _paired(call: Callable[[], Any]) -> float:
    seconds = _seconds(call)
    return seconds if seconds > _LONG else _seconds(call)


def _seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _serve(pipe: Connection, make: str, args: tuple[Any, ...]) -> None:
    try:
        module, function = make.split(":")
        side: Side = getattr(importlib.import_module(module), function)(*args)
        pipe.send((True, side.facts))
    except Exception as error:
        pipe.send((False, _one_line(error)))
        return
    answers: dict[str, Callable[[str], Any]] = {
        "call": lambda name: _paired(side.calls[name]),
        "ask": lambda name: side.calls[name](),
        "peak": lambda _: peak_memory(),
    }
    while True:
        try:
            kind, name = pipe.recv()
        except EOFError:  # whoever asked is gone
            return
        if kind == "end":
            return
        try:
            pipe.send((True, answers[kind](name)))
        except Exception as error:
            pipe.send((False, _one_line(error)))


def _one_line(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {text[:200]}"


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
