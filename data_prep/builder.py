"""One prepared volume -> one finished TFRecord shard; all shards -> a dataset that tfds opens.

A dataset has one split per volume, one shard per split and one record per slice, in slice order.
Keypoints are (row, col) in pixels of their slice. TensorFlow is not needed: tfds itself encodes
features and serialises them as tf.train.Example, and `kafjax.data.records` frames each as a
TFRecord. The output does not depend on the time, the host or the worker.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds

from data_prep import sift
from data_prep.faults import DatasetError, Fault
from data_prep.findings import equal_images, planes
from data_prep.subjects import subjects_of
from data_prep.volumes import Facts, Prepared, Reader, Source
from kafjax.data.records import masked_crc32c, records_digest, write_index
from kafjax.errors import UserError
from kafjax.files import replacing
from kafjax.labels import STORED
from kafjax.paths import plain

VERSION = "1.0.0"  # of the records' format; the name of a dataset's folder
# Level 1 takes a third of the time of zlib's default and 2 % more space on CT slices.
_DEFLATE_LEVEL = 1
_LIBRARIES = ("numpy", "nibabel", "tensorflow-datasets")

Metadata = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """The user's choices. `max_keypoints` is K, the places for keypoints in each record.

    The default of 512 holds every SIFT keypoint of a 512 x 512 phantom slice (96 slices of eight
    subjects: 179 to 409, median 287) with a quarter to spare for richer images.
    """

    max_keypoints: int = 512
    keypoint_selection: sift.Selection = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        limit = int(np.iinfo(np.int16).max)
        if not 1 <= self.max_keypoints <= limit:
            raise UserError(f"max_keypoints is {self.max_keypoints}; expected 1 to {limit}")
        if self.keypoint_selection not in sift.SELECTIONS:
            raise UserError(
                f"keypoint_selection is {self.keypoint_selection!r}; "
                f"expected one of {sift.SELECTIONS}"
            )
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}; expected 0 or more")


@dataclass(frozen=True)
class Plan:
    """Everything that a shard depends on, apart from its source files."""

    name: str  # of the dataset
    reader: Reader
    options: Options
    reach: int  # of the records: the largest of the dataset's volumes
    dtype: str  # of the records' images, all channels

    @property
    def parameters(self) -> Metadata:
        """The plan as written to the metadata."""
        return {
            "format_version": VERSION,
            "kind": self.reader.kind,
            "classes": list(self.reader.classes),
            "radius": self.reader.radius,
            "reach": self.reach,
            "image_dtype": self.dtype,
            **self.reader.facts,
            **dataclasses.asdict(self.options),
            **self._order,
            "libraries": library_versions(),
        }

    @property
    def _order(self) -> Metadata:
        """Marks keypoints sorted by strength; datasets from before that order have no mark."""
        return (
            {"keypoint_order": "strength"} if self.options.keypoint_selection == "strongest" else {}
        )

    @property
    def features(self) -> tfds.features.FeaturesDict:
        """The records' features, as `features.json` describes them."""
        options = self.options
        return _features(options.max_keypoints, self.reach, self.dtype, self.reader.num_channels)


@dataclass(frozen=True)
class WrittenShard:
    """A finished shard and its inputs, stored as JSON next to the unfinished dataset."""

    volume_id: str
    file: str
    sha256: str
    records: str  # `kafjax.data.records.records_digest`
    num_bytes: int  # of the records' data, without framing
    keypoints_found: list[int]  # by slice, before the choice of K
    size: list[int]  # rows, columns
    labelled: bool
    reach: int  # slices to the farthest neighbour, by the dataset's rule
    case: str | None  # the volume's own name if it differs from the id
    sources: dict[str, str]  # SHA-256 by file name
    parameters: Metadata
    annotated: list[int] | None = None  # slices with annotated pixels, if labels are sparse

    @property
    def num_slices(self) -> int:
        """The number of records."""
        return len(self.keypoints_found)


def library_versions() -> dict[str, str]:
    """Versions of the libraries that determine the records."""
    return {"opencv": cv2.__version__, **{library: _version(library) for library in _LIBRARIES}}


@functools.cache  # reading them takes a fifth of a small volume's time
def _version(library: str) -> str:
    return importlib.metadata.version(library)


def shard_name(dataset: str, volume_id: str) -> str:
    """The file name that tfds expects for a split with one shard."""
    return f"{dataset}-{volume_id}.tfrecord-00000-of-00001"


def write_shard(
    plan: Plan, source: Source, sha256: dict[str, str], directory: Path
) -> WrittenShard:
    """Prepares one volume and writes its shard, which appears only when it is whole.

    `sha256` holds the source files' hashes from the dataset check. Raises `DatasetError` for
    a bad or changed file and `OSError`, with the shard's path, where it cannot be written.
    """
    prepared = plan.reader.prepare(plan.reader.read(source))
    volume = prepared.volume
    if volume.sha256 != sha256:
        raise DatasetError(
            [Fault(source.image, "changed while the dataset was prepared", "run the command again")]
        )
    keypoints = _slice_keypoints(plan, prepared)
    path = directory / shard_name(plan.name, source.id)
    features = plan.features
    data = (_serialise(features, example) for example in _examples(plan, prepared, keypoints))
    written = _write_records(path, data)
    return WrittenShard(
        volume_id=source.id,
        file=path.name,
        **written,
        keypoints_found=[found.num_found for found in keypoints],
        size=list(volume.image.shape[:2]),
        labelled=volume.label is not None,
        reach=plan.reader.reach(volume.image.shape[2]),
        case=source.case,
        sources=volume.sha256,
        parameters=plan.parameters,
        annotated=annotated_slices(volume.label) if plan.reader.sparse else None,
    )


def annotated_slices(label: np.ndarray | None) -> list[int]:
    """The slices of a sparse label that have annotated pixels."""
    return [] if label is None else np.flatnonzero((label != STORED).any((0, 1))).tolist()


def write_dataset_files(
    directory: Path,
    plan: Plan,
    shards: list[WrittenShard],
    sources: list[Source],
    facts: Mapping[str, Facts],
) -> None:
    """Turns a folder of finished shards into a dataset: writes tfds' JSON files and the index.

    `sources` and `facts` are of the same volumes, the latter by id.
    """
    template = tfds.core.ShardedFileTemplate(
        data_dir=plain(directory), dataset_name=plan.name, filetype_suffix="tfrecord"
    )
    splits = [
        tfds.core.SplitInfo(
            name=shard.volume_id,
            shard_lengths=[shard.num_slices],
            num_bytes=shard.num_bytes,
            filename_template=template,
        )
        for shard in shards
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=plain(directory),
        features=plan.features,
        split_infos=splits,
        version=VERSION,
        check_data=False,
        description="Slices of medical volumes with SIFT keypoints and their correspondences.",
        disable_shuffling=True,
        metadata=tfds.core.MetadataDict(_metadata(plan, shards, sources, facts)),
    )
    write_index(directory)


def _metadata(
    plan: Plan, shards: list[WrittenShard], sources: list[Source], facts: Mapping[str, Facts]
) -> Metadata:
    tests = {source.id for source in sources if source.test}
    subjects = subjects_of(sources)
    volumes = {
        shard.volume_id: {
            "sources": shard.sources,
            "records": shard.records,
            "num_slices": shard.num_slices,
            "size": shard.size,
            "labelled": shard.labelled,
            "reach": shard.reach,
            "plane": facts[shard.volume_id].plane,
            **({} if shard.case is None else {"case": shard.case}),
            **({} if shard.annotated is None else {"annotated": shard.annotated}),
            **({"test": True} if shard.volume_id in tests else {}),
        }
        for shard in shards
    }
    return {
        "dataset": plan.name,
        **plan.parameters,
        "planes": planes(facts.values()),
        "equal_images": equal_images(facts.values()),
        **({"subjects": subjects} if subjects else {}),
        "volumes": volumes,
    }


def _features(
    max_keypoints: int, reach: int, dtype: str, num_channels: int
) -> tfds.features.FeaturesDict:
    def tensor(shape: tuple[int | None, ...], dtype: str, doc: str) -> tfds.features.Tensor:
        return tfds.features.Tensor(shape=shape, dtype=np.dtype(dtype), encoding="zlib", doc=doc)

    def scalar(dtype: type, doc: str) -> tfds.features.Scalar:
        return tfds.features.Scalar(dtype=dtype, doc=doc)

    def moment() -> tfds.features.FeatureConnector:
        """One number, or one for each of several channels."""
        if num_channels == 1:
            return scalar(np.float32, "of the clipped volume")
        doc = "of the clipped volume, by channel"
        return tfds.features.Tensor(shape=(num_channels,), dtype=np.float32, doc=doc)

    return tfds.features.FeaturesDict(
        {
            "image": tensor(
                (None, None, num_channels), dtype, "clipped; normalise by (image - mean) / std"
            ),
            "label": tensor((None, None, 1), "uint8", "classes; all 0 where has_label is false"),
            "has_label": scalar(np.bool_, "whether the volume has labels"),
            "keypoints": tensor((max_keypoints, 2), "int16", "(row, col) in pixels, padded with 0"),
            "num_keypoints": scalar(np.int32, "number of real keypoints; the rest is padding"),
            "correspondences": tensor(
                (2 * reach, max_keypoints),
                "int16",
                "by neighbour offset -R..-1, 1..R: index of the matching keypoint there, or -1",
            ),
            "slice_index": scalar(np.int32, "from 0, towards the patient's head"),
            "num_slices": scalar(np.int32, "of the volume"),
            "volume_id": tfds.features.Text(doc="name of the volume and of its split"),
            "mean": moment(),
            "std": moment(),
            "spacing": tfds.features.Tensor(
                shape=(3,), dtype=np.float32, doc="mm: row, col, slice"
            ),
        }
    )


def _slice_keypoints(plan: Plan, prepared: Prepared) -> list[sift.Keypoints]:
    volume, options = prepared.volume, plan.options
    image = plan.reader.keypoint_image(volume)
    return [
        sift.find_keypoints(
            image[:, :, i],
            max_keypoints=options.max_keypoints,
            selection=options.keypoint_selection,
            rng=sift.slice_generator(options.seed, volume.id, i),
        )
        for i in range(volume.image.shape[2])
    ]


def match_volume(
    keypoints: list[sift.Keypoints], *, reach: int, own_reach: int, radius: float, places: int
) -> np.ndarray:
    """Correspondences of all neighbouring slices, int16 [slices, 2 * reach, places].

    Rows are the offsets -reach..-1, 1..reach. Offsets beyond the volume's `own_reach` or outside
    the volume are -1 throughout. Each pair of slices is matched once, and inverted for the other.
    """
    table = np.full((len(keypoints), 2 * reach, places), -1, np.int16)
    for i, first in enumerate(keypoints):
        for offset, second in enumerate(keypoints[i + 1 : i + 1 + own_reach], start=1):
            matches = sift.correspondences(first, second, radius=radius)
            table[i, reach + offset - 1, : len(first)] = matches
            table[i + offset, reach - offset, : len(second)] = sift.invert(matches, len(second))
    return table


def _examples(
    plan: Plan, prepared: Prepared, keypoints: list[sift.Keypoints]
) -> Iterator[dict[str, Any]]:
    volume, places = prepared.volume, plan.options.max_keypoints
    num_slices = volume.image.shape[2]
    table = match_volume(
        keypoints,
        reach=plan.reach,
        own_reach=plan.reader.reach(num_slices),
        radius=plan.reader.radius,
        places=places,
    )
    blank = np.zeros(volume.image.shape[:2], np.uint8)
    for i, found in enumerate(keypoints):
        yield {
            "image": volume.slice(i).astype(plan.dtype),
            "label": (blank if volume.label is None else volume.label[:, :, i])[..., None],
            "has_label": volume.label is not None,
            "keypoints": np.pad(found.positions, ((0, places - len(found)), (0, 0))),
            "num_keypoints": len(found),
            "correspondences": table[i],
            "slice_index": i,
            "num_slices": num_slices,
            "volume_id": volume.id,
            "mean": np.asarray(prepared.mean, np.float32),
            "std": np.asarray(prepared.std, np.float32),
            "spacing": np.array(volume.spacing, np.float32),
        }


def _serialise(features: tfds.features.FeaturesDict, example: dict[str, Any]) -> bytes:
    """A tf.train.Example as tfds writes it, except the compression level and a fixed order."""
    encoded = {
        name: {"shape": value.shape, "value": zlib.compress(value.tobytes(), _DEFLATE_LEVEL)}
        if name in ("image", "label")
        else features[name].encode_example(value)
        for name, value in example.items()
    }
    serialiser = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
    return serialiser.get_tf_example(encoded).SerializeToString(deterministic=True)


def _write_records(path: Path, records: Iterator[bytes]) -> dict[str, Any]:
    """Writes a TFRecord file, whole or not at all; returns fields of `WrittenShard`."""
    lengths, crcs, digest = [], [], hashlib.sha256()
    with replacing(path) as partial, partial.open("wb") as stream:
        for data in records:
            lengths.append(len(data))
            crcs.append(masked_crc32c(data))
            length = struct.pack("<Q", len(data))
            frame = b"".join((length, _crc(length), data, struct.pack("<I", crcs[-1])))
            stream.write(frame)
            digest.update(frame)
    return {
        "sha256": digest.hexdigest(),
        "records": records_digest(lengths, crcs),
        "num_bytes": sum(lengths),
    }


def _crc(data: bytes) -> bytes:
    return struct.pack("<I", masked_crc32c(data))
