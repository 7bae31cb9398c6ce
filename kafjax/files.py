"""Files that are there whole or not at all, wherever a process is killed."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


def write_text(path: str | os.PathLike[str], text: str, *, errors: str = "strict") -> None:
    """Writes a UTF-8 file whole or not at all.

    `errors` says what becomes of characters that UTF-8 does not have, as in `str.encode`.
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors=errors)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to, which then takes the place of `path`.

    It lies beside it, as NAME.<random>.partial: two processes that write the same file at once do
    not meet, and the later one's stays. An exception leaves `path` as it was.
    """
    target = Path(path)
    partial = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
