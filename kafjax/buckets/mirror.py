"""Makes a bucket's folder and its copy on this machine alike, in either direction.

What was last fetched or sent is noted for each file, so that only what changed travels. The bucket
decides what is in a folder, with one exception: a run whose process ended before it sent all and
which no other process has taken over since (`kafjax.workdir.bucket`) is left as it is here.
"""

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TypeVar

from tqdm import tqdm

from kafjax.buckets.places import (
    cache_folder,
    copy_of,
    copy_of_known,
    is_url,
    known_of,
    url_of,
)
from kafjax.buckets.store import (
    BucketError,
    Entry,
    appearing,
    delete_object,
    download,
    list_objects,
    read_object,
    upload,
)

T = TypeVar("T")

# The file of a folder that makes it whole: of a checkpoint, and of a dataset.
_MARKERS = ("_CHECKPOINT_METADATA", "dataset_info.json")
_SHARD = re.compile(r".*\.tfrecord-\d+-of-\d+")
_STEP = re.compile(r"(.*?/)?checkpoints/\d+/")
# Locks of this machine and of the bucket; and files that are being written.
_LOCK = re.compile(r"lock(\.\w+)?")
_UNFINISHED = re.compile(r"\..*|.*\.orbax-checkpoint-tmp.*|.*\.incomplete\w*")
_THREADS = 8


def fetch(place: str | os.PathLike[str]) -> Path:
    """Brings the copy of a bucket's folder or object up to date; its path, or any other as it is.

    Records of datasets are not fetched, and neither is a checkpoint or dataset without its marker.
    Files that were written here and never sent are kept.

    Raises:
      UserError: no such bucket, no permission, no credentials.
      BucketError: the bucket does not answer.
    """
    path = copy_of(place) if is_url(place) else Path(place)
    url = url_of(path)
    if url is None:
        return path
    with _alone():
        objects = list_objects(url)
        ours, lost = _runs_left(path, objects)
        entries = {
            path / name: entry
            for name, entry in objects.items()
            if not _is_within(name, ours) and not _is_lock(name) and _is_whole(name, objects)
        }
        for old in [p for p in _known_files(path) if p not in entries and _version(p)]:
            if not _is_within(_relative(old, path), ours):
                _forget(old, path)
        for folder in lost:
            for file in [p for p in _files(path / folder) if p not in entries]:
                _forget(file, path)
            known_of(path / folder / "lock").unlink()
        stale = [p for p, entry in entries.items() if _version(p) != entry.version]
        for shard in filter(_is_shard, stale):
            _forget(shard, path)
        gone = [p for p in entries if not p.exists()]
        _fetch_all({p: entries[p] for p in {*stale, *gone} if not _is_shard(p)})
    return path


def send(path: str | os.PathLike[str], *, held: bool = False) -> None:
    """Brings a bucket's folder or object up to date with its copy here; nothing for other paths.

    Markers are written last. A folder whose marker is gone here is deleted there; nothing else is.
    Runs whose lock a process of this machine has, or had when it ended, are left to their owner,
    which alone passes `held`.

    Raises:
      BucketError, UserError: something was not sent; another call sends it.
    """
    path = Path(path)
    if url_of(path) is None:
        return
    others = [] if held else [copy_of_known(p).parent for p in known_of(path).rglob("lock")]
    stats = {p: _stat(p) for p in _files(path) if not any(run in p.parents for run in others)}
    changed = [file for file, stat in stats.items() if stat is not None and stat != _sent(file)]
    gone = [p for p in _known_files(path) if _is_marker(p) and not p.exists()]
    gone = [p for p in gone if not any(run in p.parents for run in others)]
    if not changed and not gone:
        return
    # The marker of a folder that changes goes first, so that no mixture is taken as whole.
    for marker in {file.parent / name for file in changed for name in _MARKERS}:
        if known_of(marker).exists() and marker.exists():
            _delete(marker)
            changed += [] if marker in changed else [marker]
            gone += [marker]
    parts = sorted(p for p in changed if not _is_marker(p))
    sent = dict(zip(parts, _in_threads(_upload, parts), strict=True))
    for marker in sorted(filter(_is_marker, changed), key=_natural):
        if all(ok for part, ok in sent.items() if marker.parent in part.parents):
            sent[marker] = _upload(marker)
    for folder in {marker.parent for marker in gone}:
        old = [p for p in _known_files(folder) if not p.exists()]
        for file in sorted(old, key=lambda p: not _is_marker(p)):
            _delete(file)
    objects = list_objects(f"{url_of(path)}")
    for file in (p for p, ok in sent.items() if ok and _relative(p, path) in objects):
        _note(file, stats[file], objects[_relative(file, path)].version)


def sizes(folder: Path) -> dict[str, int]:
    """Sizes in bytes of the files in a folder, or of the objects in the bucket's."""
    url = url_of(folder)
    found = {} if url is None else {n: e.size for n, e in list_objects(url).items()}
    return found | {p.name: p.stat().st_size for p in os.scandir(folder) if p.is_file()}


def _fetch_all(entries: Mapping[Path, Entry]) -> None:
    total = sum(entry.size for entry in entries.values())
    with tqdm(total=total, desc="fetching", unit="B", unit_scale=True, disable=None) as progress:

        def fetch_one(file: Path) -> None:
            _download(file, entries[file])
            progress.update(entries[file].size)

        _in_threads(fetch_one, [p for p in entries if not _is_marker(p)])
        _in_threads(fetch_one, [p for p in entries if _is_marker(p)])


def _in_threads(function: Callable[[Path], T], files: Sequence[Path]) -> list[T]:
    """The function's results for all files; the first error ends it."""
    with ThreadPoolExecutor(_THREADS) as threads:
        futures = [threads.submit(function, file) for file in files]
        try:
            return [future.result() for future in futures]
        finally:
            threads.shutdown(cancel_futures=True)


def _download(file: Path, entry: Entry) -> None:
    url = url_of(file)
    assert url is not None
    download(url, file)
    if file.stat().st_size != entry.size:
        raise BucketError(f"{url}: {file.stat().st_size} of {entry.size} bytes came; try again")
    _note(file, _stat(file), entry.version)


def _upload(file: Path) -> bool:
    """Sends a file; False if it was deleted meanwhile, as old checkpoints are."""
    url = url_of(file)
    assert url is not None
    _note(file, None, str(_version(file)))  # it may be there from now on
    try:
        upload(file, url)
    except FileNotFoundError:
        if file.exists():
            raise
        return False
    return True


def _delete(file: Path) -> None:
    url = url_of(file)
    assert url is not None
    delete_object(url)
    known_of(file).unlink(missing_ok=True)


# What is known of a file: [size, time of change] here, and the version there.


def _note(file: Path, stat: list[int] | None, version: str) -> None:
    with appearing(known_of(file)) as partial:
        partial.write_text(json.dumps({"stat": stat, "version": version}))


def _read_note(file: Path) -> dict[str, object]:
    try:
        note = json.loads(known_of(file).read_bytes())
        return note if isinstance(note, dict) else {}
    except (OSError, ValueError):
        return {}


def _sent(file: Path) -> object:
    return _read_note(file).get("stat")


def _version(file: Path) -> object:
    return _read_note(file).get("version", "")


def _forget(file: Path, top: Path) -> None:
    """Deletes a file here, and the folders up to `top` that are then empty."""
    file.unlink(missing_ok=True)
    known_of(file).unlink(missing_ok=True)
    for folder in file.parents:
        if folder == top or top not in folder.parents:
            return
        try:
            folder.rmdir()
        except OSError:  # not empty
            return


def _stat(file: Path) -> list[int] | None:
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return [found.st_size, found.st_mtime_ns]


def _files(path: Path) -> Iterator[Path]:
    """The finished files of a copy."""
    if path.is_file():
        yield path
    for parent, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not _UNFINISHED.fullmatch(name)]
        for name in names:
            if not _UNFINISHED.fullmatch(name) and not _LOCK.fullmatch(name):
                yield Path(parent, name)


def _known_files(path: Path) -> list[Path]:
    """The files of a copy that have been fetched or sent."""
    known = known_of(path)
    found = [known] if known.is_file() else [p for p in known.rglob("*") if p.is_file()]
    return [copy_of_known(p) for p in found if not _is_lock(p.name) and p.name[0] != "."]


def _runs_left(path: Path, objects: Mapping[str, Entry]) -> tuple[list[str], list[str]]:
    """Runs that a process of this machine left: still ours, or taken over by another."""
    ours: list[str] = []
    lost: list[str] = []
    for known in known_of(path).rglob("lock"):
        folder = _relative(copy_of_known(known).parent, path)
        name = newest_lock(objects, folder)
        try:
            token = None if name is None else read_token(read_object(f"{url_of(path)}/{name}"))
        except FileNotFoundError:  # just released
            token = None
        (ours if token == known.read_text() else lost).append(folder)
    return ours, lost


def newest_lock(names: Iterable[str], folder: str = "") -> str | None:
    """The name of the newest lock among those of a folder's objects, if any."""
    start = f"{folder}/" if folder else ""
    numbers = [int(n) for name in names if (n := name.removeprefix(f"{start}lock.")).isdecimal()]
    return f"{start}lock.{max(numbers)}" if numbers else None


def read_token(lock: bytes) -> str:
    """The owner's token in a lock's content; empty if there is none."""
    try:
        return str(json.loads(lock)["token"])
    except (ValueError, KeyError, TypeError):
        return ""


def _relative(file: Path, path: Path) -> str:
    text = file.relative_to(path).as_posix()
    return "" if text == "." else text


def _is_within(name: str, folders: Iterable[str]) -> bool:
    return any(not folder or name.startswith(f"{folder}/") for folder in folders)


def _is_lock(name: str) -> bool:
    return bool(_LOCK.fullmatch(PurePosixPath(name).name))


def _is_shard(path: Path) -> bool:
    return bool(_SHARD.fullmatch(path.name))


def _is_marker(path: Path) -> bool:
    return path.name in _MARKERS


def _is_whole(name: str, objects: Mapping[str, Entry]) -> bool:
    """False for a file of a checkpoint without its marker."""
    step = _STEP.match(name)
    return step is None or f"{step[0]}{_MARKERS[0]}" in objects


def _natural(path: Path) -> list[object]:
    return [(int(p), "") if p.isdecimal() else (-1, p) for p in path.parts]


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One process of this machine at a time."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "fetching").open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
