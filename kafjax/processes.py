"""Processes of one run: an error in one ends all of them, each with the reason.

If only one process raised, the others would wait in their next collective operation until its
heartbeat times out, and report a network error.
"""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from kafjax.errors import UserError

_LONGEST = 2000  # bytes of a reason


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
