"""Components on the device against SciPy's."""

import jax
import numpy as np
import pytest
from scipy import ndimage

from kafjax.components import label_components, largest_components

NUM_CLASSES = 4


def spiral(edge: int) -> np.ndarray:
    """One component as long as half of all pixels: a path that turns inwards."""
    path = np.zeros((edge, edge), np.int32)
    row, col, step = 0, 0, (0, 1)
    path[0, 0] = 1
    for _ in range(edge * edge):
        turned = (step[1], -step[0])
        for drow, dcol in (step, turned):
            ahead = row + 2 * drow, col + 2 * dcol
            near = row + drow, col + dcol
            beyond = not all(0 <= x < edge for x in ahead)
            free = all(0 <= x < edge for x in near) and not path[near]
            if free and (beyond or not path[ahead]):
                (row, col), step = near, (drow, dcol)
                path[near] = 1
                break
        else:
            break
    return path


def slices() -> np.ndarray:
    rng = np.random.default_rng(0)
    lumps = ndimage.gaussian_filter(rng.standard_normal((3, NUM_CLASSES, 24, 24)), (0, 0, 1, 1))
    noise = rng.integers(0, NUM_CLASSES, (2, 24, 24))
    special = [spiral(24), np.zeros((24, 24)), np.full((24, 24), 2)]
    return np.concatenate([lumps.argmax(1), noise, special]).astype(np.int32)


def by_scipy(classes: np.ndarray) -> np.ndarray:
    """Each pixel's first pixel of its component, of one slice."""
    first = np.zeros(classes.shape, int)
    for i in np.unique(classes):
        components, count = ndimage.label(classes == i)
        for number in range(1, count + 1):
            first[components == number] = np.flatnonzero(components == number)[0]
    return first


def largest_by_scipy(classes: np.ndarray) -> np.ndarray:
    kept = np.zeros_like(classes)
    for i in range(1, NUM_CLASSES):
        components, count = ndimage.label(classes == i)
        if count:
            sizes = np.bincount(components.ravel())[1:]
            kept[components == 1 + sizes.argmax()] = i
    return kept


def test_the_spiral_is_long_and_whole() -> None:
    assert spiral(24).sum() > 24 * 24 / 3
    assert ndimage.label(spiral(24))[1] == 1


def test_components_are_scipys() -> None:
    classes = slices()
    found = np.asarray(jax.jit(label_components)(classes))
    np.testing.assert_array_equal(found, np.stack([by_scipy(x) for x in classes]))


@pytest.mark.parametrize("mapped", [False, True])
def test_largest_components_are_scipys_and_the_first_of_equals(mapped: bool) -> None:
    classes = slices()
    tie = np.zeros((24, 24), np.int32)
    tie[2:4, 10:12] = tie[8:10, 2:4] = 3
    classes = np.concatenate([classes, tie[None]])

    def largest(x: jax.Array) -> jax.Array:
        return largest_components(x, NUM_CLASSES)

    function = jax.vmap(lambda x: largest(x[None])[0]) if mapped else largest
    found = np.asarray(jax.jit(function)(classes))
    expected = np.stack([largest_by_scipy(x) for x in classes])
    np.testing.assert_array_equal(found, expected)
    assert (found != classes).any()
    assert found[-1, 2, 10] == 3 and found[-1, 8, 2] == 0
