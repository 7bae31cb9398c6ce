"""Anyone's scans in a plain folder, and labels, where there are some, in another one.

    SCANS/anna.nii.gz, SCANS/ben.nrrd, SCANS/cleo/ (a DICOM series), ...
    LABELS/anna.nii.gz               of the same name; a scan without is a volume without labels

The name of a label file is its scan's, with or without the scan's `_0000`, nnU-Net's first channel.
Labels are any whole numbers, 0 the background; `label_values` records which number each class has.
Neighbours follow the CHD rule of the KAF paper, as do the intensities of CT; others are not
clipped.
"""

import dataclasses
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.entries import SCANS, list_entries, unused_folder
from data_prep.faults import DatasetError, Fault, finding
from data_prep.formats import read_scan
from data_prep.intensity import Intensity, prepare_channels
from data_prep.nifti import Plane, slice_plane
from data_prep.resampling import check_spacing, resample
from data_prep.segmentations import is_segmentation
from data_prep.volumes import MAX_CLASSES, Prepared, Reader, Source, Volume, label_problem
from kafjax.errors import UserError
from kafjax.labels import STORED

DEFAULT_RADIUS = 20
FIRST_CHANNEL = "_0000"
_LONGEST_NAME = 120
LOWEST_OF_CT = -200  # air is -1000 HU; other scanners' numbers are rarely negative


@dataclass(frozen=True)
class OwnReader(Reader):
    """The rules of grid and intensity for data of one's own, whatever its layout."""

    classes: tuple[str, ...]
    radius: int = DEFAULT_RADIUS
    intensity: Intensity | tuple[Intensity, ...] = "zscore"  # of each channel, if several
    ignore_label: int | None = None  # the files' number of voxels that nobody annotated
    blank_slices_unannotated: bool = False  # whether slices without any class were left out
    pixel_spacing: float | None = None  # mm, of resampled slices; None: as they are

    @property
    def sparse(self) -> bool:
        """Whether labels may leave voxels out, which are `STORED` then."""
        return self.ignore_label is not None or self.blank_slices_unannotated

    @property
    def facts(self) -> dict[str, Any]:
        """What is done with intensities and slices and, if they are sparse, with the labels."""
        sparse = {
            "sparse_labels": True,
            "ignore_label": self.ignore_label,
            "blank_slices_unannotated": self.blank_slices_unannotated,
        }
        several = not isinstance(self.intensity, str)
        return {
            "intensity": list(self.intensity) if several else self.intensity,
            "pixel_spacing": self.pixel_spacing,
            **(sparse if self.sparse else {}),
        }

    def plane(self, affine: np.ndarray) -> Plane:
        """Across the coarsest axis, where there is one; else axial."""
        return slice_plane(affine)

    def reach(self, num_slices: int) -> int:
        """5 % of the slices, as in CHD."""
        return max(1, num_slices // 20)

    def prepare(self, volume: Volume) -> Prepared:
        """Resamples slices if asked to; clips CT to its 1st and 99th percentile, nothing else."""
        if self.pixel_spacing is not None:
            volume = resample(volume, self.pixel_spacing)
        each = (self.intensity,) if isinstance(self.intensity, str) else self.intensity
        return prepare_channels(volume, each)

    def map_labels(self, raw: np.ndarray) -> np.ndarray:
        """The files' numbers to classes, and the ignore label to `STORED`."""
        if self.ignore_label is None:
            return self._map_classes(raw)
        ignored = raw == self.ignore_label
        classes = self._map_classes(np.where(ignored, 0, raw))
        classes[ignored] = STORED
        return classes

    def _map_classes(self, raw: np.ndarray) -> np.ndarray:
        return super().map_labels(raw)

    def read(self, source: Source) -> Volume:
        """As `Reader.read`; also raises `DatasetError` if sparse labels annotate nothing."""
        volume = super().read(source)
        if not self.sparse or volume.label is None or source.label is None:
            return volume
        label = volume.label
        if self.blank_slices_unannotated:
            label = np.where((label == 0).all((0, 1)), np.uint8(STORED), label)
        if (label == STORED).all():
            remedy = "annotate a part of it, or move this file away"
            raise DatasetError([Fault(source.label, "annotates no voxel", remedy)])
        return dataclasses.replace(volume, label=label)


@dataclass(frozen=True)
class FolderReader(OwnReader):
    """A folder of scans, and of labels; `faults` are those of the labels, which `find` reports."""

    labels_dir: Path | None = None
    label_values: tuple[int, ...] = ()  # raw label of each class; empty if they are 0, 1, 2, ...
    faults: tuple[Fault, ...] = ()

    kind = "folder"

    @property
    def facts(self) -> dict[str, Any]:
        """What is done with the intensities, and each class's number in the label files."""
        return {**super().facts, "label_values": list(self.label_values)}

    def _map_classes(self, raw: np.ndarray) -> np.ndarray:
        if not self.label_values:
            return super()._map_classes(raw)
        values = np.array(self.label_values)
        places = np.minimum(np.searchsorted(values, raw), len(values) - 1)
        if (unknown := values[places] != raw).any():
            known = ", ".join(map(str, self.label_values))
            raise UserError(f"label {raw[unknown].flat[0]:g}; expected one of {known}")
        return places.astype(np.uint8)

    def raw_labels(self, classes: np.ndarray) -> np.ndarray:
        """Classes to the numbers that the label files have."""
        if not self.label_values:
            return classes
        return np.array(self.label_values, np.min_scalar_type(self.label_values[-1]))[classes]

    def find(self, raw_dir: Path) -> tuple[list[Source], list[Fault]]:
        """The scans of the folder, each with the labels of its name."""
        faults = list(self.faults)
        if any(fault.stops for fault in faults):
            return [], faults
        inside = self.labels_dir is not None and self.labels_dir.parent.resolve()
        used = [self.labels_dir.name] if self.labels_dir and inside == raw_dir.resolve() else []
        scans, broken, more = _files_by_stem(raw_dir, used=used)
        faults += more
        if not scans:
            faults.append(Fault(raw_dir, "holds no scan", f"expected {SCANS}"))
        labels, broken_labels, more = _files_by_stem(self.labels_dir)
        faults += more
        label_of, more = match_labels(scans, labels)
        faults += more
        broken |= broken_labels
        sources = []
        for stem, path in scans.items():
            if is_segmentation(path):
                remedy = "give the series itself in a folder, and this file among the labels"
                faults.append(Fault(path, "holds segmentations, not a scan", remedy))
                continue
            id = split_name(stem)
            case = None if id == stem else stem
            source = Source(id, path, label_of.get(stem), case=case)
            if not broken & {*source.files}:
                sources.append(source)
        return sorted(sources, key=lambda source: source.id), faults


def open_folder(
    raw_dir: Path,
    labels_dir: Path | None = None,
    *,
    classes: Sequence[str] = (),
    intensity: Intensity | None = None,
    radius: int = DEFAULT_RADIUS,
    ignore_label: int | None = None,
    blank_slices_unannotated: bool = False,
    pixel_spacing: float | None = None,
) -> FolderReader:
    """The reader of a folder of scans; what is wrong with the two folders is found by `find`.

    Args:
      raw_dir: the scans.
      labels_dir: their labels; each file is read to collect its class numbers.
      classes: names of the labels' numbers in ascending order, without the background; by default
        class_<number>.
      intensity: by default `ct` where the first scan's values fall below -200, else `zscore`.
      radius: px of the prepared grid within which keypoints of neighbouring slices correspond.
      ignore_label: the number in label files of voxels that nobody annotated, if any.
      blank_slices_unannotated: whether slices that show no class were left out, and are not of
        background.
      pixel_spacing: mm, to resample slices to; by default they keep their pixels.

    Raises:
      UserError: a radius or an ignore label below 1, or a spacing outside 0.1 to 10 mm.
    """
    check_grid(radius, pixel_spacing)
    if ignore_label is not None and ignore_label < 1:
        raise UserError(f"ignore_label is {ignore_label}; expected 1 or more, as 0 is background")
    faults = _folder_faults(raw_dir, labels_dir)
    names: tuple[str, ...] = ("background",)
    values: tuple[int, ...] = ()
    if not faults and labels_dir is not None:
        sparse = ignore_label is not None or blank_slices_unannotated
        most = MAX_CLASSES - sparse  # `STORED` is no class
        names, values, faults = _classes(labels_dir, classes, ignore_label, most)
    if intensity is None:
        intensity = "zscore" if faults else _likely_intensity(raw_dir)
    return FolderReader(
        names,
        radius,
        intensity,
        ignore_label,
        blank_slices_unannotated,
        pixel_spacing,
        labels_dir=labels_dir,
        label_values=values,
        faults=tuple(faults),
    )


def check_grid(radius: int, pixel_spacing: float | None) -> None:
    """Raises `UserError` for a radius below 1, px, or a pixel edge outside 0.1 to 10 mm."""
    if radius < 1:
        raise UserError(f"radius is {radius}; expected 1 px or more")
    if pixel_spacing is not None:
        check_spacing(pixel_spacing)


def match_labels(
    scans: Mapping[str, Path], labels: Mapping[str, Path]
) -> tuple[dict[str, Path], list[Fault]]:
    """The label file of each scan, by the scan's name, and the label files without a scan."""
    found: dict[str, Path] = {}
    faults = []
    for stem, path in labels.items():
        scan = next((name for name in (stem, stem + FIRST_CHANNEL) if name in scans), None)
        if scan is None:
            remedy = "add it, rename this file as its scan, or move it away"
            faults.append(Fault(path, "has no scan of its name", remedy))
        elif scan in found:
            remedy = "move one of them away"
            faults.append(Fault(path, f"is a second label file of {scans[scan].name}", remedy))
        else:
            found[scan] = path
            if f"{stem}_0001" in scans and scan != stem:
                what = f"is taken for a scan by itself; channel 0 of {stem} has the labels"
                remedy = "several channels are for nnU-Net's layout"
                faults.append(finding(scans[f"{stem}_0001"], what, remedy))
    return found, faults


def split_name(case: str) -> str:
    """A split's name for a case: letters, digits and underscores, another one for each case.

    Every other character, and an underscore before an x, becomes `_x<code point, hexadecimal>_`;
    most names stay as they are. Names that tfds reserves or refuses have their first so written.
    Of what is longer than 120, the end becomes a digest: the name is a part of file names.
    """
    special = case == "all" or not re.search("[A-Za-z0-9]", case)
    first = _escape(case[0]) if special else ""
    name = first + re.sub(
        "[^A-Za-z0-9_]|_(?=x)", lambda match: _escape(match[0]), case[1:] if special else case
    )
    if len(name) <= _LONGEST_NAME:
        return name
    digest = hashlib.sha256(os.fsencode(case)).hexdigest()[:16]
    return f"{name[: _LONGEST_NAME - len(digest) - 1]}_{digest}"


def _escape(character: str) -> str:
    return f"_x{ord(character):x}_"


def _files_by_stem(
    folder: Path | None, *, used: Sequence[str] = ()
) -> tuple[dict[str, Path], frozenset[Path], list[Fault]]:
    """The scans of a folder by name without ending, those that cannot be read, and faults."""
    if folder is None:
        return {}, frozenset(), []
    entries = list_entries(folder, used=used, dicom=True)
    faults = [*entries.faults]
    faults += [unused_folder(path, SCANS) for path in entries.folders]
    files: dict[str, Path] = {}
    for path in entries.scans:
        stem = entries.stem(path)
        if stem in files:
            found = f"has the name of {files[stem].name}"
            faults.append(Fault(path, found, "rename one of them, or move it away"))
        else:
            files[stem] = path
    return files, entries.broken, faults


def _folder_faults(raw_dir: Path, labels_dir: Path | None) -> list[Fault]:
    faults = []
    if not raw_dir.is_dir():
        faults.append(Fault(raw_dir, "is not a folder", "give the folder of the scans"))
    if labels_dir is not None and not labels_dir.is_dir():
        faults.append(Fault(labels_dir, "is not a folder", "give the folder of the labels"))
    if not faults and labels_dir is not None and raw_dir.samefile(labels_dir):
        remedy = "expected the labels in a folder of their own"
        faults.append(Fault(labels_dir, "is the folder of the scans too", remedy))
    return faults


def _classes(
    labels_dir: Path, given: Sequence[str], ignore_label: int | None, most: int
) -> tuple[tuple[str, ...], tuple[int, ...], list[Fault]]:
    """Names of the classes, their raw labels unless these are 0, 1, 2, ..., and faults."""
    found = {0}
    for path in list_entries(labels_dir, dicom=True).scans:
        found |= _values_of(path) - {ignore_label}
    numbers = sorted(found)
    faults = []
    if len(numbers) > most:
        remedy = f"expected labels of at most {most} classes; are these scans?"
        faults.append(Fault(labels_dir, f"holds {len(numbers)} different values", remedy))
    if len(numbers) == 1:
        remedy = "expected whole numbers above 0 where a structure is"
        faults.append(Fault(labels_dir, "holds no label but the background", remedy))
    names = ["background", *given] if given else [f"class_{value}" for value in numbers]
    names[0] = "background"
    if given and numbers[-1] <= len(given):
        numbers = list(range(len(given) + 1))
    if len(numbers) != len(names) and not faults:
        values = ", ".join(map(str, numbers[1:]))
        remedy = f"expected a name for each of its labels {values}"
        faults.append(Fault(labels_dir, f"--classes has {len(given)} names", remedy))
    contiguous = numbers == list(range(len(numbers)))
    return tuple(names), () if contiguous else tuple(numbers), faults


def _values_of(path: Path) -> set[int]:
    """The numbers in a label file; none of one whose faults `Reader.read` reports."""
    try:
        values = np.unique(read_scan(path).array)
    except DatasetError:
        return set()
    return set() if label_problem(values) else set(map(int, values))


def _likely_intensity(raw_dir: Path) -> Intensity:
    for path in list_entries(raw_dir, dicom=True).scans:
        try:
            return "ct" if read_scan(path).array.min() < LOWEST_OF_CT else "zscore"
        except DatasetError:
            continue
    return "zscore"
