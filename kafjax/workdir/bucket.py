"""A run in a bucket: its lock there, and the sending of what the run writes here.

    BUCKET/RUN/lock.<n>    the owner's host, process and token; the highest number holds the run

A bucket has no locks and no rename, only objects that are created if they are not there. So the
first process creates lock.1 and deletes it at its end. One that finds a lock that its owner has not
renewed for some time creates the next number; the owner, should it still be there, finds that and
stops. A process that died on this machine left its token in the cache: the next one here continues
at once, with everything that was not sent.
"""

import contextlib
import json
import os
import platform
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from kafjax.buckets.mirror import fetch, newest_lock, read_token, send
from kafjax.buckets.places import cache_folder, known_of, url_of
from kafjax.buckets.store import (
    BucketError,
    delete_object,
    list_objects,
    read_object,
    write_object,
)
from kafjax.errors import UserError
from kafjax.files import write_text
from kafjax.workdir.lock import LockedError, describe_owner

_RENEWED = 20.0  # seconds between signs of the owner
_EXPIRES = 120.0  # seconds without one, after which another process may take over
_LOOKS = 1.0  # seconds between looks for a new checkpoint


@contextlib.contextmanager
def kept(folder: Path, checkpoints: Path) -> Iterator[None]:
    """Holds a run's lock in its bucket; sends its files at each new checkpoint and at the end.

    Nothing for a folder of this machine. A failure to send is a warning, and tried again.

    Raises:
      LockedError: another process holds the run, or has taken it over meanwhile.
      BucketError: not all could be sent in the end; it is kept here.
    """
    url = url_of(folder)
    if url is None:
        yield
        return
    lock = _Lock(url, folder)
    if not lock.acquire():
        fetch(folder)  # what came since the command began
    ended = threading.Event()
    threads = [
        threading.Thread(target=_renew, args=(lock, ended), daemon=True),
        threading.Thread(target=_send_steps, args=(lock, checkpoints, ended), daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()
        failed = _end(lock)
        if failed is not None and sys.exc_info()[0] is not None:
            print(f"warning: {failed}", file=sys.stderr, flush=True)
            failed = None
        if failed is not None:
            raise failed


def _end(lock: "_Lock") -> Exception | None:
    """Sends the rest and releases the lock; the error, if any."""
    try:
        lock.check()
        send(lock.folder, held=True)
        lock.release()
    except LockedError as error:
        return error
    except (OSError, UserError) as error:
        return BucketError(
            f"{error}; the run is kept in the cache folder {cache_folder()}: rerun the command on "
            "this machine to send it"
        )
    return None


def _send_steps(lock: "_Lock", checkpoints: Path, ended: threading.Event) -> None:
    """Sends the run when there is another checkpoint, until it ends or is lost."""
    sent = _steps(checkpoints)
    while not ended.wait(_LOOKS):
        steps = _steps(checkpoints)
        if steps == sent:
            continue
        sent = steps
        try:
            lock.check()
            send(lock.folder, held=True)
        except LockedError:
            return
        except (OSError, UserError) as error:
            print(f"warning: {error}; tried again later", file=sys.stderr, flush=True)


def _steps(checkpoints: Path) -> set[str]:
    try:
        return {name for name in os.listdir(checkpoints) if name.isdecimal()}
    except FileNotFoundError:
        return set()


def _renew(lock: "_Lock", ended: threading.Event) -> None:
    """Gives signs of the owner; stops the run as a signal does if it has lost the lock."""
    while not ended.wait(_RENEWED):
        try:
            lock.check()
            lock.write()
        except LockedError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        except (OSError, UserError):  # the network: what is missed counts
            continue


def _read(url: str) -> bytes:
    """An object's content, empty without one."""
    try:
        return read_object(url)
    except FileNotFoundError:
        return b""


class _Lock:
    """The lock of a run; see the module."""

    def __init__(self, url: str, folder: Path):
        self.folder = folder
        self._url = url
        self._note = known_of(folder / "lock")
        self._number = 1
        self._owner = {
            "host": platform.node(),
            "process": os.getpid(),
            "since": time.time(),
            "token": uuid.uuid4().hex,
        }

    def acquire(self) -> bool:
        """Takes the lock; whether the last owner was a process of this machine that died."""
        newest = newest_lock(list_objects(self._url))
        if newest is not None:
            content = _read(f"{self._url}/{newest}")
            self._number = int(newest.rpartition(".")[2])
            if self._note.is_file() and read_token(content) == self._note.read_text():
                self._owner["token"] = read_token(content)
                self.write()
                return True
            if self._age() < _EXPIRES:
                raise LockedError(
                    f"{self._url}: in use by {describe_owner(content)}; expected no other process: "
                    f"wait for it, stop it, or give another folder (one that died silently "
                    f"is replaced after {_EXPIRES:.0f} s)"
                )
            self._number += 1
        self._note.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._note, str(self._owner["token"]))
        try:
            self.write(new=True)
        except FileExistsError:
            raise LockedError(f"{self._url}: another process has just taken it") from None
        if newest is not None:
            delete_object(f"{self._url}/{newest}")
        return False

    def write(self, *, new: bool = False) -> None:
        """Writes the lock, with a new time."""
        write_object(self._place(), (json.dumps(self._owner) + "\n").encode(), new=new)

    def check(self) -> None:
        """Raises `LockedError` if this process no longer holds the lock."""
        is_ours = read_token(_read(self._place())) == self._owner["token"]
        if is_ours and not _read(self._place(self._number + 1)):
            return
        newest = newest_lock(list_objects(self._url))
        owner = describe_owner(_read(f"{self._url}/{newest}"))
        raise LockedError(
            f"{self._url}: taken over by {owner}; what this process did since "
            f"then stays in the cache folder {cache_folder()}"
        )

    def release(self) -> None:
        """Deletes the lock."""
        delete_object(self._place())
        self._note.unlink(missing_ok=True)

    def _place(self, number: int | None = None) -> str:
        return f"{self._url}/lock.{number or self._number}"

    def _age(self) -> float:
        """Seconds since the lock was written, by the bucket's clock."""
        probe = f"{self._url}/lock.now"
        write_object(probe, b"")
        objects = list_objects(self._url)
        delete_object(probe)
        lock = objects.get(f"lock.{self._number}")
        return _EXPIRES if lock is None else objects["lock.now"].written - lock.written
