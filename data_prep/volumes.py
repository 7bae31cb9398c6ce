"""Reads files into `Volume`s, reports their faults, and defines the datasets' `Reader`.

A `Reader` knows one dataset: its files, how raw labels map to classes, how intensities and grid are
prepared, and how far apart neighbouring slices may be. Volumes are [row, col, slice], reoriented by
`data_prep.nifti`; spacing is in mm in that order.
"""

import abc
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from data_prep.faults import DatasetError, Fault
from data_prep.formats import read_labels, read_scan
from data_prep.nifti import Plane, to_slices
from data_prep.scan import Scan
from kafjax.errors import UserError

MAX_EDGE = np.iinfo(np.int16).max  # keypoints are stored as int16
MAX_CLASSES = 256  # labels are stored as uint8


@dataclass(frozen=True)
class Source:
    """The files of one volume; `id` names its split: letters, digits and underscores."""

    id: str
    image: Path
    label: Path | None = None
    frame: int | None = None  # of a 4-d image, from 0
    case: str | None = None  # the volume's own name if it differs from `id`
    subject: str | None = None  # the patient, if the user names one
    test: bool = False  # in the test set, which runs train on only if asked to
    further: tuple[Path, ...] = ()  # the other channels, in order

    @property
    def images(self) -> tuple[Path, ...]:
        """The file of each channel."""
        return (self.image, *self.further)

    @property
    def files(self) -> tuple[Path, ...]:
        """The existing files, images first."""
        return self.images if self.label is None else (*self.images, self.label)

    @property
    def file_names(self) -> dict[str, Path]:
        """The existing files by name; labels named like their scan, in another folder, by both."""
        if self.label is None or self.label.name != self.image.name:
            return {path.name: path for path in self.files}
        return {
            **{path.name: path for path in self.images},
            f"{self.label.parent.name}/{self.label.name}": self.label,
        }

    @property
    def image_name(self) -> str:
        """The image's name in messages."""
        return self.image.name + ("" if self.frame is None else f", frame {self.frame + 1}")


@dataclass(frozen=True, eq=False)
class Volume:
    """A [row, col, slice] volume, with the SHA-256 of its source files by file name."""

    id: str
    image: np.ndarray  # of the first channel
    label: np.ndarray | None  # uint8, classes, or `STORED` where nobody annotated
    spacing: tuple[float, float, float]  # mm, (row, col, slice)
    affine: np.ndarray  # (row, col, slice) index to NIfTI's mm
    sha256: dict[str, str]
    plane: Plane = "axial"
    further: tuple[np.ndarray, ...] = ()  # the other channels, on the same grid

    @property
    def channels(self) -> tuple[np.ndarray, ...]:
        """The image of each channel."""
        return (self.image, *self.further)

    def slice(self, i: int) -> np.ndarray:
        """A slice with all channels, [row, col, channel]."""
        return np.stack([image[:, :, i] for image in self.channels], axis=-1)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A volume with its dataset's rules applied; normalise by (image - mean) / std.

    Of several channels each has its own mean and deviation.
    """

    volume: Volume
    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]


@dataclass(frozen=True)
class Facts:
    """The facts of one prepared volume that the dataset needs before writing any record."""

    id: str
    size: tuple[int, int]  # rows, columns
    num_slices: int
    dtype: str
    labelled: bool
    sha256: dict[str, str]
    plane: Plane
    content: str  # hash of the raw image's shape and values, ignoring type and spacing


class Reader(abc.ABC):
    """One dataset's layout and rules."""

    kind: str
    classes: tuple[str, ...]  # names, background first; empty if a fault hides them
    radius: int  # pixels by Manhattan distance, see `sift.correspondences`
    num_channels = 1
    one_plane = True  # whether volumes are expected to be cut in the same plane

    @abc.abstractmethod
    def find(self, raw_dir: Path) -> tuple[list[Source], list[Fault]]:
        """The volumes of a folder in order, and the faults of its files' names."""

    @abc.abstractmethod
    def reach(self, num_slices: int) -> int:
        """The largest slice distance to a neighbour in a volume of `num_slices`; at least 1."""

    @abc.abstractmethod
    def prepare(self, volume: Volume) -> Prepared:
        """Applies grid and intensity rules. Raises `DatasetError` for a constant image."""

    @property
    def sparse(self) -> bool:
        """Whether labels may be `STORED` where nobody annotated."""
        return False

    @property
    def facts(self) -> dict[str, Any]:
        """Further metadata of the dataset, next to kind, classes, radius and reach."""
        return {}

    def plane(self, affine: np.ndarray) -> Plane:
        """The plane that a file's slices lie in."""
        return "axial"

    def keypoint_image(self, volume: Volume) -> np.ndarray:
        """The channel of a volume in which keypoints are found."""
        return volume.image

    def map_labels(self, raw: np.ndarray) -> np.ndarray:
        """Maps raw labels, non-negative integers, to classes, uint8. Raises `ValueError`."""
        highest = (len(self.classes) or MAX_CLASSES) - 1
        if raw.max(initial=0) > highest:
            raise UserError(
                f"labels up to {raw.max():g}; expected whole numbers from 0 to {highest}"
            )
        return raw.astype(np.uint8)

    def raw_labels(self, classes: np.ndarray) -> np.ndarray:
        """Classes, uint8, to the numbers that label files have for them."""
        return classes

    def read(self, source: Source) -> Volume:
        """Reads and checks one volume. Raises `DatasetError` with all its faults."""
        files, faults = _read_all(source)
        image, label = files.get(source.image), files.get(source.label or Path())
        images = {path: files[path] for path in source.images if path in files}
        for path, channel in images.items():
            faults += _image_faults(path, channel, source.frame)
            if image is not None and path != source.image:
                faults += grid_faults(source.image, image, path, channel, of=source.image.name)
        classes = None
        if label is not None and source.label is not None:
            if image is not None:
                if image.sha256 == label.sha256:
                    faults.append(Fault(source.label, "is the image itself", "expected its labels"))
                else:
                    faults += grid_faults(source.image, image, source.label, label)
            classes, label_faults = self._classes(source.label, label)
            faults += label_faults
        if faults or image is None:
            raise DatasetError(faults)
        sha256 = {name: files[path].sha256 for name, path in source.file_names.items()}
        arrays = [channel.array for channel in images.values()]
        return _volume(source, image, arrays, classes, self.plane(image.affine), sha256)

    def _classes(self, path: Path, label: Scan) -> tuple[np.ndarray | None, list[Fault]]:
        found = label_problem(label.array)
        if not found:
            try:
                return self.map_labels(label.array), []
            except UserError as error:
                found = str(error)
        return None, [Fault(path, found, "correct the labels")]


def inspect(reader: Reader, source: Source) -> Facts:
    """Reads and prepares one volume and returns its facts. Raises `DatasetError`."""
    raw = reader.read(source)
    return facts_of(raw, reader.prepare(raw).volume)


def facts_of(raw: Volume, prepared: Volume) -> Facts:
    """The facts of a volume, from its raw and its prepared form."""
    rows, columns, num_slices = prepared.image.shape
    digest = hashlib.sha256(repr(raw.image.shape).encode())
    for image in raw.channels:
        for k in range(image.shape[2]):  # one by one, to save memory
            digest.update(np.ascontiguousarray(image[:, :, k], np.float32).data)
    return Facts(
        id=prepared.id,
        size=(rows, columns),
        num_slices=num_slices,
        dtype=np.result_type(*(image.dtype for image in prepared.channels)).name,
        labelled=prepared.label is not None,
        sha256=prepared.sha256,
        plane=prepared.plane,
        content=digest.hexdigest(),
    )


def _read_all(source: Source) -> tuple[dict[Path, Scan], list[Fault]]:
    files: dict[Path, Scan] = {}
    faults: list[Fault] = []
    for path in source.files:
        try:
            if path == source.image:
                files[path] = read_scan(path, frame=source.frame)
            else:
                files[path] = read_labels(path, files.get(source.image))
        except DatasetError as error:
            faults += error.faults
    return files, faults


def _image_faults(path: Path, image: Scan, frame: int | None) -> list[Fault]:
    values = image.array
    where = "" if frame is None else f"frame {frame + 1}: "
    if max(values.shape) > MAX_EDGE:
        remedy = f"expected edges of at most {MAX_EDGE}"
        return [Fault(path, f"{where}shape {values.shape}", remedy)]
    if values.dtype.kind == "f" and (bad := int((~np.isfinite(values)).sum())):
        found = f"{where}{bad} values are NaN or infinite"
        return [Fault(path, found, "replace them or leave it out")]
    if values.min() == values.max():
        return [Fault(path, f"{where}every value is {values.flat[0]}", "leave this volume out")]
    return []


def grid_faults(
    image_path: Path, image: Scan, path: Path, label: Scan, *, of: str = "the image"
) -> list[Fault]:
    """Why a file does not lie on the grid of an image, or of other labels, by shape and affine.

    `of` is what the other file is called: for labels `the image` or `the reference`, for a channel
    the first one's name.
    """
    if image.array.shape != label.array.shape:
        found = f"shape {label.array.shape}, but {of} has {image.array.shape}"
        remedy = f"resample it onto {image_path.name}'s grid"
        if of != image_path.name:
            remedy = f"draw or {remedy}, and check that no label is lost"
        return [Fault(path, found, remedy)]
    # The largest distance between one voxel's positions by the two affines, in voxels.
    corners = np.array([[*index, 1] for index in np.ndindex(2, 2, 2)])
    corners[:, :3] *= np.array(image.array.shape) - 1
    apart = np.linalg.norm((corners @ (image.affine - label.affine).T)[:, :3], axis=1).max()
    if apart > 0.1 * nib.affines.voxel_sizes(image.affine).min():
        # Resampling by a wrong header would lose labels and still pass the next check.
        remedy = (
            f"do not resample it: its shape is {of}'s. Lay it on {image_path.name} voxel by "
            f"voxel; if it fits, its header is wrong: save it with {of}'s affine"
        )
        return [Fault(path, f"its affine differs from {of}'s by up to {apart:.3g} mm", remedy)]
    return []


def label_problem(values: np.ndarray) -> str:
    """Why values cannot be labels, or an empty string."""
    if values.dtype.kind == "f" and not (values == np.rint(values)).all():
        return "labels that are not whole numbers"
    if values.min() < 0:
        return f"negative labels, down to {values.min():g}"
    return ""


def _volume(
    source: Source,
    image: Scan,
    channels: Sequence[np.ndarray],
    classes: np.ndarray | None,
    plane: Plane,
    sha256: dict[str, str],
) -> Volume:
    turned, affine = to_slices(image.array, image.affine, plane)
    further = tuple(to_slices(array, image.affine, plane)[0] for array in channels[1:])
    label = None if classes is None else to_slices(classes, image.affine, plane)[0]
    row, column, between = map(float, nib.affines.voxel_sizes(affine))
    spacing = (row, column, between)
    return Volume(source.id, turned, label, spacing, affine, sha256, plane, further)
