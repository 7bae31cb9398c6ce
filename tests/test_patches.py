"""Patches against `numpy.pad` and slicing."""

from collections import Counter

import numpy as np
import pytest

from kafjax.patches import cut_patch, patch_origin


@pytest.mark.parametrize("size", [(9, 14), (10, 13), (5, 6), (12, 4), (7, 8)])
def test_the_central_patch_pads_and_crops_centrally(size):
    array = np.arange(1, size[0] * size[1] + 1).reshape(size)
    padded = np.pad(array, [(max(0, (p - s) // 2), max(0, p - s)) for s, p in zip(size, (7, 8))])  # noqa: B905
    crop = [max(0, (s - p) // 2) for s, p in zip(size, (7, 8), strict=True)]
    expected = padded[crop[0] : crop[0] + 7, crop[1] : crop[1] + 8]
    np.testing.assert_array_equal(
        cut_patch(array, patch_origin(size, (7, 8), None), (7, 8)), expected
    )


@pytest.mark.parametrize("origin", [(0, 0), (2, -1), (-3, 4), (1, 0)])
@pytest.mark.parametrize("patch_size", [(5, 6), (4, 8)])
def test_a_patch_from_any_origin_is_zero_outside_the_slice(origin, patch_size):
    array = np.arange(1, 61).reshape(5, 6, 2)
    surrounded = np.pad(array, ((9, 9), (9, 9), (0, 0)))
    top, left = np.add(origin, 9)
    expected = surrounded[top : top + patch_size[0], left : left + patch_size[1]]
    np.testing.assert_array_equal(cut_patch(array, np.array(origin), patch_size), expected)


def test_random_crops_reach_every_place_alike():
    rng = np.random.default_rng(0)
    origins = Counter(tuple(patch_origin((9, 5), (7, 8), rng)) for _ in range(3000))
    assert sorted(origins) == [(0, -1), (1, -1), (2, -1)]
    assert all(abs(count - 1000) < 150 for count in origins.values())
