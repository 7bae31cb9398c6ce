"""Patches of one size from slices of any: centred in zeros where smaller, cropped where larger.

Sizes and origins are (row, col) in pixels. A point of the slice is at `point - origin` in its
patch.
"""

import numpy as np

PatchSize = tuple[int, int]


def patch_origin(
    size: PatchSize, patch_size: PatchSize, rng: np.random.Generator | None
) -> np.ndarray:
    """Pixel (row, col) of a slice at which its patch begins, int64 [2]; negative where it pads.

    A slice smaller than the patch is centred in it; a larger one is cropped at random, or centrally
    if `rng` is None.
    """
    spare = np.subtract(size, patch_size)
    centred = (spare / 2).astype(np.int64)  # rounds towards zero
    if rng is None:
        return centred
    return np.where(spare > 0, rng.integers(0, np.maximum(spare, 0) + 1), centred)


def cut_patch(array: np.ndarray, origin: np.ndarray, patch_size: PatchSize) -> np.ndarray:
    """The patch [h, w, ...] of an array [rows, cols, ...] from `origin`; zero outside the array."""
    if array.shape[:2] == tuple(patch_size) and not np.any(origin):
        return array
    patch = np.zeros((*patch_size, *array.shape[2:]), array.dtype)
    first = np.maximum(origin, 0)
    last = np.minimum(origin + patch_size, array.shape[:2])
    (top, left), (bottom, right) = first - origin, last - origin
    patch[top:bottom, left:right] = array[first[0] : last[0], first[1] : last[1]]
    return patch
