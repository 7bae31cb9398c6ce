"""SIFT keypoints of slices, and their correspondences between two slices.

Keypoints are (row, col) in integer pixels of the slice; descriptors are OpenCV's, 128 integers of
0..255. Source: Yang et al. (NeurIPS 2023), appendix; Lowe (IJCV 2004) for SIFT.
"""

import zlib
from dataclasses import dataclass
from typing import Literal, get_args

import cv2
import numpy as np

from kafjax.errors import UserError

Selection = Literal["random", "strongest"]
SELECTIONS: tuple[str, ...] = get_args(Selection)


@dataclass(frozen=True, eq=False)
class Keypoints:
    """Keypoints of one slice: positions int16 [n, 2], descriptors uint8 [n, 128]."""

    positions: np.ndarray
    descriptors: np.ndarray
    num_found: int  # before the choice of at most K

    def __len__(self) -> int:
        return len(self.positions)


def scale_to_uint8(image: np.ndarray) -> np.ndarray:
    """The slice [h, w] scaled by its own minimum and maximum to 0..255; 0 if it is constant."""
    image = image.astype(np.float32)
    low, high = image.min(), image.max()
    if low == high:
        return np.zeros(image.shape, np.uint8)
    return ((image - low) * (255 / (high - low))).astype(np.uint8)


def find_keypoints(
    image: np.ndarray,
    *,
    max_keypoints: int,
    selection: Selection = "random",
    rng: np.random.Generator | None = None,
) -> Keypoints:
    """OpenCV's SIFT, with its defaults, on a slice [h, w] of any numeric type.

    Positions are rounded; of several keypoints on one pixel the strongest response is kept. If more
    than `max_keypoints` remain, 'random' keeps a choice drawn from `rng`, in OpenCV's order, which
    is by position and independent of strength; 'strongest' keeps the strongest, from weak to
    strong, so that patches of the slice can keep their strongest too. A slice may have none.
    """
    found, descriptors = cv2.SIFT.create().detectAndCompute(scale_to_uint8(image), None)
    if not found:
        return Keypoints(np.zeros((0, 2), np.int16), np.zeros((0, 128), np.uint8), 0)
    columns_rows = np.asarray(cv2.KeyPoint.convert(found))
    bounds = np.array(image.shape) - 1
    positions = np.clip(np.rint(columns_rows[:, ::-1]), 0, bounds).astype(np.int16)
    responses = np.array([keypoint.response for keypoint in found])
    distinct = _strongest_per_pixel(positions, responses)
    kept = _choose(distinct, responses, max_keypoints, selection, rng)
    return Keypoints(positions[kept], descriptors[kept].astype(np.uint8), len(distinct))


def slice_generator(seed: int, volume_id: str, slice_index: int) -> np.random.Generator:
    """The random generator of one slice, independent of the process that prepares it."""
    name = volume_id.encode(errors="surrogateescape")  # a file's name may not be UTF-8
    return np.random.default_rng([seed, zlib.crc32(name), slice_index])


def _strongest_per_pixel(positions: np.ndarray, responses: np.ndarray) -> np.ndarray:
    """Ascending indices of one keypoint per pixel: the strongest, among equals the first."""
    order = np.argsort(-responses, kind="stable")
    pixels = positions[order].astype(np.int64) @ (1 << 16, 1)
    _, first = np.unique(pixels, return_index=True)
    return np.sort(order[first])


def _choose(
    indices: np.ndarray,
    responses: np.ndarray,
    max_keypoints: int,
    selection: Selection,
    rng: np.random.Generator | None,
) -> np.ndarray:
    if selection == "strongest":
        return indices[np.argsort(-responses[indices], kind="stable")[:max_keypoints]][::-1]
    if len(indices) <= max_keypoints:
        return indices
    if selection != "random" or rng is None:
        raise UserError(
            f"selection is {selection!r} with rng {rng}; expected one of {SELECTIONS}"
            ", and a generator for 'random'"
        )
    return np.sort(rng.choice(indices, max_keypoints, replace=False))


def correspondences(first: Keypoints, second: Keypoints, *, radius: float) -> np.ndarray:
    """Index into `second` of each keypoint of `first`, or -1; int16 [len(first)].

    A keypoint's candidates are those of the other slice nearer than `radius` pixels by Manhattan
    distance; it chooses the one whose descriptor is nearest (Euclidean; the lowest index among
    equals). Two keypoints correspond when each chose the other. Source: the appendix's matching of
    SIFT descriptors between neighbouring slices, with one radius for both directions.
    """
    rows, columns = _candidates(first.positions, second.positions, radius)
    # Squared distances of uint8 descriptors are integers far below 2**31: ties are exact.
    offset = first.descriptors[rows].astype(np.int32) - second.descriptors[columns]
    distances = np.einsum("kd,kd->k", offset, offset)
    choice = _choices(rows, columns, distances, len(first))
    choice_back = _choices(columns, rows, distances, len(second))
    chosen = np.flatnonzero(choice >= 0)
    mutual = chosen[choice_back[choice[chosen]] == chosen]
    matches = np.full(len(first), -1, np.int16)
    matches[mutual] = choice[mutual]
    return matches


def invert(matches: np.ndarray, num_second: int) -> np.ndarray:
    """The same correspondences seen from the other slice, int16 [num_second]."""
    inverse = np.full(num_second, -1, np.int16)
    matched = np.flatnonzero(matches >= 0)
    inverse[matches[matched]] = matched
    return inverse


def _candidates(
    first: np.ndarray, second: np.ndarray, radius: float
) -> tuple[np.ndarray, np.ndarray]:
    """Index pairs of positions [n, 2] and [m, 2] nearer than `radius` by Manhattan distance."""
    # Only rows within the radius are searched: a band of the second slice, sorted by row.
    by_row = np.argsort(second[:, 0], kind="stable")
    sorted_rows = second[by_row, 0].astype(np.int64)
    low = np.searchsorted(sorted_rows, first[:, 0] - radius, side="right")
    count = np.searchsorted(sorted_rows, first[:, 0] + radius, side="left") - low
    rows = np.repeat(np.arange(len(first)), count)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(count) - count, count)
    columns = by_row[np.repeat(low, count) + within]
    offset = first[rows].astype(np.int32) - second[columns]
    near = np.abs(offset).sum(1) < radius
    return rows[near], columns[near]


def _choices(
    choosers: np.ndarray, candidates: np.ndarray, distances: np.ndarray, count: int
) -> np.ndarray:
    """Each chooser's nearest candidate, the lowest index among equals, or -1; int64 [count]."""
    order = np.lexsort((candidates, distances, choosers))
    who, first = np.unique(choosers[order], return_index=True)
    choice = np.full(count, -1)
    choice[who] = candidates[order[first]]
    return choice
