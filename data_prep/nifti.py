"""Verified reading of NIfTI files, and reorienting volumes to (row, col, slice).

Volumes are [row, col, slice]. In axial slices rows run to the patient's back, columns to the left
and slices to the head, so that a slice looks as on a radiologist's screen whatever the file's axis
order; coronal and sagittal slices are upright too. NIfTI's axes are (x, y, z), in a typical axial
scan columns, rows and slices. Axes are only permuted and flipped, by the nearest match to the
affine, never resampled: `from_slices` is the exact way back. Affines map voxel indices to NIfTI's
millimetres (x to the right, y to the front, z up).
"""

import functools
import gzip
import hashlib
import io
import zlib
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from nibabel import orientations

from data_prep.faults import DatasetError
from data_prep.nifti_header import header_kind, header_problem, without_remarks
from data_prep.scan import (
    FETCH_AGAIN,
    Scan,
    as_narrow,
    check_affine,
    decompress,
    read_bytes,
    scan_error,
    unreadable,
)

Plane = Literal["axial", "coronal", "sagittal"]

# Directions of rows, columns and slices: posterior, left, superior, inferior, anterior.
_DIRECTIONS: dict[Plane, np.ndarray] = {
    "axial": orientations.axcodes2ornt(("P", "L", "S")),
    "coronal": orientations.axcodes2ornt(("I", "L", "A")),
    "sagittal": orientations.axcodes2ornt(("I", "P", "L")),
}
_PLANE_ACROSS: tuple[Plane, ...] = ("sagittal", "coronal", "axial")  # by NIfTI's x, y, z
# An axis this many times coarser than the next is the one across the slices.
_COARSER = 2.0
_GZIP = b"\x1f\x8b"
_MAX_HEADER = 1 << 22  # with extensions


def read_nifti(path: Path, *, frame: int | None = None) -> Scan:
    """Reads a `.nii` or `.nii.gz` of three dimensions, or one frame (from 0) of a 4-d one.

    A compressed file is read to its end first, so that its checksum is verified: nibabel alone
    accepts most damaged files. The content, not the name, decides whether it is compressed. Headers
    that nibabel would repair or warn about are either faults or sound (`nifti_header`). Integers
    stay integers; a scaled file whose values are all whole becomes int16 or int32, any other
    float32. Raises `DatasetError` with one fault.
    """
    if frame is None:
        return _read(path, 3)
    try:
        state = path.stat()
    except OSError as error:
        raise unreadable(path, error) from error
    whole = _read_frames(path, state.st_mtime_ns, state.st_size)
    return Scan(whole.array[..., frame], whole.affine, whole.sha256)


def count_frames(path: Path) -> int:
    """The number of frames in a 4-d file's header. Raises `DatasetError` with one fault."""
    try:
        shape: tuple[int, ...] = open_header(path).shape
    except DatasetError:
        shape = ()
    if len(shape) != 4 or 0 in shape:
        return _read(path, 4).array.shape[3]  # which reports the fault
    return shape[3]


def open_header(path: Path) -> nib.Nifti1Image:
    """An image with a file's header, affine and shape, but without its values.

    Raises `DatasetError` with one fault.
    """
    try:
        with path.open("rb") as stored:
            compressed = stored.read(len(_GZIP)) == _GZIP
        stream: Any
        with gzip.open(path) if compressed else path.open("rb") as stream:
            content = stream.read(_MAX_HEADER)
    except OSError as error:
        raise unreadable(path, error) from error
    except (EOFError, zlib.error) as error:
        raise scan_error(path, f"its gzip stream is damaged ({error})", FETCH_AGAIN) from error
    return _parse(path, content)


def slice_plane(affine: np.ndarray) -> Plane:
    """The plane in which a volume was scanned: across the axis that is far coarser than the others.

    Axial where no axis is twice as coarse as the next, as in most CT.
    """
    sizes = nib.affines.voxel_sizes(affine)
    coarsest = int(np.argmax(sizes))
    if sizes[coarsest] < _COARSER * np.delete(sizes, coarsest).max():
        return "axial"
    return _PLANE_ACROSS[int(orientations.io_orientation(affine)[coarsest, 0])]


def to_slices(
    array: np.ndarray, affine: np.ndarray, plane: Plane = "axial"
) -> tuple[np.ndarray, np.ndarray]:
    """A [row, col, slice] view of a volume in its file's axis order, and the view's affine."""
    turn = orientations.ornt_transform(orientations.io_orientation(affine), _DIRECTIONS[plane])
    turned_affine = affine @ orientations.inv_ornt_aff(turn, array.shape)
    return orientations.apply_orientation(array, turn), turned_affine


def from_slices(array: np.ndarray, affine: np.ndarray, plane: Plane = "axial") -> np.ndarray:
    """The inverse of `to_slices`: [row, col, slice] to the axis order of the affine's file."""
    turn = orientations.ornt_transform(_DIRECTIONS[plane], orientations.io_orientation(affine))
    return orientations.apply_orientation(array, turn)


def turned_like(scan: Scan, affine: np.ndarray) -> Scan:
    """The scan with its axes permuted and flipped to those of another affine; no copy."""
    turn = orientations.ornt_transform(
        orientations.io_orientation(scan.affine), orientations.io_orientation(affine)
    )
    array = orientations.apply_orientation(scan.array, turn)
    turned = scan.affine @ orientations.inv_ornt_aff(turn, scan.array.shape)
    return Scan(array, turned, scan.sha256)


# A cine's frames are separate volumes, usually read one after the other.
@functools.lru_cache(maxsize=1)
def _read_frames(path: Path, modified: int, size: int) -> Scan:
    return _read(path, 4)


def _read(path: Path, num_dimensions: int) -> Scan:
    stored = read_bytes(path)
    plain = not stored.startswith(_GZIP) and (path.suffix != ".gz" or header_kind(stored))
    content = stored if plain else decompress(path, stored)
    image = _parse(path, content)
    if len(image.shape) != num_dimensions or 0 in image.shape:
        expected = (
            "expected one 3-d volume; save each frame or channel as its own file"
            if num_dimensions == 3
            else "expected a 4-d file of frames"
        )
        raise scan_error(path, f"{len(image.shape)}-d, shape {image.shape}", expected)
    affine = check_affine(path, image.affine)
    return Scan(_values(path, image), affine, hashlib.sha256(stored).hexdigest())


def _parse(path: Path, content: bytes) -> nib.Nifti1Image:
    """Opens the file's bytes as NIfTI-1 or NIfTI-2, without reading the values yet."""
    kind = header_kind(content)
    if kind is None:
        found = "is not a NIfTI file (its first number is neither 348 nor 540)"
        raise scan_error(path, found, "save it as NIfTI")
    try:
        with without_remarks():
            if problem := header_problem(kind, content):
                raise scan_error(path, *problem)
            return kind.from_stream(io.BytesIO(content))
    except DatasetError:
        raise
    except Exception as error:  # nibabel's parsers raise any exception for a bad header
        raise scan_error(path, f"is not a NIfTI file ({error})", "save it as NIfTI") from error


def _values(path: Path, image: nib.Nifti1Image) -> np.ndarray:
    if image.get_data_dtype().kind not in "iuf":
        raise scan_error(path, f"holds {image.get_data_dtype()}", "save it as integers or floats")
    try:
        with without_remarks():
            array = np.asanyarray(image.dataobj)
    except Exception as error:  # too few bytes, or an inconsistent header
        raise scan_error(path, f"its values cannot be read ({error})", FETCH_AGAIN) from error
    return as_narrow(array, scaled=array.dtype.kind == "f" and image.get_data_dtype().kind in "iu")
