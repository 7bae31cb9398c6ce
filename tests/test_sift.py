"""Keypoints against OpenCV itself; correspondences against golden values, loops and OpenCV."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from data_prep import sift
from data_prep.sift import Keypoints, correspondences, find_keypoints

GOLDEN = Path(__file__).parent / "golden" / "matching.npz"


def golden_pair(case):
    with np.load(GOLDEN) as golden:
        first, second = (
            Keypoints(golden[f"{case}/keypoints_{i}"], golden[f"{case}/descriptors_{i}"], 0)
            for i in (1, 2)
        )
        return first, second, golden[f"{case}/correspondence"]


def random_keypoints(rng, count, *, edge, levels):
    """Few positions and few descriptor levels, so that ties and shared pixels are frequent."""
    return Keypoints(
        rng.integers(0, edge, (count, 2), np.int16),
        rng.integers(0, levels, (count, 128), np.uint8) * rng.integers(0, 2, 128, np.uint8),
        count,
    )


def correspondences_by_loops(first, second, radius):
    def choose(i, one, other):
        best, choice = np.inf, -1
        for j in range(len(other[0])):
            apart = sum(abs(int(a) - int(b)) for a, b in zip(one[0][i], other[0][j], strict=True))
            difference = one[1][i].astype(float) - other[1][j].astype(float)
            if apart < radius and np.sqrt((difference**2).sum()) < best:
                best, choice = np.sqrt((difference**2).sum()), j
        return choice

    one, other = ((k.positions, k.descriptors) for k in (first, second))
    forward = [choose(i, one, other) for i in range(len(first))]
    backward = [choose(j, other, one) for j in range(len(second))]
    return [j if j >= 0 and backward[j] == i else -1 for i, j in enumerate(forward)]


def textured_image(seed, shape=(200, 220)):
    rng = np.random.default_rng(seed)
    noise = sum(
        sigma * cv2.GaussianBlur(rng.standard_normal(shape), (0, 0), sigma) for sigma in (2, 4, 8)
    )
    return (1000 * noise).astype(np.int16)


def test_golden_chd_correspondences_are_equal():
    first, second, expected = golden_pair("chd")
    np.testing.assert_array_equal(correspondences(first, second, radius=20), expected)


def test_golden_acdc_correspondences_are_contained():
    first, second, expected = golden_pair("acdc")
    ours = correspondences(first, second, radius=30)
    np.testing.assert_array_equal(ours[expected >= 0], expected[expected >= 0])
    assert (ours >= 0).sum() >= (expected >= 0).sum() > 0


@pytest.mark.parametrize("seed", range(8))
def test_correspondences_equal_loops_with_ties(seed):
    rng = np.random.default_rng(seed)
    first = random_keypoints(rng, 40, edge=24, levels=1 + seed % 4)
    second = random_keypoints(rng, 33, edge=24, levels=1 + seed % 4)
    for radius in (1, 7, 20, 1000):
        expected = correspondences_by_loops(first, second, radius)
        found = correspondences(first, second, radius=radius)
        assert found.dtype == np.int16
        np.testing.assert_array_equal(found, expected)


def test_correspondences_from_the_other_side_are_the_inverse():
    first, second, _ = golden_pair("chd")
    forward = correspondences(first, second, radius=20)
    backward = correspondences(second, first, radius=20)
    np.testing.assert_array_equal(sift.invert(forward, len(second)), backward)
    np.testing.assert_array_equal(sift.invert(backward, len(first)), forward)


@pytest.mark.parametrize(("num_first", "num_second"), [(0, 0), (0, 5), (5, 0)])
def test_a_slice_without_keypoints_corresponds_to_nothing(num_first, num_second):
    rng = np.random.default_rng(0)
    first, second = (random_keypoints(rng, n, edge=9, levels=9) for n in (num_first, num_second))
    np.testing.assert_array_equal(correspondences(first, second, radius=20), [-1] * num_first)


def test_correspondences_equal_opencv_on_an_affine_copy():
    image = textured_image(1)
    matrix = np.array([[0.995, -0.03, 4.0], [0.03, 0.995, -3.0]])  # of (x, y)
    copy = cv2.warpAffine(image, matrix, image.shape[::-1], borderMode=cv2.BORDER_REFLECT)
    first, second = (find_keypoints(i, max_keypoints=10_000) for i in (image, copy))
    matcher = cv2.BFMatcher(cv2.NORM_L2, crossCheck=True)
    matches = matcher.match(*(k.descriptors.astype(np.float32) for k in (first, second)))
    expected = np.full(len(first), -1)
    for match in matches:
        expected[match.queryIdx] = match.trainIdx
    np.testing.assert_array_equal(correspondences(first, second, radius=10_000), expected)

    near = correspondences(first, second, radius=20)
    matched = np.flatnonzero(near >= 0)
    true = first.positions[matched, ::-1] @ matrix[:, :2].T + matrix[:, 2]
    error = np.abs(second.positions[near[matched], ::-1] - true).max(1)
    assert len(matched) > 100
    assert (error <= 2).mean() > 0.95


def test_keypoints_are_opencvs_rounded_and_distinct():
    image = textured_image(2)
    found, descriptors = cv2.SIFT.create().detectAndCompute(sift.scale_to_uint8(image), None)
    strongest = {}
    for keypoint, descriptor in zip(found, descriptors, strict=True):
        pixel = round(keypoint.pt[1]), round(keypoint.pt[0])
        if pixel not in strongest or keypoint.response > strongest[pixel][0]:
            strongest[pixel] = keypoint.response, descriptor
    ours = find_keypoints(image, max_keypoints=10_000)
    assert ours.num_found == len(ours) == len(strongest) < len(found)
    for position, descriptor in zip(ours.positions.tolist(), ours.descriptors, strict=True):
        np.testing.assert_array_equal(descriptor, strongest[tuple(position)][1])


def test_strongest_selection_keeps_the_strongest():
    image = textured_image(3)
    everything = find_keypoints(image, max_keypoints=10_000)
    found = cv2.SIFT.create().detect(sift.scale_to_uint8(image), None)
    response = {}
    for keypoint in found:
        pixel = round(keypoint.pt[1]), round(keypoint.pt[0])
        response[pixel] = max(keypoint.response, response.get(pixel, 0))
    kept = find_keypoints(image, max_keypoints=30, selection="strongest")
    weakest_kept = min(response[tuple(p)] for p in kept.positions.tolist())
    assert len(kept) == 30
    assert kept.num_found == len(everything)
    for places in (30, 10_000):  # from weak to strong, also where all stay
        found = find_keypoints(image, max_keypoints=places, selection="strongest")
        strength = [response[tuple(p)] for p in found.positions.tolist()]
        assert strength == sorted(strength)
    assert sum(value > weakest_kept for value in response.values()) <= 29


def test_random_selection_depends_on_seed_volume_and_slice_alone():
    image = textured_image(4)

    def select(*key):
        rng = sift.slice_generator(*key)
        return find_keypoints(image, max_keypoints=30, rng=rng).positions.tolist()

    chosen = select(0, "ct_1001", 5)
    assert len(chosen) == 30
    assert select(0, "ct_1001", 5) == chosen
    others = [select(1, "ct_1001", 5), select(0, "ct_1002", 5), select(0, "ct_1001", 6)]
    assert chosen not in others
    everything = find_keypoints(image, max_keypoints=10_000).positions.tolist()
    assert chosen == [p for p in everything if p in chosen]


def test_random_selection_needs_a_generator():
    with pytest.raises(ValueError, match="random"):
        find_keypoints(textured_image(4), max_keypoints=3)


def test_a_constant_slice_has_no_keypoints():
    found = find_keypoints(np.full((64, 64), -1024, np.int16), max_keypoints=8)
    assert len(found) == 0
    assert found.positions.shape == (0, 2)
    assert found.descriptors.shape == (0, 128)


def test_scaling_spans_the_bytes_for_any_type():
    image = textured_image(5)
    low, high = int(image.min()), int(image.max())
    expected = np.floor((image.astype(np.float64) - low) * 255 / (high - low))
    for dtype in (np.int16, np.int32, np.float32):
        scaled = sift.scale_to_uint8(image.astype(dtype))
        assert (scaled.min(), scaled.max()) == (0, 255)
        assert np.abs(scaled - expected).max() <= 1
        assert (scaled != expected).mean() < 1e-3
