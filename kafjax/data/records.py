"""Random access to the records of a prepared dataset, without TensorFlow.

A dataset directory is what `tfds` writes: one split per volume, each split's shards TFRecord files,
one record per slice in slice order. A TFRecord is a sequence of

    length      uint64, little endian
    length CRC  uint32, masked CRC32C of the length's 8 bytes
    data        `length` bytes
    data CRC    uint32, masked CRC32C of the data

(https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details). The index next
to the shards stores each record's length, which gives its offset, so any record is one `pread`
away, and its data CRC, which detects another dataset's record in its place. Records are numbered
from 0 through the whole dataset, splits in order of name. From a bucket a record is read by its
range and kept on this machine (`kafjax.buckets.ranges`).

Offsets and lengths are in bytes; a record's offset is its length field's, and its length is its
data's.
"""

import contextlib
import hashlib
import json
import logging
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import google_crc32c
import numpy as np
import tensorflow_datasets as tfds

from kafjax.buckets.mirror import sizes
from kafjax.buckets.places import url_of
from kafjax.buckets.ranges import Ranged, read_part
from kafjax.data.dataset_files import (
    RecordError,
    find_dataset,
    load_decoder,
    naming_dataset,
    open_builder,
)
from kafjax.files import write_text

__all__ = [
    "FRAME_BYTES",
    "INDEX_NAME",
    "RecordError",
    "RecordReader",
    "Shard",
    "find_dataset",
    "load_decoder",
    "load_index",
    "masked_crc32c",
    "open_builder",
    "records_digest",
    "write_index",
]

INDEX_NAME = "record_index.json"
# Files whose hashes the index stores, because they describe the records.
_DESCRIPTIONS = ("features.json", "metadata.json")
_FORMAT = "kafjax record index 2"
_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")
FRAME_BYTES = _HEADER.size + _FOOTER.size

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Shard:
    """One TFRecord file: its split, its size, and its records' data lengths and data CRCs."""

    split: str
    file: str
    num_bytes: int
    lengths: np.ndarray  # int64 [records]
    crcs: np.ndarray  # int64 [records], masked

    @property
    def offsets(self) -> np.ndarray:
        """Byte offsets of the records' length fields, int64 [records]."""
        return np.cumsum(self.lengths + FRAME_BYTES) - self.lengths - FRAME_BYTES


def write_index(dataset_dir: str | os.PathLike[str]) -> Path:
    """Scans all shards of a dataset and writes the index next to them, atomically.

    The same shards give the same bytes. Returns the index's path. Raises `RecordError` for a shard
    that is missing, truncated, or lacks the records that the dataset's metadata describes.
    """
    directory = Path(dataset_dir)
    builder = open_builder(directory)
    shards = _scan_dataset(directory, builder)
    _check_prepared(directory, shards, builder)
    return _store_index(directory, shards)


def load_index(
    dataset_dir: str | os.PathLike[str], builder: tfds.core.DatasetBuilder | None = None
) -> list[Shard]:
    """The shards in order of split, from the index or, if that is missing or stale, from a scan.

    An index is stale if it was written for other shards or shard sizes, or its checksum is wrong. A
    rebuilt index is written back if the directory allows it. `builder` is the dataset's, if it is
    open. Raises `RecordError` as `write_index` does, and if a description of the records, such as
    `metadata.json`, does not match the index.
    """
    directory = Path(dataset_dir)
    shards = _read_index(directory, builder)
    if shards is not None:
        return shards
    log.info("%s: scanning the shards, no index fits them", directory)
    builder = builder or open_builder(directory)
    shards = _scan_dataset(directory, builder)
    _check_prepared(directory, shards, builder)
    with contextlib.suppress(OSError):  # a read-only dataset is served from memory
        _store_index(directory, shards)
    return shards


class RecordReader:
    """Reads checked records by global number; safe to share between threads and to pickle.

    Each read opens its shard: no file descriptor outlives a call, for any number of volumes.
    """

    def __init__(
        self,
        dataset_dir: str | os.PathLike[str],
        builder: tfds.core.DatasetBuilder | None = None,
    ):
        self.directory = Path(dataset_dir)
        self._is_in_bucket = url_of(self.directory) is not None
        self._shards = load_index(self.directory, builder)
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

    def digests(self) -> dict[str, str]:
        """The `records_digest` of each split."""
        return _digests(self._shards)

    def split_of(self, number: int) -> str:
        """The split of a record."""
        return self._shards[self._shard_of(number)].split

    def _shard_of(self, number: int) -> int:
        return int(np.searchsorted(self._starts, number, side="right")) - 1

    def record_number(self, split: str, i: int) -> int:
        """Global number of record `i` of a split; `KeyError` or `IndexError` if out of range."""
        return self.splits[split][i]

    def __getitem__(self, number: int) -> bytes:
        """The data of one record, its checksums verified; raises `RecordError` or `IndexError`."""
        if not 0 <= number < len(self):
            raise IndexError(f"record {number}: {self.directory} holds {len(self)} records")
        s = self._shard_of(number)
        shard, i = self._shards[s], int(number - self._starts[s])
        path, length = self.directory / shard.file, int(shard.lengths[i])
        offset, crc, where = int(self._offsets[s][i]), int(shard.crcs[i]), f"{path}, record {i}"
        url = _bucket_of(path) if self._is_in_bucket else None
        if url is None:
            return _check_record(_pread(path, length + FRAME_BYTES, offset), length, crc, where)
        with _naming_missing(path):
            frame = read_part(url, length + FRAME_BYTES, offset, version=crc)
            try:
                return _check_record(frame, length, crc, where)
            except RecordError:  # perhaps only here
                frame = read_part(url, length + FRAME_BYTES, offset, version=crc, again=True)
                return _check_record(frame, length, crc, where)


def records_digest(lengths: Iterable[int], crcs: Iterable[int]) -> str:
    """A hash of a split's records from their lengths and masked data CRCs, in hexadecimal."""
    digest = hashlib.blake2b(digest_size=16)
    for length, crc in zip(lengths, crcs, strict=True):
        digest.update(_HEADER.pack(length, crc))
    return digest.hexdigest()


def masked_crc32c(data: bytes) -> int:
    """CRC32C, rotated right by 15 bits plus a constant, as TFRecord stores it."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _expected_shards(
    directory: Path, builder: tfds.core.DatasetBuilder
) -> list[tuple[str, str, int]]:
    """(split, file name, number of records) of each shard, splits in order of name."""
    splits = builder.info.splits
    with naming_dataset(directory):
        return [
            (name, file, int(count))
            for name in sorted(splits)
            for file, count in zip(
                sorted(splits[name].filenames), splits[name].shard_lengths, strict=True
            )
        ]


def _scan_dataset(directory: Path, builder: tfds.core.DatasetBuilder) -> list[Shard]:
    shards, num_bytes = [], sizes(directory)
    for split, file, count in _expected_shards(directory, builder):
        path = directory / file
        with _naming_missing(path), _open_shard(path) as stream:
            if file not in num_bytes:
                raise FileNotFoundError
            scanned = np.array(list(_scan_shard(stream, num_bytes[file], path)), np.int64)
        if len(scanned) != count:
            raise RecordError(
                f"{path}: ends after record {len(scanned) - 1}; dataset_info.json expects {count} "
                "records; prepare the dataset again"
            )
        shards.append(Shard(split, file, num_bytes[file], *scanned.reshape(-1, 2).T))
    return shards


def _scan_shard(stream: BinaryIO, num_bytes: int, path: Path) -> Iterator[tuple[int, int]]:
    """Walks from record to record, checking the length CRCs; data is checked when it is read.

    Yields each record's length and stored masked data CRC.
    """
    offset, number = 0, 0
    while offset < num_bytes:
        stream.seek(offset)
        header = stream.read(_HEADER.size)
        length = _check_header(header, f"{path}, record {number}")
        offset += length + FRAME_BYTES
        if offset > num_bytes:
            raise _truncated(f"{path}, record {number}")
        stream.seek(offset - _FOOTER.size)
        yield length, *_FOOTER.unpack(stream.read(_FOOTER.size))
        number += 1


def _check_prepared(
    directory: Path, shards: list[Shard], builder: tfds.core.DatasetBuilder
) -> None:
    """Raises `RecordError` naming the shards whose records differ from the prepared ones."""
    volumes = dict(builder.info.metadata or {}).get("volumes", {})
    found = _digests(shards)
    foreign = [
        f"  {directory / shard.file}"
        for shard in shards
        # Metadata of earlier versions has no digests.
        if "records" in volumes.get(shard.split, {})
        and volumes[shard.split]["records"] != found[shard.split]
    ]
    if foreign:
        raise RecordError(
            "these shards do not hold the records that metadata.json describes, perhaps another "
            "dataset's; prepare the dataset again:\n" + "\n".join(foreign)
        )


def _digests(shards: Iterable[Shard]) -> dict[str, str]:
    """`records_digest` of each split."""
    found: dict[str, tuple[list[int], list[int]]] = {}
    for shard in shards:
        lengths, crcs = found.setdefault(shard.split, ([], []))
        lengths += shard.lengths.tolist()
        crcs += shard.crcs.tolist()
    return {split: records_digest(*of_split) for split, of_split in found.items()}


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


def _check_record(frame: bytes, length: int, crc: int, where: str) -> bytes:
    found = _check_header(frame, where)
    if found != length:
        raise RecordError(
            f"{where}: has {found} bytes, its index says {length}; delete {INDEX_NAME} next to it"
        )
    if len(frame) < length + FRAME_BYTES:
        raise _truncated(where)
    data = frame[_HEADER.size : -_FOOTER.size]
    stated = _FOOTER.unpack(frame[-_FOOTER.size :])[0]
    if masked_crc32c(data) != stated:
        raise RecordError(
            f"{where}: damaged, its data has a wrong checksum; prepare the dataset again"
        )
    if stated != crc:
        raise RecordError(
            f"{where}: is not the record of its index, perhaps another dataset's; prepare the "
            f"dataset again, or delete {INDEX_NAME} next to it if you replaced it on purpose"
        )
    return data


def _truncated(where: str) -> RecordError:
    return RecordError(f"{where}: the file ends inside this record; prepare the dataset again")


@contextlib.contextmanager
def _naming_missing(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise RecordError(f"{path}: this shard is missing; prepare the dataset again") from None


def _bucket_of(path: Path) -> str | None:
    """The URL of a shard that is in a bucket and not on this machine."""
    url = url_of(path)
    return None if url is None or path.exists() else url


def _open_shard(path: Path) -> BinaryIO:
    url = _bucket_of(path)
    return path.open("rb") if url is None else cast(BinaryIO, Ranged(url))


def _pread(path: Path, size: int, offset: int) -> bytes:
    with _naming_missing(path):
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        return os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)


def _store_index(directory: Path, shards: list[Shard]) -> Path:
    body_of_shards = [
        {
            "split": shard.split,
            "file": shard.file,
            "num_bytes": shard.num_bytes,
            "lengths": shard.lengths.tolist(),
            "crcs": shard.crcs.tolist(),
        }
        for shard in shards
    ]
    body = {"shards": body_of_shards, "descriptions": _describe(directory)}
    document = {"format": _FORMAT, "sha256": _checksum(body), **body}
    path = directory / INDEX_NAME
    write_text(path, json.dumps(document, separators=(",", ":")))
    return path


def _read_index(directory: Path, builder: tfds.core.DatasetBuilder | None) -> list[Shard] | None:
    """The stored index, or None if it is missing, damaged or for other shards."""
    try:
        document = json.loads((directory / INDEX_NAME).read_bytes())
        body = {name: document[name] for name in ("shards", "descriptions")}
        if document["format"] != _FORMAT or document["sha256"] != _checksum(body):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    _check_descriptions(directory, body["descriptions"])
    shards = [
        Shard(
            **{**shard, **{name: np.array(shard[name], np.int64) for name in ("lengths", "crcs")}}
        )
        for shard in body["shards"]
    ]
    found = [(shard.split, shard.file, len(shard.lengths)) for shard in shards]
    if found != _expected_shards(directory, builder or open_builder(directory)):
        return None
    num_bytes = sizes(directory)  # the scan names a missing file
    return shards if all(num_bytes.get(s.file) == s.num_bytes for s in shards) else None


def _describe(directory: Path) -> dict[str, str]:
    """SHA-256 of the files that describe the records, by name."""
    return {
        name: hashlib.sha256((directory / name).read_bytes()).hexdigest()
        for name in _DESCRIPTIONS
        if (directory / name).is_file()
    }


def _check_descriptions(directory: Path, expected: Mapping[str, str]) -> None:
    found = _describe(directory)
    changed = [name for name in _DESCRIPTIONS if found.get(name) != expected.get(name)]
    if changed:
        raise RecordError(
            f"{directory}: {' and '.join(changed)} changed since {INDEX_NAME} was written; prepare "
            f"the dataset again, or delete {INDEX_NAME} if that was on purpose"
        )


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, separators=(",", ":")).encode()).hexdigest()
