"""Random access to the records of a prepared dataset, without TensorFlow.

A dataset directory is what `tfds` writes: one split per volume, each split's shards TFRecord files,
one record per slice in slice order. A TFRecord is a sequence of

    length      uint64, little endian
    length CRC  uint32, masked CRC32C of the length's 8 bytes
    data        `length` bytes
    data CRC    uint32, masked CRC32C of the data

(https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details). The index beside
the shards stores each record's length, from which its offset follows, so that any record is one
`pread` away. Records are numbered from 0 through the whole dataset, splits in order of name.

Offsets and lengths are in bytes; a record's offset is that of its length field, and its length that
of its data.
"""

import contextlib
import hashlib
import json
import logging
import os
import struct
import tempfile
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
import tensorflow_datasets as tfds

INDEX_NAME = "record_index.json"
_FORMAT = "kafjax record index 1"
_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")
_FRAME = _HEADER.size + _FOOTER.size

log = logging.getLogger(__name__)


class RecordError(ValueError):
    """A shard is missing, truncated or damaged; the text names the file and the record."""


@dataclass(frozen=True, eq=False)
class Shard:
    """One TFRecord file: the split it belongs to, its size and its records' data lengths."""

    split: str
    file: str
    num_bytes: int
    lengths: np.ndarray  # int64 [records]

    @property
    def offsets(self) -> np.ndarray:
        """Byte offsets of the records' length fields, int64 [records]."""
        return np.cumsum(self.lengths + _FRAME) - self.lengths - _FRAME


def write_index(dataset_dir: str | os.PathLike[str]) -> Path:
    """Scans all shards of a dataset and writes the index beside them, atomically.

    The same shards give the same bytes. Returns the index's path. Raises `RecordError` for a shard
    that is missing, truncated, or holds another number of records than `dataset_info.json` says.
    """
    directory = Path(dataset_dir)
    return _store_index(directory, _scan_dataset(directory))


def load_index(dataset_dir: str | os.PathLike[str]) -> list[Shard]:
    """The shards in order of split, from the index or, if that is missing or stale, from a scan.

    Stale: written for other shards or shard sizes, or its own checksum is wrong. A rebuilt index is
    written back where the directory allows it. Raises `RecordError` as `write_index` does.
    """
    directory = Path(dataset_dir)
    shards = _read_index(directory)
    if shards is not None:
        return shards
    log.info("%s: scanning the shards, no index fits them", directory)
    shards = _scan_dataset(directory)
    with contextlib.suppress(OSError):  # a read-only dataset is served from memory
        _store_index(directory, shards)
    return shards


class RecordReader:
    """Reads checked records by global number; safe to share between threads and to pickle.

    Each read opens its shard: no file descriptor outlives a call, however many volumes there are.
    """

    def __init__(self, dataset_dir: str | os.PathLike[str]):
        self.directory = Path(dataset_dir)
        self._shards = load_index(self.directory)
        counts = [len(shard.lengths) for shard in self._shards]
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._offsets = [shard.offsets for shard in self._shards]
        self.splits = self._split_ranges()

    def _split_ranges(self) -> Mapping[str, range]:
        ranges: dict[str, range] = {}
        for i, shard in enumerate(self._shards):
            start = ranges[shard.split].start if shard.split in ranges else int(self._starts[i])
            ranges[shard.split] = range(start, int(self._starts[i + 1]))
        return ranges

    def __len__(self) -> int:
        return int(self._starts[-1])

    def record_number(self, split: str, i: int) -> int:
        """Global number of record `i` of a split; `KeyError` or `IndexError` if there is none."""
        return self.splits[split][i]

    def __getitem__(self, number: int) -> bytes:
        """The data of one record, its checksums verified; raises `RecordError` or `IndexError`."""
        if not 0 <= number < len(self):
            raise IndexError(f"record {number}: {self.directory} holds {len(self)} records")
        s = int(np.searchsorted(self._starts, number, side="right")) - 1
        shard, i = self._shards[s], int(number - self._starts[s])
        path, length = self.directory / shard.file, int(shard.lengths[i])
        return _check_record(
            _pread(path, length + _FRAME, int(self._offsets[s][i])), length, f"{path}, record {i}"
        )


def find_dataset(data_dir: str | os.PathLike[str], name: str) -> Path:
    """The directory of the newest prepared version of DATA_DIR/NAME.

    Raises `ValueError` with the command that prepares the dataset where there is none.
    """
    prepared = [
        (tfds.core.Version(path.parent.name), path.parent)
        for path in Path(data_dir).glob(f"{name}/*/dataset_info.json")
        if tfds.core.Version.is_valid(path.parent.name)
    ]
    if not prepared:
        raw = "" if name == "phantom" else "--raw_dir RAW "  # phantoms are made, not found
        known = name in ("chd", "acdc", "phantom")
        dataset = f"--dataset {name}" if known else f"--dataset nnunet --name {name}"
        raise ValueError(
            f"{Path(data_dir) / name}: no prepared dataset here; this command prepares it:\n"
            f"  python -m data_prep.main {dataset} {raw}--data_dir {data_dir}"
        )
    return max(prepared)[1]


def open_builder(dataset_dir: str | os.PathLike[str]) -> tfds.core.DatasetBuilder:
    """The tfds builder of a prepared dataset directory; raises `RecordError` without one."""
    if not (Path(dataset_dir) / "dataset_info.json").is_file():
        raise RecordError(f"{dataset_dir}: no prepared dataset here (no dataset_info.json)")
    return tfds.builder_from_directory(os.fspath(dataset_dir))


def load_decoder(
    dataset_dir: str | os.PathLike[str], *, without: Container[str] = ()
) -> Callable[[bytes], dict[str, Any]]:
    """A function from a record's data to its features, but for those in `without`, as numpy arrays.

    TensorFlow is neither needed nor imported.
    """
    features = open_builder(dataset_dir).info.features
    wanted = {name: feature for name, feature in features.items() if name not in without}
    return tfds.features.FeaturesDict(wanted).deserialize_example_np


def masked_crc32c(data: bytes) -> int:
    """CRC32C, rotated right by 15 bits plus a constant, as TFRecord stores it."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _expected_shards(directory: Path) -> list[tuple[str, str, int]]:
    """(split, file name, number of records) of each shard, splits in order of name."""
    splits = open_builder(directory).info.splits
    return [
        (name, file, int(count))
        for name in sorted(splits)
        for file, count in zip(
            sorted(splits[name].filenames), splits[name].shard_lengths, strict=True
        )
    ]


def _scan_dataset(directory: Path) -> list[Shard]:
    shards = []
    for split, file, count in _expected_shards(directory):
        path = directory / file
        try:
            with path.open("rb") as stream:
                num_bytes = os.fstat(stream.fileno()).st_size
                lengths = np.array(list(_scan_lengths(stream, num_bytes, path)), np.int64)
        except FileNotFoundError:
            raise RecordError(f"{path}: this shard is missing; prepare the dataset again") from None
        if len(lengths) != count:
            raise RecordError(
                f"{path}: ends after record {len(lengths) - 1}; dataset_info.json expects {count} "
                "records; prepare the dataset again"
            )
        shards.append(Shard(split, file, num_bytes, lengths))
    return shards


def _scan_lengths(stream: BinaryIO, num_bytes: int, path: Path) -> Iterator[int]:
    """Walks from header to header, checking the length CRCs; data is checked when it is read."""
    offset, number = 0, 0
    while offset < num_bytes:
        stream.seek(offset)
        header = stream.read(_HEADER.size)
        length = _check_header(header, f"{path}, record {number}")
        offset += length + _FRAME
        if offset > num_bytes:
            raise _truncated(f"{path}, record {number}")
        yield length
        number += 1


def _check_header(header: bytes, where: str) -> int:
    """Returns the length that a record's first 12 bytes state; `where` names the record."""
    if len(header) < _HEADER.size:
        raise _truncated(where)
    length, crc = _HEADER.unpack(header[: _HEADER.size])
    if masked_crc32c(header[:8]) != crc:
        raise RecordError(
            f"{where}: damaged, its length has a wrong checksum; prepare the dataset again"
        )
    return length


def _check_record(frame: bytes, length: int, where: str) -> bytes:
    found = _check_header(frame, where)
    if found != length:
        raise RecordError(
            f"{where}: has {found} bytes, its index says {length}; delete {INDEX_NAME} beside it"
        )
    if len(frame) < length + _FRAME:
        raise _truncated(where)
    data = frame[_HEADER.size : -_FOOTER.size]
    if masked_crc32c(data) != _FOOTER.unpack(frame[-_FOOTER.size :])[0]:
        raise RecordError(
            f"{where}: damaged, its data has a wrong checksum; prepare the dataset again"
        )
    return data


def _truncated(where: str) -> RecordError:
    return RecordError(f"{where}: the file ends inside this record; prepare the dataset again")


def _pread(path: Path, size: int, offset: int) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        raise RecordError(f"{path}: this shard is missing; prepare the dataset again") from None
    try:
        return os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)


def _store_index(directory: Path, shards: list[Shard]) -> Path:
    body = [
        {
            "split": shard.split,
            "file": shard.file,
            "num_bytes": shard.num_bytes,
            "lengths": shard.lengths.tolist(),
        }
        for shard in shards
    ]
    document = {"format": _FORMAT, "sha256": _checksum(body), "shards": body}
    path = directory / INDEX_NAME
    descriptor, temporary = tempfile.mkstemp(prefix=INDEX_NAME, suffix=".tmp", dir=directory)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            json.dump(document, stream, separators=(",", ":"))
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would shut out a dataset's other users
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


def _read_index(directory: Path) -> list[Shard] | None:
    """The stored index, or None where it is missing, damaged or not of these shards."""
    try:
        document = json.loads((directory / INDEX_NAME).read_text(encoding="utf-8"))
        body = document["shards"]
        if document["format"] != _FORMAT or document["sha256"] != _checksum(body):
            return None
        shards = [
            Shard(s["split"], s["file"], s["num_bytes"], np.array(s["lengths"], np.int64))
            for s in body
        ]
        sizes = [(directory / shard.file).stat().st_size for shard in shards]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    found = [(shard.split, shard.file, len(shard.lengths)) for shard in shards]
    if found != _expected_shards(directory) or sizes != [shard.num_bytes for shard in shards]:
        return None
    return shards


def _checksum(body: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(body, separators=(",", ":")).encode()).hexdigest()
