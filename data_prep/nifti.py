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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from nibabel import orientations

from data_prep.faults import DatasetError, Fault
from data_prep.nifti_header import header_kind, header_problem, without_remarks

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
_FETCH_AGAIN = "copy or download it again"
_GZIP = b"\x1f\x8b"
_MAX_HEADER = 1 << 22  # with extensions


@dataclass(frozen=True, eq=False)
class Nifti:
    """A volume: values in the file's axis order, affine [4, 4], SHA-256 of the file's bytes."""

    array: np.ndarray  # integers as stored, or float32
    affine: np.ndarray
    sha256: str


def read_nifti(path: Path, *, frame: int | None = None) -> Nifti:
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
        raise _unreadable(path, error) from error
    whole = _read_frames(path, state.st_mtime_ns, state.st_size)
    return Nifti(whole.array[..., frame], whole.affine, whole.sha256)


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
        raise _unreadable(path, error) from error
    except (EOFError, zlib.error) as error:
        raise _error(path, f"its gzip stream is damaged ({error})", _FETCH_AGAIN) from error
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


# A cine's frames are separate volumes, usually read one after the other.
@functools.lru_cache(maxsize=1)
def _read_frames(path: Path, modified: int, size: int) -> Nifti:
    return _read(path, 4)


def _read(path: Path, num_dimensions: int) -> Nifti:
    stored = _read_bytes(path)
    plain = not stored.startswith(_GZIP) and (path.suffix != ".gz" or header_kind(stored))
    content = stored if plain else _decompress(path, stored)
    image = _parse(path, content)
    if len(image.shape) != num_dimensions or 0 in image.shape:
        expected = (
            "expected one 3-d volume; save each frame or channel as its own file"
            if num_dimensions == 3
            else "expected a 4-d file of frames"
        )
        raise _error(path, f"{len(image.shape)}-d, shape {image.shape}", expected)
    affine = np.asarray(image.affine, np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise _error(path, "its affine is singular or not finite", "correct the header")
    return Nifti(_values(path, image), affine, hashlib.sha256(stored).hexdigest())


def _unreadable(path: Path, error: OSError) -> DatasetError:
    return _error(path, f"cannot be read ({error.strerror})", "check the file")


def _error(path: Path, found: str, remedy: str) -> DatasetError:
    return DatasetError([Fault(path, found, remedy)])


def _read_bytes(path: Path) -> bytes:
    try:
        stored = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    if not stored:
        raise _error(path, "is empty", _FETCH_AGAIN)
    return stored


def _decompress(path: Path, stored: bytes) -> bytes:
    try:
        return gzip.decompress(stored)
    except EOFError as error:
        raise _error(path, "its gzip stream is truncated", _FETCH_AGAIN) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise _error(path, f"its gzip stream is damaged ({error})", _FETCH_AGAIN) from error


def _parse(path: Path, content: bytes) -> nib.Nifti1Image:
    """Opens the file's bytes as NIfTI-1 or NIfTI-2, without reading the values yet."""
    kind = header_kind(content)
    if kind is None:
        found = "is not a NIfTI file (its first number is neither 348 nor 540)"
        raise _error(path, found, "save it as NIfTI")
    try:
        with without_remarks():
            if problem := header_problem(kind, content):
                raise _error(path, *problem)
            return kind.from_stream(io.BytesIO(content))
    except DatasetError:
        raise
    except Exception as error:  # nibabel's parsers raise any exception for a bad header
        raise _error(path, f"is not a NIfTI file ({error})", "save it as NIfTI") from error


def _values(path: Path, image: nib.Nifti1Image) -> np.ndarray:
    if image.get_data_dtype().kind not in "iuf":
        raise _error(path, f"holds {image.get_data_dtype()}", "save it as integers or floats")
    try:
        with without_remarks():
            array = np.asanyarray(image.dataobj)
    except Exception as error:  # too few bytes, or an inconsistent header
        raise _error(path, f"its values cannot be read ({error})", _FETCH_AGAIN) from error
    long = array.dtype.kind in "iu" and array.dtype.itemsize == 8
    scaled = array.dtype.kind == "f" and image.get_data_dtype().kind in "iu"
    if long or scaled:
        array = _whole_numbers(array)
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def _whole_numbers(array: np.ndarray) -> np.ndarray:
    """The array as int16 or int32 if that changes no value, else as float64."""
    if not np.isfinite(array).all():
        return array
    low, high = array.min(), array.max()
    for dtype in (np.int16, np.int32):
        limits = np.iinfo(dtype)
        if low >= limits.min and high <= limits.max:
            whole = array.astype(dtype)
            return whole if (whole == array).all() else array.astype(np.float64)
    return array.astype(np.float64)
