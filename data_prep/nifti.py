"""Reading NIfTI files with every byte checked, and turning volumes to (row, col, slice).

Volumes are worked on as [row, col, slice]: rows run to the patient's back, columns to the left and
slices to the head, so that a slice looks as on a radiologist's screen whatever order the file has.
NIfTI's axes are (x, y, z), in a typical axial scan columns, rows and slices. Axes are only permuted
and flipped, by the nearest match to the affine, never resampled: `from_slices` is the exact way
back. Affines map voxel indices to NIfTI's millimetres (x to the right, y to the front, z up).
"""

import gzip
import hashlib
import io
import zlib
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel import orientations

from data_prep.faults import DatasetError, Fault

_SLICES = orientations.axcodes2ornt(("P", "L", "S"))
_FETCH_AGAIN = "copy or download it again"


@dataclass(frozen=True, eq=False)
class Nifti:
    """A 3-d file: values in the file's axis order, affine [4, 4], SHA-256 of the file's bytes."""

    array: np.ndarray  # integers as stored, or float32
    affine: np.ndarray
    sha256: str


def read_nifti(path: Path) -> Nifti:
    """Reads a `.nii` or `.nii.gz` of three dimensions.

    A compressed file is read to its end first, so that its checksum is verified: nibabel by itself
    accepts most damaged files. Integers stay integers; a scaled file whose values are all whole
    becomes int16 or int32, any other float32. Raises `DatasetError` with one fault.
    """
    stored = _read_bytes(path)
    content = _decompress(path, stored) if path.suffix == ".gz" else stored
    image = _parse(path, content)
    if len(image.shape) != 3 or 0 in image.shape:
        raise _error(
            path,
            f"{len(image.shape)}-d, shape {image.shape}",
            "expected one 3-d volume; save each frame or channel as a file of its own",
        )
    affine = np.asarray(image.affine, np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise _error(path, "its affine is singular or not finite", "correct the header")
    return Nifti(_values(path, image), affine, hashlib.sha256(stored).hexdigest())


def to_slices(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A view [row, col, slice] of a volume in its file's axis order, and the view's affine."""
    turn = orientations.ornt_transform(orientations.io_orientation(affine), _SLICES)
    turned_affine = affine @ orientations.inv_ornt_aff(turn, array.shape)
    return orientations.apply_orientation(array, turn), turned_affine


def from_slices(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """The way back: [row, col, slice] to the axis order of the file whose affine is given."""
    turn = orientations.ornt_transform(_SLICES, orientations.io_orientation(affine))
    return orientations.apply_orientation(array, turn)


def _error(path: Path, found: str, remedy: str) -> DatasetError:
    return DatasetError([Fault(path, found, remedy)])


def _read_bytes(path: Path) -> bytes:
    try:
        stored = path.read_bytes()
    except OSError as error:
        raise _error(path, f"cannot be read ({error.strerror})", "check the file") from error
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
    """Opens the file's bytes as NIfTI-1 or NIfTI-2; the values are not read yet."""
    for kind in (nib.Nifti1Image, nib.Nifti2Image):
        try:
            return kind.from_stream(io.BytesIO(content))
        except Exception as error:  # nibabel's parsers raise whatever a bad header makes them
            reason = error
    raise _error(path, f"is not a NIfTI file ({reason})", "save it as NIfTI") from reason


def _values(path: Path, image: nib.Nifti1Image) -> np.ndarray:
    if image.get_data_dtype().kind not in "iuf":
        raise _error(path, f"holds {image.get_data_dtype()}", "save it as integers or floats")
    try:
        array = np.asanyarray(image.dataobj)
    except Exception as error:  # too few bytes, or a header that promises nonsense
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
