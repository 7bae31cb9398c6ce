"""Resampling in plane, against scipy's interpolation at explicit coordinates and its splines."""

import numpy as np
import pytest
from scipy import interpolate, ndimage

from data_prep.resampling import resample_image, resample_label, resampled_affine, size_at


def centres(old, new):
    """Where the centres of `new` pixels lie among `old` ones of the same extent."""
    return np.array([(i + 0.5) * old / new - 0.5 for i in range(new)])


def random_volume(seed=0, shape=(31, 26, 3)):
    rng = np.random.default_rng(seed)
    return ndimage.gaussian_filter(rng.normal(0, 400, shape), (1.5, 1.5, 0)).astype(np.float32)


@pytest.mark.parametrize("size", [(40, 31), (20, 19), (31, 50), (32, 26)])
def test_images_equal_scipys_cubic_spline_at_the_new_centres(size):
    volume = random_volume()
    found = resample_image(volume, size)
    grid = np.meshgrid(*map(centres, volume.shape, size), indexing="ij")
    assert (found.shape, found.dtype) == ((*size, 3), np.float32)
    for k in range(3):
        expected = ndimage.map_coordinates(volume[:, :, k], grid, order=3, mode="nearest")
        np.testing.assert_allclose(found[:, :, k], expected, rtol=1e-4, atol=1e-3)


def test_images_equal_another_implementation_of_splines_away_from_the_border():
    volume = random_volume(1, (48, 44, 2))
    found = resample_image(volume, (60, 33))
    rows, columns = centres(48, 60), centres(44, 33)
    inner = (slice(14, -14), slice(10, -10))
    for k in range(2):
        spline = interpolate.RectBivariateSpline(range(48), range(44), volume[:, :, k], s=0)
        expected = spline(rows, columns)[inner]
        np.testing.assert_allclose(found[:, :, k][inner], expected, atol=1e-3 * np.ptp(volume))


def one_hot_linear(label, size):
    """Loops over pixels and classes; among equal shares the lowest class."""
    rows, columns = centres(label.shape[0], size[0]), centres(label.shape[1], size[1])
    found = np.empty(size, np.uint8)
    for i, r in enumerate(np.clip(rows, 0, label.shape[0] - 1)):
        for j, c in enumerate(np.clip(columns, 0, label.shape[1] - 1)):
            shares = np.zeros(256)
            for y in {int(np.floor(r)), int(np.ceil(r))}:
                for x in {int(np.floor(c)), int(np.ceil(c))}:
                    shares[label[y, x]] += (1 - abs(r - y)) * (1 - abs(c - x))
            found[i, j] = np.flatnonzero(shares > shares.max() - 1e-6)[0]
    return found


@pytest.mark.parametrize("size", [(29, 22), (13, 12), (24, 17)])
def test_labels_equal_a_loop_over_classes(size):
    rng = np.random.default_rng(2)
    blobs = ndimage.gaussian_filter(rng.normal(size=(4, 19, 17, 2)), (0, 2, 2, 0))
    label = np.array([0, 1, 3, 200], np.uint8)[blobs.argmax(0)]
    found = resample_label(label, size)
    assert found.dtype == np.uint8
    for k in range(2):
        expected = one_hot_linear(label[:, :, k], size)
        assert (found[:, :, k] == expected).mean() > 0.99  # equal shares may round either way
        border = np.abs(found[:, :, k].astype(int) - expected) > 0
        assert border.sum() <= 3


def test_a_ramp_keeps_its_millimetres():
    affine = np.diag([1.6, 1.5, 9.0, 1.0]) + np.pad([[0, 0, 0, 5.0]], ((0, 3), (0, 0)))
    index = np.indices((40, 30, 2)).reshape(3, -1)
    rows_mm = (affine[:3, :3] @ index + affine[:3, 3:])[0].reshape(40, 30, 2)
    found = resample_image(rows_mm, (51, 36))
    new_affine = resampled_affine(affine, (40, 30), (51, 36))
    new_index = np.indices((51, 36, 2)).reshape(3, -1)
    expected = (new_affine[:3, :3] @ new_index + new_affine[:3, 3:])[0].reshape(51, 36, 2)
    # A spline rings where the ramp stops at the border.
    np.testing.assert_allclose(found[10:-10], expected[10:-10], atol=1e-2)


def test_labels_come_back_to_where_they_were():
    label = np.zeros((40, 36, 2), np.uint8)
    label[10:25, 8:20], label[25:30, 8:30] = 1, 2
    there = resample_label(label, (55, 44))
    np.testing.assert_array_equal(resample_label(there, (40, 36)), label)


def test_sizes_keep_the_extent():
    assert size_at((216, 256), (1.5625, 1.3671875), 1.25) == (270, 280)
    assert size_at((10, 10), (1.25, 0.7), 1.25) == (10, 6)


def test_the_same_size_changes_nothing():
    volume = random_volume()
    np.testing.assert_array_equal(resample_image(volume, (31, 26)), volume)
