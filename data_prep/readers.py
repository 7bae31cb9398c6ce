"""Raw datasets on disk -> `Volume`s, each dataset's rules, and all that may be wrong with them.

A `Reader` knows one dataset: which files make a volume, how raw labels become classes, how
intensities are prepared, how far apart neighbouring slices may be. Another dataset is one more
subclass in `READERS`. Volumes are [row, col, slice] as `data_prep.nifti` turns them; spacing is in
mm in that order. Source of the rules: Yang et al. (NeurIPS 2023), appendix.
"""

import abc
import dataclasses
import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from data_prep.faults import DatasetError, Fault
from data_prep.nifti import Nifti, read_nifti, to_slices

MAX_EDGE = np.iinfo(np.int16).max  # keypoints are stored as int16


@dataclass(frozen=True)
class Source:
    """The files of one volume; `id` names its split, so it is letters, digits and underscores."""

    id: str
    image: Path
    label: Path | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that are there, image first."""
        return (self.image,) if self.label is None else (self.image, self.label)


@dataclass(frozen=True, eq=False)
class Volume:
    """A volume as [row, col, slice], with the SHA-256 of the files it came from, by file name."""

    id: str
    image: np.ndarray
    label: np.ndarray | None  # uint8, classes
    spacing: tuple[float, float, float]  # mm, (row, col, slice)
    affine: np.ndarray  # (row, col, slice) index to NIfTI's mm
    sha256: dict[str, str]


@dataclass(frozen=True, eq=False)
class Prepared:
    """A volume with its dataset's intensity rule applied; normalised is (image - mean) / std."""

    volume: Volume
    mean: float
    std: float


@dataclass(frozen=True)
class Facts:
    """What the whole dataset must know of one prepared volume before any record is written."""

    id: str
    size: tuple[int, int]  # rows, columns
    num_slices: int
    dtype: str
    labelled: bool
    sha256: dict[str, str]
    content: str  # hash of the prepared image's shape and values


class Reader(abc.ABC):
    """One dataset's layout and rules."""

    kind: str
    classes: tuple[str, ...]  # names, background first
    radius: int  # pixels by Manhattan distance, see `sift.correspondences`

    @abc.abstractmethod
    def find(self, raw_dir: Path) -> tuple[list[Source], list[Fault]]:
        """The volumes of a folder in order, and what is wrong with its files' names."""

    @abc.abstractmethod
    def reach(self, num_slices: int) -> int:
        """How many slices away a neighbour in a volume of `num_slices` may be, at least 1."""

    @abc.abstractmethod
    def prepare(self, volume: Volume) -> Prepared:
        """Applies the dataset's intensity rule. Raises `DatasetError` for a constant image."""

    def map_labels(self, raw: np.ndarray) -> np.ndarray:
        """Raw labels, whole and not negative, to classes, uint8. Raises `ValueError`."""
        if raw.max(initial=0) >= len(self.classes):
            raise ValueError(
                f"labels up to {raw.max():g}; expected whole numbers from 0 to "
                f"{len(self.classes) - 1}"
            )
        return raw.astype(np.uint8)

    def read(self, source: Source) -> Volume:
        """Reads and checks one volume. Raises `DatasetError` with all its faults."""
        files, faults = _read_all(source.files)
        image, label = files.get(source.image), files.get(source.label or Path())
        if image is not None:
            faults += _image_faults(source.image, image)
        classes = None
        if label is not None and source.label is not None:
            if image is not None:
                faults += _partner_faults(source.image, image, source.label, label)
            classes, label_faults = self._classes(source.label, label)
            faults += label_faults
        if faults or image is None:
            raise DatasetError(faults)
        return _volume(source, image, classes, {path.name: f.sha256 for path, f in files.items()})

    def _classes(self, path: Path, label: Nifti) -> tuple[np.ndarray | None, list[Fault]]:
        found = _label_problem(label.array)
        if not found:
            try:
                return self.map_labels(label.array), []
            except ValueError as error:
                found = str(error)
        return None, [Fault(path, found, "correct the labels")]


class ChdReader(Reader):
    """Congenital heart disease CT: `ct_1001_image.nii.gz` beside `ct_1001_label.nii.gz`."""

    kind = "chd"
    classes = (
        "background",
        "left_ventricle",
        "right_ventricle",
        "left_atrium",
        "right_atrium",
        "myocardium",
        "aorta",
        "pulmonary_artery",
    )
    radius = 20

    _NAME = re.compile(r"ct_(\d+)_(image|label)\.nii(\.gz)?")
    _EXPECTED = "ct_<number>_image.nii.gz and ct_<number>_label.nii.gz"

    def find(self, raw_dir: Path) -> tuple[list[Source], list[Fault]]:
        """Pairs images and labels by number; numbers may have gaps."""
        if not raw_dir.is_dir():
            return [], [Fault(raw_dir, "is not a folder", "give the folder of the raw volumes")]
        files: dict[tuple[int, str], list[Path]] = defaultdict(list)
        faults = []
        for path in sorted(p for p in raw_dir.iterdir() if _is_nifti(p)):
            if match := self._NAME.fullmatch(path.name):
                files[int(match[1]), match[2]].append(path)
            else:
                remedy = f"rename it to {self._EXPECTED}, or move it away"
                faults.append(Fault(path, "its name is not one of this layout's", remedy))
        if not files and not faults:
            faults.append(Fault(raw_dir, "holds no volume", f"expected {self._EXPECTED}"))
        return self._pair(files, faults)

    def _pair(
        self, files: dict[tuple[int, str], list[Path]], faults: list[Fault]
    ) -> tuple[list[Source], list[Fault]]:
        sources = []
        for number in sorted({number for number, _ in files}):
            images, labels = files.get((number, "image"), []), files.get((number, "label"), [])
            for extra in images[1:] + labels[1:]:
                faults.append(Fault(extra, f"is a second file of ct_{number}", "keep one of them"))
            if not images or not labels:
                path, missing = (images or labels)[0], "label" if images else "image"
                remedy = f"add ct_{number}_{missing}.nii.gz, or move this file away"
                faults.append(Fault(path, f"has no {missing} beside it", remedy))
            for image in images[:1]:
                sources.append(Source(f"ct_{number}", image, labels[0] if labels else None))
        return sources, faults

    def reach(self, num_slices: int) -> int:
        """5 % of the slices."""
        return max(1, num_slices // 20)

    def map_labels(self, raw: np.ndarray) -> np.ndarray:
        """Raw labels above 7, structures that the method leaves out, become background."""
        return np.where(raw < len(self.classes), raw, 0).astype(np.uint8)

    def prepare(self, volume: Volume) -> Prepared:
        """Clips to the volume's 1st and 99th percentile; integers are truncated to integers."""
        low, high = np.percentile(volume.image, [1, 99]).tolist()
        if volume.image.dtype.kind in "iu":
            # The same as clipping and then truncating, without a float copy of the volume.
            low, high = int(low), int(high)
        clipped = np.clip(volume.image, low, high).astype(volume.image.dtype)
        return _with_moments(dataclasses.replace(volume, image=clipped))


READERS: dict[str, Reader] = {reader.kind: reader for reader in (ChdReader(),)}


def inspect(reader: Reader, source: Source) -> Facts:
    """Reads and prepares one volume for what the dataset must know of it. Raises `DatasetError`."""
    volume = reader.prepare(reader.read(source)).volume
    rows, columns, num_slices = volume.image.shape
    digest = hashlib.sha256(repr(volume.image.shape).encode())
    digest.update(np.ascontiguousarray(volume.image).data)
    return Facts(
        id=volume.id,
        size=(rows, columns),
        num_slices=num_slices,
        dtype=volume.image.dtype.name,
        labelled=volume.label is not None,
        sha256=volume.sha256,
        content=digest.hexdigest(),
    )


def duplicate_faults(sources: Iterable[Source], facts: dict[str, Facts]) -> list[Fault]:
    """A fault for every image whose values another, earlier volume already has."""
    first: dict[str, Source] = {}
    faults = []
    for source in sources:
        if source.id in facts:
            original = first.setdefault(facts[source.id].content, source)
            if original is not source:
                found = f"has the same values as {original.image.name}"
                faults.append(Fault(source.image, found, "move one of the two volumes away"))
    return faults


def _is_nifti(path: Path) -> bool:
    return path.name.endswith((".nii", ".nii.gz")) and not path.name.startswith(".")


def _read_all(paths: Iterable[Path]) -> tuple[dict[Path, Nifti], list[Fault]]:
    files: dict[Path, Nifti] = {}
    faults: list[Fault] = []
    for path in paths:
        try:
            files[path] = read_nifti(path)
        except DatasetError as error:
            faults += error.faults
    return files, faults


def _image_faults(path: Path, image: Nifti) -> list[Fault]:
    values = image.array
    if max(values.shape) > MAX_EDGE:
        return [Fault(path, f"shape {values.shape}", f"expected edges of at most {MAX_EDGE}")]
    if values.dtype.kind == "f" and (bad := int((~np.isfinite(values)).sum())):
        return [Fault(path, f"{bad} values are NaN or infinite", "replace them or leave it out")]
    if values.min() == values.max():
        return [Fault(path, f"every value is {values.flat[0]}", "leave this volume out")]
    return []


def _partner_faults(image_path: Path, image: Nifti, path: Path, label: Nifti) -> list[Fault]:
    remedy = f"resample it onto {image_path.name}'s grid"
    if image.array.shape != label.array.shape:
        found = f"shape {label.array.shape}, but the image has {image.array.shape}"
        return [Fault(path, found, remedy)]
    # The farthest that the two affines put one voxel apart, in voxels.
    corners = np.array([[*index, 1] for index in np.ndindex(2, 2, 2)])
    corners[:, :3] *= np.array(image.array.shape) - 1
    apart = np.linalg.norm((corners @ (image.affine - label.affine).T)[:, :3], axis=1).max()
    if apart > 0.1 * nib.affines.voxel_sizes(image.affine).min():
        return [Fault(path, f"its affine differs from the image's by up to {apart:.3g} mm", remedy)]
    return []


def _label_problem(values: np.ndarray) -> str:
    """What makes values unfit as labels, or nothing."""
    if values.dtype.kind == "f" and not (values == np.rint(values)).all():
        return "labels that are not whole numbers"
    if values.min() < 0:
        return f"negative labels, down to {values.min():g}"
    return ""


def _volume(
    source: Source, image: Nifti, classes: np.ndarray | None, sha256: dict[str, str]
) -> Volume:
    turned, affine = to_slices(image.array, image.affine)
    label = None if classes is None else to_slices(classes, image.affine)[0]
    row, column, between = map(float, nib.affines.voxel_sizes(affine))
    return Volume(source.id, turned, label, (row, column, between), affine, sha256)


def _with_moments(volume: Volume) -> Prepared:
    """Mean and standard deviation of the image, slice by slice to save memory."""
    slices = np.moveaxis(volume.image, 2, 0)
    mean = np.mean([s.mean(dtype=np.float64) for s in slices])
    std = np.sqrt(np.mean([((s - mean) ** 2).mean() for s in slices]))
    if std == 0:
        raise DatasetError(
            [
                Fault(
                    Path(next(iter(volume.sha256))),
                    "is constant between its 1st and 99th percentile",
                    "leave this volume out",
                )
            ]
        )
    return Prepared(volume, float(mean), float(std))
