"""Patches against `numpy.pad` and slicing."""

from collections import Counter

import numpy as np
import pytest

from kafjax.data.patches import (
    blend_tiles,
    cut_patch,
    cut_view,
    patch_origin,
    patch_origin_around,
    tile_origins,
)


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


@pytest.mark.parametrize("size", [(5, 6), (7, 8), (8, 9), (20, 8), (33, 50), (6, 31)])
def test_tiles_cover_every_pixel_and_overlap_by_half(size):
    patch_size = (7, 8)
    origins = tile_origins(size, patch_size)
    covered = np.zeros(size, int)
    for row, col in origins:
        covered[max(row, 0) : row + 7, max(col, 0) : col + 8] += 1
    assert covered.min() == 1
    for axis in range(2):
        starts = np.unique(origins[:, axis])
        if size[axis] <= patch_size[axis]:
            assert list(starts) == [patch_origin(size, patch_size, None)[axis]]
        else:
            assert (starts[0], starts[-1] + patch_size[axis]) == (0, size[axis])
            assert np.diff(starts).max() <= (patch_size[axis] + 1) // 2


@pytest.mark.parametrize("size", [(5, 6), (7, 8), (12, 5), (30, 21)])
def test_tiles_of_a_slice_blend_to_the_slice(size):
    array = np.random.default_rng(0).random((*size, 3))
    origins = tile_origins(size, (7, 8))
    tiles = np.stack([cut_patch(array, origin, (7, 8)) for origin in origins])
    np.testing.assert_allclose(blend_tiles(tiles, origins, size), array, rtol=1e-12)


def test_a_tiles_centre_weighs_more_than_anothers_edge():
    origins = tile_origins((8, 12), (8, 8))
    assert origins.tolist() == [[0, 0], [0, 4]]
    tiles = np.stack([np.zeros((8, 8, 1)), np.ones((8, 8, 1))])
    (row,) = {tuple(row) for row in blend_tiles(tiles, origins, (8, 12))[..., 0].round(9).tolist()}
    # Column 5 is 1.5 from the first tile's centre and 2.5 from the second's; sigma is 1.
    expected = np.exp(-(2.5**2) / 2) / (np.exp(-(2.5**2) / 2) + np.exp(-(1.5**2) / 2))
    assert row[5] == pytest.approx(expected)
    assert row[:4] == (0, 0, 0, 0)
    assert row[8:] == (1, 1, 1, 1)
    assert list(row) == sorted(row)


def test_keypoints_are_cut_with_their_patch():
    image = np.arange(200.0).reshape(10, 20, 1)
    keypoints, mask = np.array([[2, 3], [9, 19], [2, 4], [6, 11]]), np.array([1, 1, 0, 1], bool)
    view = cut_view(image, keypoints, mask, np.array([2, 4]), (6, 8))
    assert view["keypoint_mask"].tolist() == [False, False, False, True]
    assert view["keypoints"].tolist() == [[0, 0], [0, 0], [0, 0], [4, 7]]
    row, col = view["keypoints"][3]
    assert view["image"][row, col, 0] == image[6, 11, 0]


@pytest.mark.parametrize("pixel", [(0, 0), (4, 13), (8, 2), (3, 7)])
@pytest.mark.parametrize("patch_size", [(4, 5), (9, 14), (12, 6)])
def test_patches_around_a_pixel_are_all_those_that_show_it(pixel, patch_size):
    size = (9, 14)
    rng = np.random.default_rng(0)
    found = {
        tuple(patch_origin_around(np.array(pixel), size, patch_size, rng).tolist())
        for _ in range(600)
    }
    ranges = [
        [o for o in range(n - p + 1) if o <= x < o + p] if p < n else [int((n - p) / 2)]
        for n, p, x in zip(size, patch_size, pixel, strict=True)
    ]
    assert found == {(r, c) for r in ranges[0] for c in ranges[1]}
