"""Whole files, and JSON files with a checksum.

Every whole file is written here. It is there whole or not at all, wherever a process is killed or
the power fails, and on the disk before anything counts on it. A checked JSON file carries a
checksum of its own fields in the field `checksum`, so that a changed value is found; a file
without that field, written by hand, is taken as it is.
"""

import contextlib
import errno
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

CHECKSUM_FIELD = "checksum"


def write_text(
    path: str | os.PathLike[str], text: str, *, errors: str = "backslashreplace"
) -> None:
    """Writes a UTF-8 file whole or not at all.

    `errors` says what becomes of characters that UTF-8 does not have, as in `str.encode`: those of
    paths whose bytes are not UTF-8.
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors=errors)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to, which then takes the place of `path`, on the disk when this returns.

    It lies next to it, hidden, as .<random>.partial: a name of any length has room, two processes
    that write the same file at once do not meet, and the later one's stays. An exception leaves
    `path` as it was; an `OSError` names it.
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
    """Returns when a file, or a folder's list of files, is on the disk: no power cut loses it.

    Systems that cannot do so for folders are asked in vain.
    """
    is_folder = os.path.isdir(path)
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder may be written to, and not listed
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
    """Returns when a folder and all that is in it is on the disk."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(os.path.join(parent, name))
        sync(parent)


def checksum(fields: Mapping[str, Any]) -> str:
    """A digest of what JSON keeps of the fields, whatever their order."""
    text = json.dumps(json.loads(json.dumps(fields)), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def write_checked(path: str | os.PathLike[str], fields: Mapping[str, Any]) -> None:
    """Writes fields and their checksum, whole or not at all."""
    write_text(path, json.dumps({**fields, CHECKSUM_FIELD: checksum(fields)}, indent=2) + "\n")


def read_checked(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of a file, without their checksum.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: its content is not JSON, not fields, or not what was written. The message does not
        name the file.
    """
    fields = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(fields, dict):
        raise ValueError("no fields")
    if CHECKSUM_FIELD in fields and fields.pop(CHECKSUM_FIELD) != checksum(fields):
        raise ValueError(
            f"changed since it was written: wrong {CHECKSUM_FIELD}; without that field it is taken "
            "as it is"
        )
    return fields
