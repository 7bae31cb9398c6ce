"""Reads DICOM segmentations (SEG) as labels: the number of each voxel is its segment's.

Their frames may cover only a part of the scan. Overlapping segments are a fault: a voxel has one
class.
"""

import hashlib
from pathlib import Path

import numpy as np

from data_prep.dicom import SEGMENTATION, is_dicom, without_remarks
from data_prep.scan import FETCH_AGAIN, Scan, check_affine, from_lps, read_bytes, scan_error
from kafjax.errors import import_extra

_NEAR = 1e-2  # voxels by which two grids' headers may differ


def is_segmentation(path: Path) -> bool:
    """Whether a file is DICOM and holds segmentations. Needs pydicom if it is DICOM."""
    if not path.is_file() or not is_dicom(path):
        return False
    pydicom = import_extra("pydicom")
    try:
        with without_remarks():
            header = pydicom.dcmread(path, specific_tags=["SOPClassUID"], stop_before_pixels=True)
    except Exception:  # a damaged file; whoever reads it as a series names its fault
        return False
    return str(header.file_meta.get("MediaStorageSOPClassUID", "")) == SEGMENTATION


def read_segmentation(path: Path) -> Scan:
    """Reads labels as [column, row, slice]. Raises `DatasetError` with one fault."""
    import_extra("highdicom")
    from highdicom.seg import segread

    stored = read_bytes(path)
    try:
        with without_remarks():
            volume = segread(path).get_volume(combine_segments=True, allow_missing_positions=True)
    except Exception as error:  # highdicom raises many kinds for a damaged or odd file
        overlap = "overlap" in str(error).lower()
        what = "its segments overlap" if overlap else "its segmentations cannot be read"
        remedy = "give each voxel one class" if overlap else FETCH_AGAIN
        raise scan_error(path, f"{what} ({type(error).__name__})", remedy) from error
    array = np.ascontiguousarray(np.transpose(volume.array, (2, 1, 0)))
    affine = from_lps(np.asarray(volume.affine, np.float64)[:, [2, 1, 0, 3]])
    return Scan(array, check_affine(path, affine), hashlib.sha256(stored).hexdigest())


def fill_grid(labels: Scan, affine: np.ndarray, shape: tuple[int, ...]) -> Scan:
    """Labels on a part of a grid, laid on all of it; unchanged if they do not fit into it.

    Args:
      labels: with their axes in the grid's order.
      affine: of the grid.
      shape: of the grid.
    """
    steps = np.linalg.inv(affine) @ labels.affine
    first = np.rint(steps[:3, 3]).astype(int)
    last = first + labels.array.shape
    fits = np.allclose(steps[:3, :3], np.eye(3), atol=_NEAR) and np.allclose(
        steps[:3, 3], first, atol=_NEAR
    )
    if not fits or (first < 0).any() or (last > shape).any():
        return labels
    whole = np.zeros(shape, labels.array.dtype)
    whole[tuple(map(slice, first, last))] = labels.array
    return Scan(whole, affine, labels.sha256)
