"""Opens a scan of any format: NIfTI, NRRD, MetaImage, a DICOM series or DICOM segmentations.

The name's ending decides the format of a file; a folder, or a DICOM image in one, is a DICOM
series. A DICOM file of segmentations is read as labels, on the part of its scan's grid that it has.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from data_prep.dicom import (
    find_series,
    is_dicom,
    read_series,
    series_digest,
    series_grid,
    series_of,
)
from data_prep.faults import Fault
from data_prep.metaimage import metaimage_files, metaimage_grid, read_metaimage
from data_prep.nifti import open_header, read_nifti, turned_like
from data_prep.nrrd import nrrd_files, nrrd_grid, read_nrrd
from data_prep.scan import Grid, Scan
from data_prep.segmentations import is_segmentation, read_segmentation


class _Format(NamedTuple):
    read: Callable[[Path], Scan]
    grid: Callable[[Path], Grid]
    files: Callable[[Path], tuple[Path, ...]]


def _nifti_grid(path: Path) -> Grid:
    image = open_header(path)
    return Grid(image.shape, image.affine, image.get_data_dtype().newbyteorder("="))


def _segmentation_grid(path: Path) -> Grid:
    scan = read_segmentation(path)
    return Grid(scan.array.shape, scan.affine, scan.array.dtype)


def _itself(path: Path) -> tuple[Path, ...]:
    return (path,)


_NIFTI = _Format(read_nifti, _nifti_grid, _itself)
_NRRD = _Format(read_nrrd, nrrd_grid, nrrd_files)
_METAIMAGE = _Format(read_metaimage, metaimage_grid, metaimage_files)
_SERIES = _Format(read_series, series_grid, lambda path: series_of(path).files)
_SEGMENTATION = _Format(read_segmentation, _segmentation_grid, _itself)
_BY_ENDING = {".nrrd": _NRRD, ".nhdr": _NRRD, ".mha": _METAIMAGE, ".mhd": _METAIMAGE}


def read_scan(path: Path, *, frame: int | None = None) -> Scan:
    """Reads a scan, or one frame (from 0) of a NIfTI file of four dimensions.

    Raises:
      DatasetError: all faults found; for a series they name its slices.
      UserError: a library of the extra `formats` is missing.
    """
    return read_nifti(path, frame=frame) if frame is not None else _format(path).read(path)


def read_labels(path: Path, image: Grid | Scan | None = None) -> Scan:
    """Reads labels, with their axes turned to those of their image; raises as `read_scan`.

    Tools store one grid with its axes in another order or direction: a converter from DICOM often
    flips the rows. DICOM segmentations, which may cover a part only, are laid on the whole grid.
    """
    if image is None:
        return read_scan(path)
    if is_segmentation(path):
        grid = image if isinstance(image, Grid) else image.grid
        return read_segmentation(path, grid)
    return turned_like(read_scan(path), image.affine)


def open_grid(path: Path) -> Grid:
    """A scan's grid, from its header or headers. Raises as `read_scan`."""
    return _format(path).grid(path)


def digest(path: Path) -> str:
    """The `sha256` of `read_scan`. Raises as it, and `OSError`."""
    format = _format(path)
    if format is _SERIES:
        return series_digest(path)
    found = hashlib.sha256()
    for file in format.files(path):
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                found.update(chunk)
    return found.hexdigest()


def source_files(path: Path) -> list[Path]:
    """The files that a scan or labels are read from; of a series, all of its folder."""
    if not is_series(path):
        return list(_format(path).files(path))
    folder = path if path.is_dir() else path.parent
    return sorted(file for file in folder.rglob("*") if file.is_file())


def is_series(path: Path) -> bool:
    """Whether a path opens a DICOM series: a folder, or one of its images."""
    return _format(path) is _SERIES


def notes(path: Path) -> list[Fault]:
    """Findings about the files next to a series' own, such as localizers."""
    return [f for f in find_series(path)[1] if not f.stops] if path.is_dir() else []


def _format(path: Path) -> _Format:
    if path.suffix.lower() in _BY_ENDING:
        return _BY_ENDING[path.suffix.lower()]
    if path.name.lower().endswith((".nii", ".nii.gz")):
        return _NIFTI
    if path.is_dir() or not is_segmentation(path):
        return _SERIES if path.is_dir() or is_dicom(path) else _NIFTI
    return _SEGMENTATION
