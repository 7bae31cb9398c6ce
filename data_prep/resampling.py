"""In-plane resampling of volumes; the spacing between slices does not change.

Volumes are [row, col, slice]. Pixels are areas: the outer edges of a slice stay in place, so pixel
i of n new ones has its centre at (i + 1/2) h / n - 1/2 in pixels of h old ones (as
`scipy.ndimage.zoom` with `grid_mode`, and torch's `align_corners=False`). The new pixel edge is
exactly h / n old ones, so it only approximates the requested size. Beyond the centres of the
outermost pixels the image continues with their values.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import ndimage

from data_prep.faults import DatasetError, Fault
from data_prep.volumes import MAX_EDGE, Volume
from kafjax.errors import UserError

Size = tuple[int, int]
_SPACINGS = (0.1, 10.0)  # mm


def is_spacing(pixel: float) -> bool:
    """Whether slices may be resampled to pixels of this edge, mm."""
    low, high = _SPACINGS
    return low <= pixel <= high


def check_spacing(pixel: float) -> None:
    """Raises `UserError` for a pixel edge, mm, that no grid should have."""
    low, high = _SPACINGS
    if not is_spacing(pixel):
        raise UserError(f"pixel_spacing is {pixel:g}; expected {low:g} to {high:g} mm")


def resample(volume: Volume, pixel: float) -> Volume:
    """The volume on a grid of `pixel` mm in plane, float32.

    Raises `DatasetError` for a spacing that leaves no slice, or slices larger than `MAX_EDGE`.
    """
    rows, columns, _ = volume.image.shape
    size = size_at((rows, columns), volume.spacing[:2], pixel)
    if not 1 <= min(size) <= max(size) <= MAX_EDGE:
        found = f"pixels of {volume.spacing[0]:g} x {volume.spacing[1]:g} mm"
        fault = Fault(Path(next(iter(volume.sha256))), found, "correct the header's spacing")
        raise DatasetError([fault])
    return dataclasses.replace(
        volume,
        image=resample_image(volume.image, size),
        further=tuple(resample_image(image, size) for image in volume.further),
        label=None if volume.label is None else resample_label(volume.label, size),
        spacing=(
            volume.spacing[0] * rows / size[0],
            volume.spacing[1] * columns / size[1],
            volume.spacing[2],
        ),
        affine=resampled_affine(volume.affine, (rows, columns), size),
    )


def size_at(size: Size, spacing: tuple[float, float], pixel: float) -> Size:
    """The number of (rows, columns) of edge `pixel`, mm, that best matches a slice's extent."""
    rows, columns = (round(n * mm / pixel) for n, mm in zip(size, spacing, strict=True))
    return rows, columns


def resample_image(volume: np.ndarray, size: Size) -> np.ndarray:
    """Cubic spline interpolation of [h, w, slices] to `size` (rows, columns), float32."""
    if volume.shape[:2] == size:
        return volume.astype(np.float32)
    return _by_slice(volume, lambda image: _zoom(image, size, order=3))


def resample_label(volume: np.ndarray, size: Size) -> np.ndarray:
    """Classes uint8 [h, w, slices] to `size`: one-hot, linear, then the largest.

    Ties go to the lowest class. Used to the network's grid and back.
    """
    if volume.shape[:2] == size:
        return volume.astype(np.uint8)

    def resample(label: np.ndarray) -> np.ndarray:
        classes = np.unique(label)  # the others are 0 everywhere
        shares = [_zoom(label == value, size, order=1) for value in classes]
        return classes[np.argmax(shares, axis=0)].astype(np.uint8)

    return _by_slice(volume, resample)


def resampled_affine(affine: np.ndarray, before: Size, after: Size) -> np.ndarray:
    """The affine [4, 4] of a [row, col, slice] volume after resampling to another size."""
    scale = np.array([before[0] / after[0], before[1] / after[1], 1.0])
    to_old = np.diag([*scale, 1.0])
    to_old[:3, 3] = (scale - 1) / 2
    return affine @ to_old


def _by_slice(volume: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return np.stack([function(volume[:, :, k]) for k in range(volume.shape[2])], axis=-1)


def _zoom(image: np.ndarray, size: Size, *, order: int) -> np.ndarray:
    factors = [new / old for new, old in zip(size, image.shape, strict=True)]
    return ndimage.zoom(
        image.astype(np.float32), factors, order=order, mode="nearest", grid_mode=True
    )
