"""Users' paths: `~`, lists, and names that libraries mistake for patterns or URLs."""

import argparse
import contextlib
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from kafjax.buckets.mirror import fetch, send
from kafjax.buckets.places import cache_folder, copy_of, is_url, show, url_of
from kafjax.buckets.store import BucketError
from kafjax.errors import UserError

# Characters that Orbax, TensorStore, etils and tfds take literally: no pattern, no scheme, valid
# UTF-8.
_PLAIN = re.compile(r"[\w/ .,=+@%-]*")
_MOST_PLAIN = 1024  # characters; libraries append to it, and systems allow 4096 in total
_lock = threading.Lock()
# Copies of buckets' folders that this process uses, and whether they have been fetched.
_copies: dict[Path, bool] = {}
_links: dict[tuple[int, str], Path] = {}  # by process and path
_folders: dict[int, tempfile.TemporaryDirectory[str]] = {}  # by process: a fork has its own


def expand(path: str | os.PathLike[str]) -> Path:
    """Replaces a leading `~` or `~user` by that user's home, and a URL by its copy here.

    The copy of a bucket's folder or object is brought up to date the first time; a command sends
    what it changes there when it ends (`with_buckets`).

    Raises:
      UserError: no such user, bucket, permission or credentials.
      BucketError: the bucket does not answer.
    """
    if is_url(path):
        copy = copy_of(path)
        _fetch(copy)
        return copy
    text = os.path.expanduser(path)
    if text.startswith("~"):
        raise UserError(
            f"{path}: that user's home is not known; expected another path (a folder of that very "
            f"name is ./{path})"
        )
    # ./~ is a folder named ~, which pathlib would write as ~.
    found = Path(text)
    return found.absolute() if str(found).startswith("~") else found


def named(path: str | os.PathLike[str]) -> Path:
    """`expand` of a command's argument: a bucket's folder is fetched when the command begins."""
    if not is_url(path):
        return expand(path)
    copy = copy_of(path)
    _copies.setdefault(copy, False)
    return copy


def _fetch(copy: Path) -> None:
    if not _copies.get(copy):
        fetch(copy)
        _copies[copy] = True


def data_folder(data_dir: str | os.PathLike[str], name: str | None = None) -> Path:
    """`expand` of a folder of datasets. Of a bucket's only the dataset NAME is brought up to date.

    That is its descriptions; its records stay in the bucket.
    """
    if not is_url(data_dir) and url_of(data_dir) is None:
        return expand(data_dir)
    folder = copy_of(data_dir) if is_url(data_dir) else Path(data_dir)
    if name is not None:
        fetch(folder / name)
    return folder


@contextlib.contextmanager
def with_buckets() -> Iterator[None]:
    """Fetches what a command's arguments name, and sends what it changed there, also if it fails.

    Raises:
      UserError: no such bucket, no permission, no credentials.
      BucketError: not all was sent; the files stay on this machine, and the message names them.
    """
    try:
        for copy in _copies:
            _fetch(copy)
        yield
    except BaseException:
        try:
            _send_all()
        except Exception as error:  # the command's own is the one to report
            print(f"warning: {show(error)}", file=sys.stderr, flush=True)
        raise
    else:
        _send_all()
    finally:
        _copies.clear()


def _send_all() -> None:
    for copy in _copies:
        try:
            send(copy)
        except (OSError, UserError) as error:
            raise BucketError(
                f"{error}; all results are kept in the cache folder {cache_folder()}"
            ) from error


def path_argument(text: str) -> Path:
    """`named` as an argparse type; argparse shows only its own error's message."""
    try:
        return named(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def data_argument(text: str) -> Path:
    """`data_folder` as an argparse type."""
    try:
        return data_folder(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def split_list(text: str) -> list[str]:
    """The paths in a list A,B,C. A comma in an existing folder's name belongs to the name.

    A URL ends at the first comma.
    """
    parts = text.split(",")
    for count in [1] if is_url(text) else range(len(parts), 0, -1):
        first = ",".join(parts[:count])
        if first and (is_url(first) or expand(first).is_dir()):
            rest = ",".join(parts[count:])
            return [first, *(split_list(rest) if rest else [])]
    return [text]


def plain(path: str | os.PathLike[str]) -> Path:
    """The path, or another path to the same place that libraries take literally.

    Orbax and tfds glob folders, so `[` in a name hides its files; TensorStore requires UTF-8 names;
    etils takes `gs:` in a name for another file system. For such names this returns a link in a
    temporary folder, which is removed when the process ends. The target need not exist yet.

    Raises:
      UserError: the temporary folder itself has such a name.
    """
    absolute = os.path.abspath(path)
    if _is_plain(absolute):
        return Path(absolute)
    with _lock:
        key = os.getpid(), absolute
        if key not in _links:
            link = Path(_folder()) / str(len(_links))
            link.symlink_to(absolute)
            _links[key] = link
        return _links[key]


def _is_plain(path: str) -> bool:
    return bool(_PLAIN.fullmatch(path)) and len(path) <= _MOST_PLAIN


def _folder() -> str:
    if os.getpid() not in _folders:
        where = tempfile.gettempdir()
        if not _is_plain(where):
            raise UserError(
                f"the folder of temporary files is {where}; expected one whose name has no special "
                "characters: set TMPDIR"
            )
        _folders[os.getpid()] = tempfile.TemporaryDirectory(prefix="kafjax-")
    return _folders[os.getpid()].name
