"""Dice against golden values and counting, surfaces against sets of points in plain loops."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kafjax.segmentation_metrics import (
    count_pixels,
    pooled_dice,
    surface_distances,
    volume_metrics,
)

GOLDEN = Path(__file__).parent / "golden" / "matching.npz"


def blob(shape: tuple[int, ...], *, seed: int) -> np.ndarray:
    """A random lump of several pieces that may touch the border."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(shape, bool)
    grid = np.indices(shape)
    for _ in range(3):
        centre = rng.uniform(0, shape)
        radii = rng.uniform(1, 4, len(shape))
        scaled = [(axis - c) / r for axis, c, r in zip(grid, centre, radii, strict=True)]
        mask |= np.sum(np.square(scaled), axis=0) < 1
    return mask


def surface_points(mask: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """The surface as a list of positions in mm, found element by element."""
    inside = {tuple(p) for p in np.argwhere(mask)}
    steps = [
        tuple(sign * (axis == i) for i in range(mask.ndim))
        for axis in range(mask.ndim)
        for sign in (-1, 1)
    ]
    points = [
        p for p in sorted(inside) if any(tuple(np.add(p, step)) not in inside for step in steps)
    ]
    return np.array(points) * spacing


def nearest(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    return np.array([min(np.linalg.norm(others - p, axis=1)) for p in points])


def test_pooled_dice_is_the_releases() -> None:
    golden = np.load(GOLDEN)
    prediction = golden["dice_logits"].argmax(1)
    counts = count_pixels(prediction, golden["dice_label"], 5)
    np.testing.assert_allclose(pooled_dice(counts), golden["dice_per_class"], rtol=1e-6)
    np.testing.assert_allclose(pooled_dice(counts).mean(), golden["mean_dice"], rtol=1e-6)


def test_counts_are_those_of_a_loop_and_leave_out_padding() -> None:
    rng = np.random.default_rng(0)
    prediction, label = rng.integers(0, 4, (2, 5, 3, 6))
    valid = np.array([True, False, True, True, False])
    counts = jax.jit(count_pixels, static_argnums=2)(prediction, label, 4, valid=valid)
    expected = np.zeros((4, 3), int)
    for a, b in zip(prediction[valid].ravel(), label[valid].ravel(), strict=True):
        expected[a, 1] += 1
        expected[b, 2] += 1
        expected[a, 0] += a == b
    np.testing.assert_array_equal(counts, expected)


@pytest.mark.parametrize("size", [1, 3, 4, 7])
def test_any_batches_give_the_same_dice(size: int) -> None:
    rng = np.random.default_rng(1)
    prediction, label = rng.integers(0, 3, (2, 7, 8, 8))
    total = np.zeros((3, 3), np.int64)
    for start in range(0, 7, size):
        part = np.arange(start, start + size)
        batch = (np.take(x, part, axis=0, mode="clip") for x in (prediction, label))
        total += np.asarray(count_pixels(*batch, 3, valid=jnp.asarray(part < 7)))
    np.testing.assert_array_equal(total, count_pixels(prediction, label, 3))


def test_a_class_that_nobody_has_is_nan_and_a_missed_one_zero() -> None:
    label = np.array([[0, 1, 1, 3]])
    counts = count_pixels(np.array([[0, 1, 0, 0]]), label, 4)
    np.testing.assert_array_equal(pooled_dice(np.asarray(counts)), [2 / 3, np.nan, 0.0])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 1.3, 5.0)])
def test_volume_metrics_are_those_of_point_sets(seed: int, spacing: tuple[float, ...]) -> None:
    shape = (11, 9, 7)
    prediction, label = (blob(shape, seed=2 * seed + i).astype(int) * 2 for i in (0, 1))
    first, second = volume_metrics(prediction, label, num_classes=3, spacing=spacing)
    assert first.empty
    a, b = (surface_points(mask == 2, spacing) for mask in (prediction, label))
    there, back = nearest(a, b), nearest(b, a)
    assert second.hd95 == pytest.approx(
        max(np.quantile(there, 0.95), np.quantile(back, 0.95)), rel=1e-12
    )
    assert second.assd == pytest.approx((there.sum() + back.sum()) / (len(a) + len(b)), rel=1e-12)
    both = sum(p == q == 2 for p, q in zip(prediction.flat, label.flat, strict=True))
    total = np.count_nonzero(prediction) + np.count_nonzero(label)
    assert second.dice == pytest.approx(2 * both / total)
    assert not second.missed


def test_surfaces_of_equal_masks_touch() -> None:
    mask = blob((8, 8, 8), seed=3)
    for distances in surface_distances(mask, mask, spacing=(1, 2, 3)):
        assert len(distances) == len(surface_points(mask, (1, 2, 3)))
        assert not distances.any()


def test_shifted_cubes_are_the_shift_apart() -> None:
    a, b = np.zeros((2, 12, 12, 12), int)
    a[2:5, 2:5, 2:5] = 1
    b[2:5, 2:5, 6:9] = 1  # 4 elements on, no overlap
    (metrics,) = volume_metrics(a, b, num_classes=2, spacing=(1, 1, 2.5))
    assert metrics.dice == 0
    assert metrics.hd95 == 10.0
    # 9 elements of each cube are at 4, 3 and 2 elements from the other's near side, except
    # the cube's middle, which is no surface.
    assert metrics.assd == pytest.approx(2.5 * (9 * 4 + 8 * 3 + 9 * 2) / 26)


@pytest.mark.parametrize("swap", [False, True])
def test_a_class_that_one_lacks_is_missed_by_the_diagonal(swap: bool) -> None:
    shape, spacing = (4, 5, 6), (1.0, 2.0, 3.0)
    full, none = np.ones(shape, int), np.zeros(shape, int)
    pair = (none, full) if swap else (full, none)
    (metrics,) = volume_metrics(*pair, num_classes=2, spacing=spacing)
    assert (metrics.dice, metrics.missed, metrics.empty) == (0.0, True, False)
    corners = itertools.product(*[(0, n * s) for n, s in zip(shape, spacing, strict=True)])
    diagonal = max(np.linalg.norm(corner) for corner in corners)
    assert metrics.hd95 == metrics.assd == pytest.approx(diagonal)


def test_a_class_that_both_lack_is_nan_and_marked() -> None:
    none = np.zeros((4, 5), int)
    (metrics,) = volume_metrics(none, none, num_classes=2, spacing=(1, 1))
    assert (metrics.empty, metrics.missed) == (True, False)
    assert np.isnan([metrics.dice, metrics.hd95, metrics.assd]).all()


def test_arrays_and_spacing_that_do_not_fit_are_refused() -> None:
    volume = np.zeros((4, 5, 6), int)
    with pytest.raises(ValueError, match=r"prediction \(4, 5\), label \(4, 5, 6\)"):
        volume_metrics(volume[..., 0], volume, num_classes=2, spacing=(1, 1, 1))
    with pytest.raises(ValueError, match=r"spacing \(1, 1\); expected .* a spacing for each axis"):
        volume_metrics(volume, volume, num_classes=2, spacing=(1, 1))
