"""Where a bucket's folder has its copy on this machine: pure functions of names."""

import os
import re
from pathlib import Path

from kafjax.errors import UserError

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
# Other names of a scheme, so that a folder has one copy.
_SAME = {"gcs": "gs", "s3a": "s3"}
_COPIES, _KNOWN = "buckets", "known"


def cache_folder() -> Path:
    """KAFJAX_CACHE, by default `kafjax` in the user's cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Path(os.environ.get("KAFJAX_CACHE") or home / "kafjax").expanduser().resolve()


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether this is a URL instead of a path of this machine."""
    return bool(_URL.fullmatch(os.fspath(path)))


def copy_of(url: str | os.PathLike[str]) -> Path:
    """The folder or file on this machine that stands for a URL; nothing is read or written.

    Raises:
      UserError: not the URL of a bucket, or one that points out of its bucket.
    """
    text = os.fspath(url)
    match = _URL.fullmatch(text)
    scheme = match[1].lower() if match else ""
    parts = match[2].rstrip("/").split("/") if match else []
    if scheme in ("", "http", "https", "file") or not parts or not parts[0]:
        raise UserError(f"{text}: not a bucket's; expected a path, or as in s3://bucket/folder")
    check_parts(text, parts)
    return cache_folder() / _COPIES / _SAME.get(scheme, scheme) / Path(*parts)


def check_parts(url: str, parts: list[str]) -> None:
    """Refuses names that no folder can have, or that point elsewhere."""
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise UserError(f"{url}: names with an empty part, . or .. are not supported")


def url_of(path: str | os.PathLike[str]) -> str | None:
    """The URL for which a path on this machine stands, if any."""
    try:
        scheme, *parts = Path(path).relative_to(cache_folder() / _COPIES).parts
    except ValueError:
        return None
    return f"{scheme}://{'/'.join(parts)}" if parts else None


def known_of(path: Path) -> Path:
    """The file that notes what was last fetched to, or sent from, the copy at `path`."""
    root = cache_folder()
    return root / _KNOWN / path.relative_to(root / _COPIES)


def copy_of_known(path: Path) -> Path:
    """The inverse of `known_of`."""
    root = cache_folder()
    return root / _COPIES / path.relative_to(root / _KNOWN)


def show(text: object) -> str:
    """A message with the URLs of copies in place of their paths."""
    root = re.escape(f"{cache_folder() / _COPIES}{os.sep}")
    return re.sub(rf"{root}([a-z0-9+.-]+)/", r"\1://", str(text))
