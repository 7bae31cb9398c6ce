"""Allows one process at a time in a folder, with an advisory system lock (flock).

The system releases the lock whenever its owner exits, so no lock outlives its run. The file holds
the owner's host and process, for the message to a second process.
"""

import contextlib
import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

from kafjax.errors import UserError


class LockedError(UserError):
    """Another process holds a folder; the message names it."""


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds the lock of a file, which is created if missing and kept.

    Args:
      path: of the file.
      wait: wait for another owner instead of raising.

    Raises:
      LockedError: another process holds it; the message names its host, process and start.
    """
    # Append mode: opening must not empty the owner's file.
    with path.open("a+", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise LockedError(
                f"{path.parent}: in use by {describe_owner(path.read_bytes())}; expected no other "
                "process: wait for it, stop it, or give another folder"
            ) from None
        stream.truncate(0)
        owner = {"host": platform.node(), "process": os.getpid(), "since": time.time()}
        stream.write(json.dumps(owner) + "\n")
        stream.flush()
        try:
            yield
        finally:
            stream.truncate(0)


def describe_owner(content: bytes) -> str:
    """The owner that a lock's content names, in words."""
    try:
        found = json.loads(content)
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found["since"]))
        return f"process {found['process']} on {found['host']} since {since}"
    except (ValueError, KeyError, TypeError):
        return "another process"
