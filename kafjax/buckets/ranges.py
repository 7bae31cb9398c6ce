"""Parts of a bucket's objects, kept on this machine up to KAFJAX_CACHE_GB (10).

The caller verifies what it reads, so a part is written without waiting for the disk.
"""

import contextlib
import hashlib
import io
import os
from collections import Counter
from pathlib import Path

from kafjax.buckets.places import cache_folder
from kafjax.buckets.store import appearing, read_range
from kafjax.errors import UserError

_GIGABYTES = 10.0
_FOLDERS = 16
_written: Counter[Path] = Counter()  # bytes since a folder was last looked through


def read_part(url: str, size: int, offset: int, *, version: int, again: bool = False) -> bytes:
    """Bytes of an object, from this machine if they are there.

    Args:
      url: of the object.
      size: how many bytes; fewer come at the object's end.
      offset: of the first.
      version: differs between contents of the same place.
      again: read from the bucket, because what came before is damaged.

    Raises:
      FileNotFoundError: no such object.
      BucketError: the bucket does not answer.
    """
    name = hashlib.blake2b(f"{url} {offset} {size} {version}".encode(), digest_size=16).hexdigest()
    path = cache_folder() / "records" / name[0] / name
    if not again:
        with contextlib.suppress(OSError):
            return path.read_bytes()
    content = read_range(url, size, offset)
    if len(content) == size:
        with contextlib.suppress(OSError):  # a full or read-only disk only makes it slower
            _keep(path, content)
    return content


def _keep(path: Path, content: bytes) -> None:
    limit = cache_bytes() // _FOLDERS
    if len(content) > limit:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.parent not in _written or _written[path.parent] > limit // 16:
        _drop_oldest(path.parent, limit - limit // 8)
        _written[path.parent] = 0
    _written[path.parent] += len(content)
    with appearing(path) as partial:
        partial.write_bytes(content)


def _drop_oldest(folder: Path, limit: int) -> None:
    """Deletes files until the others have at most `limit` bytes."""
    found = []
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):  # another process looks through it too
            stat = entry.stat()
            found.append((stat.st_mtime_ns, stat.st_size, entry.path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= limit:
            return
        Path(path).unlink(missing_ok=True)
        total -= size


def cache_bytes() -> int:
    """The most bytes of parts; `UserError` if KAFJAX_CACHE_GB is no such number."""
    text = os.environ.get("KAFJAX_CACHE_GB", str(_GIGABYTES))
    try:
        number = float(text)
        if not 0 <= number < 1e9:
            raise ValueError
    except ValueError:
        raise UserError(
            f"KAFJAX_CACHE_GB is {text!r}; expected a number of gigabytes, 0 to keep none"
        ) from None
    return int(number * 1e9)


class Ranged(io.RawIOBase):
    """An object of a bucket as a binary stream, read by blocks: few requests for small steps."""

    _BLOCK = 1 << 20

    def __init__(self, url: str):
        self._url = url
        self._offset = 0
        self._start, self._block = 0, b""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Goes to an offset from the start."""
        assert whence == os.SEEK_SET
        self._offset = offset
        return offset

    def read(self, size: int = -1) -> bytes:
        """Bytes from here on, fewer at the end."""
        start = self._offset - self._start
        if not 0 <= start <= start + size <= len(self._block):
            self._block = read_range(self._url, max(size, self._BLOCK), self._offset)
            self._start, start = self._offset, 0
        self._offset += size
        return self._block[start : start + size]
