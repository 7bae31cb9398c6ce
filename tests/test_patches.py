"""Patches against `numpy.pad` and slicing."""

from collections import Counter

import numpy as np
import pytest

from kafjax.data.patches import (
    blend_tiles,
    choose_keypoints,
    count_places,
    cut_patch,
    cut_view,
    follow_correspondence,
    keypoints_inside,
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


def test_chosen_keypoints_take_the_places_of_a_patch():
    image = np.arange(200.0).reshape(10, 20, 1)
    keypoints, mask = np.array([[2, 3], [9, 19], [4, 9], [6, 11]]), np.array([1, 1, 1, 1], bool)
    origin = np.array([2, 4])
    assert keypoints_inside(keypoints, mask, origin, (6, 8)).tolist() == [False, False, True, True]
    view = cut_view(image, keypoints, mask, origin, (6, 8), chosen=np.array([2, 3, -1]))
    assert view["keypoint_mask"].tolist() == [True, True, False]
    assert view["keypoints"].tolist() == [[2, 5], [4, 7], [0, 0]]


def test_all_keypoints_of_a_patch_stay_where_there_are_places():
    inside = np.array([0, 1, 0, 1, 1], bool)
    assert choose_keypoints(inside, 5, np.random.default_rng(0)).tolist() == [1, 3, 4, -1, -1]
    assert choose_keypoints(inside, 3, None, strongest=True).tolist() == [1, 3, 4]
    assert choose_keypoints(np.zeros(5, bool), 2, None).tolist() == [-1, -1]


def test_too_many_keypoints_are_drawn_alike_or_the_strongest_stay():
    inside = np.array([1, 0, 1, 1, 0, 1], bool)
    assert choose_keypoints(inside, 2, None, strongest=True).tolist() == [3, 5]
    rng = np.random.default_rng(0)
    drawn = Counter(tuple(choose_keypoints(inside, 2, rng).tolist()) for _ in range(3000))
    assert sorted(drawn) == [(0, 2), (0, 3), (0, 5), (2, 3), (2, 5), (3, 5)]
    assert all(abs(count - 500) < 100 for count in drawn.values())
    again = [choose_keypoints(inside, 2, None).tolist() for _ in range(2)]
    assert again[0] == again[1]


@pytest.mark.parametrize("places", [4, 9, 12])
def test_correspondences_follow_the_chosen_keypoints(places):
    rng = np.random.default_rng(places)
    for _ in range(20):
        correspondence = np.full(12, -1)
        ends = rng.permutation(12)[:8]
        correspondence[ends] = rng.permutation(12)[:8]
        first, second = (choose_keypoints(rng.random(12) < 0.8, places, rng) for _ in range(2))
        found = follow_correspondence(correspondence, first, second)
        assert found.shape == (places,)
        expected = {  # as pairs of the slices' keypoints
            (i, j) for i, j in enumerate(correspondence) if j >= 0 and i in first and j in second
        }
        assert {(first[p], second[q]) for p, q in enumerate(found) if q >= 0} == expected


@pytest.mark.parametrize(
    ("patch_size", "places"),
    [
        ((32, 32), 96),  # 1.5 * 500 * (20 / 16 + 10 / 4) / 30 = 93.75
        ((128, 128), 500),
    ],
)
def test_places_follow_from_a_patchs_share_of_the_slices(patch_size, places):
    volumes = {
        "ct_1001": {"size": [128, 128], "num_slices": 20},
        "ct_1002": {"size": [64, 64], "num_slices": 10},
    }
    metadata = {"max_keypoints": 500, "volumes": volumes}
    assert count_places(metadata, patch_size) == places
