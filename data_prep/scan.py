"""A scan in memory, whatever its format: values, affine and a digest of its files.

`data_prep.formats` opens files and folders; `nifti`, `nrrd`, `metaimage` and `dicom` each read one
format. All of them give values in the order of the stored axes, the fastest first, and an affine
that maps voxel indices to NIfTI's millimetres (x to the right, y to the front, z up). DICOM and
ITK count x to the left and y to the back; `from_lps` turns theirs into ours.
"""

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.faults import DatasetError, Fault

FETCH_AGAIN = "copy or download it again"
CORRECT = "correct the header"
_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_SMALLEST_VOXEL = 1e-9  # mm^3, of an affine that can be inverted


class Grid(NamedTuple):
    """A scan's grid, from its header alone."""

    shape: tuple[int, ...]
    affine: np.ndarray
    dtype: np.dtype


@dataclass(frozen=True, eq=False)
class Scan:
    """A volume: values in the file's axis order, affine [4, 4], SHA-256 of the file's bytes."""

    array: np.ndarray  # integers as stored, or float32
    affine: np.ndarray
    sha256: str

    @property
    def grid(self) -> Grid:
        """Shape, affine and type."""
        return Grid(self.array.shape, self.affine, self.array.dtype)


def scan_error(path: Path, found: str, remedy: str) -> DatasetError:
    """A `DatasetError` of one fault."""
    return DatasetError([Fault(path, found, remedy)])


def unreadable(path: Path, error: OSError) -> DatasetError:
    """The fault of a file that the system does not give."""
    return scan_error(path, f"cannot be read ({error.strerror})", "check the file")


def read_bytes(path: Path) -> bytes:
    """The content of a file. Raises `DatasetError` if it has none."""
    try:
        stored = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    if not stored:
        raise scan_error(path, "is empty", FETCH_AGAIN)
    return stored


def decompress(path: Path, stored: bytes) -> bytes:
    """The content of a gzip stream, whose checksum is verified. Raises `DatasetError`."""
    try:
        return gzip.decompress(stored)
    except EOFError as error:
        raise scan_error(path, "its gzip stream is truncated", FETCH_AGAIN) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise scan_error(path, f"its gzip stream is damaged ({error})", FETCH_AGAIN) from error


def check_affine(path: Path, affine: np.ndarray) -> np.ndarray:
    """The affine as float64. Raises `DatasetError` if it is singular or not finite."""
    affine = np.asarray(affine, np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < _SMALLEST_VOXEL:
        raise scan_error(path, "its affine is singular or not finite", CORRECT)
    return affine


def from_lps(affine: np.ndarray) -> np.ndarray:
    """An affine to DICOM's and ITK's millimetres as one to NIfTI's, or the other way round."""
    return _LPS @ affine


def as_narrow(array: np.ndarray, *, scaled: bool = False) -> np.ndarray:
    """The values as a `Scan` holds them.

    Integers of up to 32 bits stay as they are, floats become float32. Integers of 64 bits, and
    `scaled` values that are all whole, become int16 or int32 if that changes none.
    """
    long = array.dtype.kind in "iu" and array.dtype.itemsize == 8
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


def as_array(path: Path, content: bytes, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Raw values, the first axis fastest, in the machine's byte order.

    Raises `DatasetError` for too few bytes, or too many.
    """
    expected = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if len(content) != expected:
        found = f"holds {len(content)} bytes of values; its header says {expected}"
        raise scan_error(path, found, FETCH_AGAIN)
    array = np.frombuffer(content, dtype).reshape(shape, order="F")
    return as_narrow(array.astype(dtype.newbyteorder("="), copy=False))


def numbers(path: Path, field: str, text: str, count: int) -> np.ndarray:
    """The numbers of a header's field, separated by blanks. Raises `DatasetError`."""
    try:
        found = np.array([float(word) for word in text.split()])
    except ValueError:
        found = np.empty(0)
    if len(found) != count or not np.isfinite(found).all():
        what = f"{count} numbers" if count > 1 else "a number"
        raise scan_error(path, f"its {field} is {text!r}", f"{CORRECT}: expected {what}")
    return found


def data_file(path: Path, field: str, name: str) -> Path:
    """The file next to a header that holds its values. Raises `DatasetError` if it is not there."""
    if not name or Path(name).name != name or "%" in name or name.split()[0] in ("LIST", "SKIP"):
        remedy = "expected one file in the same folder; save it as a single file"
        raise scan_error(path, f"its {field} is {name!r}", remedy)
    if not path.with_name(name).is_file():
        raise scan_error(path, f"its file of values, {name}, is not there", "copy both files")
    return path.with_name(name)
