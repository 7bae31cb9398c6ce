"""Processes of one run: an error in one ends all of them, each with the reason.

If only one process raised, the others would wait in their next collective operation until its
heartbeat times out, and report a network error.
"""

import atexit
import contextlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from kafjax.errors import LOST, TRY_AGAIN, UserError

_LONGEST = 2000  # bytes of a reason


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_seconds: int,
) -> None:
    """`jax.distributed.initialize`; exits with status 75 if a process or the network is lost.

    JAX's own heartbeat aborts with a stack trace; it is set later, for what this one misses.

    Args:
      coordinator: address of process 0; by default as the job that JAX recognises has it.
      num_processes: likewise.
      process_id: this process's number, likewise.
      heartbeat_seconds: without a sign from a process, until it counts as lost.
    """
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        heartbeat_timeout_seconds=2 * heartbeat_seconds + 30,
    )
    _Watch(heartbeat_seconds).start()


class _Watch:
    """Threads that give signs of this process and look for those of the others.

    A sign is a growing number in the key-value store of process 0. The thread that gives them may
    wait for the network, so another looks at the time.
    """

    _FOLDER = "kafjax/alive/"

    def __init__(self, seconds: int):
        from jax._src.distributed import global_state  # the store has no public function

        self._client: Any = global_state.client
        self._own = str(global_state.process_id)
        self._seconds = seconds
        self._ended = threading.Event()
        # The newest sign of each process, by key, and when it was seen; process 0 has the store.
        self._seen = {f"{self._FOLDER}0": ("", time.monotonic())}

    def start(self) -> None:
        """Starts both threads; the exit of the program ends them."""
        atexit.register(self._ended.set)
        for run in (self._give, self._look):
            threading.Thread(target=run, daemon=True).start()

    def _give(self) -> None:
        for number in itertools.count():
            try:
                key = self._FOLDER + self._own
                self._client.key_value_set(key, str(number), allow_overwrite=True)
                signs = dict(self._client.key_value_dir_get(self._FOLDER))
            except Exception:  # of the network: what is missed counts
                signs = {}
            now = time.monotonic()
            for name, sign in signs.items():
                if self._seen.get(name, ("", 0.0))[0] != sign:
                    self._seen[name] = sign, now
            time.sleep(min(1.0, self._seconds / 5))

    def _look(self) -> None:
        while not self._ended.wait(min(1.0, self._seconds / 5)):
            now = time.monotonic()
            silent = [
                name.rpartition("/")[2]
                for name, (_, seen) in list(self._seen.items())
                if now - seen > self._seconds
            ]
            if silent:
                self._end(silent)

    def _end(self, silent: list[str]) -> None:
        """Exits: the main thread may wait for the lost process in a collective operation."""
        others = ", ".join(sorted(set(silent) - {self._own}))
        reason = f"no sign from process {others} for {self._seconds} s"
        print(f"error: {LOST} ({reason})", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(TRY_AGAIN)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Runs code that each process executes separately; if one raises, all do.

    The code must not wait for other processes.

    Raises:
      UserError: another process raised; the message names it and its reason.
    """
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    reasons = gather("" if error is None else str(error) or type(error).__name__)
    if error is not None:
        raise error
    for process, reason in enumerate(reasons):
        if reason:
            raise UserError(f"process {process} ended: {reason}")


def check_same(what: str, found: str) -> None:
    """Raises `UserError` on all processes unless all have the same text."""
    texts = gather(found)
    if len(set(texts)) > 1:
        differing = "\n".join(f"  process {i}: {text}" for i, text in enumerate(texts))
        raise UserError(f"the processes differ in {what}; expected the same:\n{differing}")


def gather(text: str) -> list[str]:
    """Each process's text, in process order; all must make this call."""
    if jax.process_count() == 1:
        return [text]
    content = text.encode(errors="backslashreplace")[:_LONGEST]
    buffer = np.zeros(_LONGEST, np.uint8)
    buffer[: len(content)] = np.frombuffer(content, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(buffer)).reshape(-1, _LONGEST)
    return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in rows]
