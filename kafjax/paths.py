"""Users' paths: `~`, lists, and names that libraries mistake for patterns or URLs."""

import argparse
import os
import re
import tempfile
import threading
from pathlib import Path

from kafjax.errors import UserError

# Characters that Orbax, TensorStore, etils and tfds take literally: no pattern, no scheme, valid
# UTF-8.
_PLAIN = re.compile(r"[\w/ .,=+@%-]*")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_MOST_PLAIN = 1024  # characters; libraries append to it, and systems allow 4096 in total
_lock = threading.Lock()
_links: dict[tuple[int, str], Path] = {}  # by process and path
_folders: dict[int, tempfile.TemporaryDirectory[str]] = {}  # by process: a fork has its own


def expand(path: str | os.PathLike[str]) -> Path:
    """Replaces a leading `~` or `~user` by that user's home.

    Raises:
      UserError: no such user, or a bucket's URL instead of a path.
    """
    if _URL.match(os.fspath(path)):
        raise UserError(f"{path}: a URL; expected the path of a file or folder of this machine")
    text = os.path.expanduser(path)
    if text.startswith("~"):
        raise UserError(
            f"{path}: that user's home is not known; expected another path (a folder of that very "
            f"name is ./{path})"
        )
    # ./~ is a folder named ~, which pathlib would write as ~.
    found = Path(text)
    return found.absolute() if str(found).startswith("~") else found


def path_argument(text: str) -> Path:
    """`expand` as an argparse type; argparse shows only its own error's message."""
    try:
        return expand(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def split_list(text: str) -> list[str]:
    """The paths in a list A,B,C. A comma in an existing folder's name belongs to the name."""
    parts = text.split(",")
    for count in range(len(parts), 0, -1):
        first = ",".join(parts[:count])
        if first and expand(first).is_dir():
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
