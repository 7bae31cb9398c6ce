"""Atomic file writing, and JSON files with a checksum.

Every file is written through this module. It is complete or absent, even if a process is killed or
the power fails, and flushed to the disk before anything depends on it. A checked JSON file carries
a checksum of its own fields in the field `checksum`, so that a changed value is found; a file
without that field, written by hand, is taken as it is.
"""

import codecs
import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import sys
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kafjax.buckets.places import show

CHECKSUM_FIELD = "checksum"


def write_text(
    path: str | os.PathLike[str], text: str, *, errors: str = "backslashreplace"
) -> None:
    """Writes a UTF-8 file atomically.

    `errors` handles characters that UTF-8 lacks, as in `str.encode`: those of paths whose bytes are
    not UTF-8.
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors=errors)


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """Rows as CSV, with Unix newlines on every system."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(rows)
    return stream.getvalue()


def read_text(path: str | os.PathLike[str]) -> str:
    """Reads text from any system: UTF-8, or UTF-16 with a byte order mark; newlines end lines.

    Bytes that are not UTF-8 become U+FFFD. JSON read as bytes does not need this.
    """
    content = Path(path).read_bytes()
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = content.decode("utf-16" if wide else "utf-8-sig", errors="replace")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def show_any_name() -> None:
    """Makes names that are not UTF-8 printable: their bytes print as `\\udcff`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def printable(path: str | os.PathLike[str]) -> str:
    """A path that any stream can print, or its URL: bytes that are not UTF-8 as `\\udcff`."""
    return show(path).encode(errors="backslashreplace").decode()


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path to write to, which then replaces `path`, flushed to the disk on return.

    It is next to `path`, hidden, as .<random>.partial: a name of any length fits, two processes
    that write the same file do not collide, and the later one wins. An exception leaves `path`
    unchanged; an `OSError` names it.
    """
    target = Path(path)
    partial = target.with_name(f".{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        sync(partial)
        partial.replace(target)
        sync(target.parent)
    except OSError as error:
        if error.filename not in (None, os.fspath(partial)):
            raise
        raise OSError(error.errno, error.strerror, os.fspath(target)) from error
    finally:
        partial.unlink(missing_ok=True)


def sync(path: str | os.PathLike[str]) -> None:
    """Flushes a file, or a folder's list of files, to the disk, to survive a power cut.

    Has no effect on systems that cannot flush folders.
    """
    is_folder = os.path.isdir(path)
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder may be writable but not readable
        if is_folder:
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_folder or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: str | os.PathLike[str]) -> None:
    """Flushes a folder and everything in it to the disk."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(os.path.join(parent, name))
        sync(parent)


def checksum(fields: Mapping[str, Any]) -> str:
    """A digest of the fields as JSON, independent of their order."""
    text = json.dumps(json.loads(json.dumps(fields)), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def write_checked(path: str | os.PathLike[str], fields: Mapping[str, Any]) -> None:
    """Writes fields and their checksum atomically."""
    write_text(path, json.dumps({**fields, CHECKSUM_FIELD: checksum(fields)}, indent=2) + "\n")


def read_checked(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the fields of a file, without their checksum.

    Raises:
      FileNotFoundError: no such file.
      ValueError: its content is not JSON, has no fields, or was changed. The message does not name
        the file.
    """
    fields = json.loads(Path(path).read_bytes())
    if not isinstance(fields, dict):
        raise ValueError("no fields")
    if CHECKSUM_FIELD in fields and fields.pop(CHECKSUM_FIELD) != checksum(fields):
        raise ValueError(
            f"changed since it was written: wrong {CHECKSUM_FIELD}; without that field it is taken "
            "as it is"
        )
    return fields


def flatten(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested mappings by dotted path; an empty mapping is a value."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        nested = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat


def differences(
    there: Mapping[str, Any], here: Mapping[str, Any], *, ignore: Collection[str] = ()
) -> list[str]:
    """A line for each name whose values differ, in order of name; a missing value is 'absent'."""
    absent = object()
    return [
        f"  {name}: {there.get(name, 'absent')!r} there, {here.get(name, 'absent')!r} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name, absent) != here.get(name, absent) and name not in ignore
    ]
