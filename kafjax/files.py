"""Files that are there whole or not at all, wherever a process is killed."""

import os
from pathlib import Path


def write_text(path: str | os.PathLike[str], text: str, *, errors: str = "strict") -> None:
    """Writes a UTF-8 file beside its place, as NAME.partial, and moves it there.

    `errors` says what becomes of characters that UTF-8 does not have, as in `str.encode`.
    """
    target = Path(path)
    partial = target.with_name(f"{target.name}.partial")
    partial.write_text(text, encoding="utf-8", errors=errors)
    partial.replace(target)
