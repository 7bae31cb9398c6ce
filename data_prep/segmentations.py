"""Reads DICOM segmentations (SEG) as labels: the number of each voxel is its segment's.

Frames lie where their positions say, and may cover only a part of the scan. Overlapping segments
are a fault: a voxel has one class. Source: DICOM PS3.3, the segmentation's modules.
"""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.dicom import SEGMENTATION, is_dicom, without_remarks
from data_prep.faults import DatasetError
from data_prep.scan import FETCH_AGAIN, Grid, Scan, check_affine, from_lps, read_bytes, scan_error
from kafjax.errors import import_extra

_GEOMETRY = ("PixelMeasuresSequence", "PlaneOrientationSequence", "PlanePositionSequence")
_NEAR = 0.05  # voxels that a frame may lie from the grid's
_SAME_PLACE = 1e-3  # mm


class _Frame(NamedTuple):
    labels: np.ndarray  # [column, row]
    affine: np.ndarray  # (column, row, any, 1) to NIfTI's mm
    thickness: float  # mm


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


def read_segmentation(path: Path, grid: Grid | None = None) -> Scan:
    """Reads labels on a grid, or as [column, row, slice] on the smallest that has all frames.

    Raises `DatasetError` with one fault: of the file, or frames that do not lie on the grid.
    """
    stored = read_bytes(path)
    pydicom = import_extra("pydicom")
    try:
        with without_remarks():
            frames = _frames(path, pydicom.dcmread(io.BytesIO(stored)))
    except DatasetError:
        raise
    except Exception as error:  # pydicom's parsers raise any exception for a damaged file
        found = f"its segmentations cannot be read ({type(error).__name__})"
        raise scan_error(path, found, FETCH_AGAIN) from error
    if not frames:
        raise scan_error(path, "holds no segmentations", FETCH_AGAIN)
    shape, affine = _own_grid(path, frames) if grid is None else (grid.shape, grid.affine)
    array = np.zeros(shape, np.result_type(*(frame.labels.dtype for frame in frames)))
    for frame in frames:
        _place(path, frame, array, affine)
    return Scan(array, check_affine(path, affine), hashlib.sha256(stored).hexdigest())


def _frames(path: Path, dataset: Any) -> list[_Frame]:
    kind = dataset.get("SegmentationType")
    if kind not in ("BINARY", "LABELMAP"):
        raise scan_error(path, f"its segmentations are {kind}", "expected BINARY or LABELMAP")
    shared = dataset.SharedFunctionalGroupsSequence[0]
    pixels = dataset.pixel_array.reshape(-1, dataset.Rows, dataset.Columns)
    frames = []
    for values, own in zip(pixels, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        measures, turn, position = ((own if name in own else shared)[name][0] for name in _GEOMETRY)
        down, across = map(float, measures.PixelSpacing)
        directions = np.array(turn.ImageOrientationPatient, float).reshape(2, 3)
        affine = np.eye(4)
        affine[:3, 0], affine[:3, 1] = directions[0] * across, directions[1] * down
        affine[:3, 2] = np.cross(*directions)
        affine[:3, 3] = np.array(position.ImagePositionPatient, float)
        labels = values
        if kind == "BINARY":
            identity = own if "SegmentIdentificationSequence" in own else shared
            number = int(identity.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
            labels = values.astype(np.min_scalar_type(number)) * number
        thickness = float(measures.get("SpacingBetweenSlices") or measures.SliceThickness)
        frames.append(_Frame(labels.T, from_lps(affine), thickness))
    return frames


def _own_grid(path: Path, frames: Sequence[_Frame]) -> tuple[tuple[int, ...], np.ndarray]:
    """The shape and affine of the smallest grid of frames that have the same directions."""
    affine = frames[0].affine.copy()
    places = np.array([frame.affine[:3, 3] for frame in frames])
    order = np.argsort(places @ affine[:3, 2], kind="stable")
    first, last = places[order[0]], places[order[-1]]
    apart = np.diff((places @ affine[:3, 2])[order])
    apart = apart[apart > _SAME_PLACE]
    count = 1
    affine[:3, 2] *= frames[0].thickness
    if len(apart):
        count = 1 + round(float(apart.sum() / apart.min()))
        affine[:3, 2] = (last - first) / (count - 1)
    affine[:3, 3] = first
    return (*frames[0].labels.shape, count), check_affine(path, affine)


def _place(path: Path, frame: _Frame, array: np.ndarray, affine: np.ndarray) -> None:
    """Lays a frame into an array on a grid. Raises `DatasetError` where it does not fit."""
    into = np.linalg.inv(affine) @ frame.affine
    steps, first = into[:3, :2], into[:3, 3]
    whole, start = np.rint(steps), np.rint(first)
    columns, rows = np.indices(frame.labels.shape)
    where = (start[:, None, None] + np.tensordot(whole, (columns, rows), 1)).astype(int)
    ends = steps @ (np.array(frame.labels.shape) - 1) + first
    exact = np.abs(first - start).max() < _NEAR and np.abs(ends - where[:, -1, -1]).max() < _NEAR
    inside = (where >= 0).all() and (where.max((1, 2)) < array.shape).all()
    if not exact or not inside or np.abs(whole).sum() != 2:
        remedy = "expected segmentations of this image, not of one on another grid"
        raise scan_error(path, "does not lie on the grid of its image", remedy)
    there = array[tuple(where)]
    if (there[frame.labels > 0] > 0).any():
        raise scan_error(path, "its segments overlap", "give each voxel one class")
    array[tuple(where)] = np.where(frame.labels > 0, frame.labels, there)
