"""A bucket's objects by URL: listed, read, written, each whole; every error in one line.

Requests that fail for a reason that may pass are tried again.
"""

import contextlib
import errno
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from kafjax.buckets.places import check_parts
from kafjax.errors import UserError, missing_extra

T = TypeVar("T")

WAITS = (1.0, 3.0)  # seconds before further tries, after those of the clouds' libraries
_AT_ONCE = 64 << 20  # bytes; larger files are sent in parts, which appear together
_EXTRAS = {"s3": "s3fs", "gs": "gcsfs"}
# Errors that no further try will mend, by the names of the libraries' classes.
_CREDENTIALS = ("NoCredentials", "PartialCredentials", "ProfileNotFound", "DefaultCredentials")
_LASTING = (FileNotFoundError, FileExistsError, PermissionError, ImportError, ValueError)


class BucketError(OSError):
    """A bucket could not be read or written; the message names the URL."""


class Entry(NamedTuple):
    """An object of a bucket: its size in bytes, its version, and when it was written."""

    size: int
    version: str
    written: float  # seconds, by the bucket's clock


def list_objects(url: str) -> dict[str, Entry]:
    """All objects in a folder by their names relative to it; an object itself has the name ''.

    Raises:
      UserError: no such bucket, or no permission.
      BucketError: the bucket does not answer.
    """
    files, root = _open(url)
    try:
        found = _request(url, lambda: _find(files, root), waits=())
    except FileNotFoundError as error:
        raise UserError(f"{url}: no such bucket ({_reason(error)})") from error
    entries = {}
    for name, facts in found.items():
        relative = name.lstrip("/").removeprefix(root.strip("/")).lstrip("/")
        if facts.get("type") == "file" and not name.endswith("/"):
            if relative:
                check_parts(f"{url}/{relative}", relative.split("/"))
            entries[relative] = _entry(facts)
    return entries


def read_object(url: str) -> bytes:
    """An object's content. Raises `FileNotFoundError` without one."""
    files, path = _open(url)
    content: bytes = _request(url, lambda: files.cat_file(path))
    return content


def read_range(url: str, size: int, offset: int) -> bytes:
    """Bytes of an object, fewer at its end. Raises `FileNotFoundError` without one."""
    files, path = _open(url)
    try:
        content: bytes = _request(
            url, lambda: files.cat_file(path, start=offset, end=offset + size)
        )
    except BucketError as error:
        if getattr(error.__cause__, "errno", None) == errno.EINVAL:  # beyond the object's end
            return b""
        raise
    return content


def download(url: str, path: Path) -> None:
    """Writes an object to a file, which is not there before it is whole."""
    files, place = _open(url)
    with appearing(path) as partial:
        _request(url, lambda: files.get_file(place, os.fspath(partial)))


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which then becomes `path`, whose folder is made.

    `kafjax.files.replacing` also waits for the disk: no need for what the bucket has.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def upload(path: Path, url: str) -> None:
    """Writes a file to an object, which changes only when it is whole."""
    if path.stat().st_size > _AT_ONCE:
        files, place = _open(url)
        _request(url, lambda: files.put_file(os.fspath(path), place))
    else:  # as it is now: a log may grow meanwhile
        write_object(url, path.read_bytes())


def write_object(url: str, content: bytes, *, new: bool = False) -> None:
    """Writes an object; if it must be `new`, raises `FileExistsError` if there is one already."""
    files, place = _open(url)
    mode = {"mode": "create"} if new else {}
    _request(url, lambda: files.pipe_file(place, content, **mode))


def delete_object(url: str) -> None:
    """Deletes an object, if there is one."""
    files, place = _open(url)
    with contextlib.suppress(FileNotFoundError):
        _request(url, lambda: files.rm_file(place))


def _open(url: str) -> tuple[Any, str]:
    """fsspec's file system, which it keeps for each thread's process, and the path in it."""
    import fsspec

    logging.getLogger("gcsfs").setLevel(logging.ERROR)  # our own error says it in a line
    with _telling(url):
        files, path = fsspec.core.url_to_fs(url)
    return files, path


def _find(files: Any, root: str) -> dict[str, Any]:
    files.invalidate_cache()
    found: dict[str, Any] = files.find(root, detail=True)
    if not found and "/" not in root.strip("/"):
        files.ls(root)  # an empty bucket, or none
    return found


def _entry(facts: dict[str, Any]) -> Entry:
    """An object's facts, which each library names in its own way."""
    written = next(
        (facts[n] for n in ("LastModified", "mtime", "updated", "created") if n in facts), 0.0
    )
    if isinstance(written, str):
        written = datetime.fromisoformat(written)
    seconds = written.timestamp() if isinstance(written, datetime) else float(written)
    version = next((facts[n] for n in ("generation", "ETag", "etag", "md5Hash") if n in facts), "")
    return Entry(int(facts["size"]), str(version) or f"{seconds}", seconds)


def _request(url: str, call: Callable[[], T], *, waits: Sequence[float] | None = None) -> T:
    with _telling(url):
        for wait in WAITS if waits is None else waits:
            try:
                return call()
            except Exception as error:
                if _lasts(error):
                    raise
            time.sleep(wait)
        return call()


def _lasts(error: Exception) -> bool:
    name = type(error).__name__
    return (
        isinstance(error, _LASTING)
        or name.startswith(_CREDENTIALS)
        or getattr(error, "errno", None) in (errno.EINVAL, errno.ENOSPC, errno.EDQUOT)
        or str(getattr(error, "code", "")) in ("401", "403")
    )


@contextlib.contextmanager
def _telling(url: str) -> Iterator[None]:
    """Errors of any library as a `UserError`, a `BucketError`, or one of a missing object."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, error.strerror or _reason(error), url) from error
    except (FileExistsError, UserError, MemoryError):
        raise
    except ImportError as error:
        scheme = url.partition("://")[0]
        absent = ModuleNotFoundError(name=_EXTRAS.get(scheme, ""))
        raise UserError(f"{url}: {missing_extra(absent) or _reason(error)}") from error
    except Exception as error:
        name, code = type(error).__name__, str(getattr(error, "code", ""))
        if name.startswith(_CREDENTIALS) or code == "401":
            raise UserError(
                f"{url}: no credentials ({_reason(error)}); expected them where the cloud's own "
                "tools look: docs/recipes.md, Buckets"
            ) from error
        if isinstance(error, PermissionError) or code == "403":
            raise UserError(f"{url}: no permission ({_reason(error)})") from error
        if isinstance(error, ValueError) and "rotocol not known" in str(error):
            raise UserError(f"{url}: unknown kind of URL; expected s3:// or gs://") from error
        raise BucketError(f"{url}: no answer as expected ({name}: {_reason(error)})") from error


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
