"""kafjax.augment against scipy, golden values, and its own two ways of moving keypoints."""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from kafjax import augment
from kafjax.intensity import IntensityConfig, augment_intensity

GOLDEN = Path(__file__).parent / "golden" / "matching.npz"
NO_TRANSFORM = augment.AugmentConfig(mirror_probability=0.0, spatial_probability=0.0)
ALWAYS = augment.AugmentConfig(spatial_probability=1.0)
STEEPEST = augment.AugmentConfig(
    spatial_probability=1.0, elastic_sigma=(14.0, 14.0), elastic_alpha=(350.0, 350.0)
)
MODES = pytest.mark.parametrize("mode", augment.KEYPOINT_MODES)


def random_view(seed, *, shape=(96, 128), num_keypoints=60, num_real=45):
    """A noise image with keypoints on distinct pixels; the last of them are padding at (0, 0)."""
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((*shape, 1)).astype(np.float32)
    mask = np.arange(num_keypoints) < num_real
    pixels = rng.choice(math.prod(shape), num_keypoints, replace=False)
    keypoints = np.stack(np.unravel_index(pixels, shape), axis=-1).astype(np.int32)
    return image, np.where(mask[:, None], keypoints, 0), mask


draw_transform = jax.jit(augment.sample_transform, static_argnames=("shape", "config"))
sampling_coordinates = jax.jit(augment.sampling_coordinates)
transfer_keypoints = jax.jit(augment.transfer_keypoints, static_argnames="mode")
augment_view = jax.jit(augment.augment_view, static_argnames=("mode", "config"))
augment_pair = jax.jit(augment.augment_pair, static_argnames=("mode", "config"))


def spatial_transform(seed, shape, config=ALWAYS):
    return draw_transform(jax.random.key(seed), shape, config=config)


def scipy_warp(image, coordinates, order):
    positions = np.moveaxis(np.asarray(coordinates, np.float64), -1, 0)
    channels = [
        scipy.ndimage.map_coordinates(image[..., c], positions, order=order, mode="constant")
        for c in range(image.shape[-1])
    ]
    return np.stack(channels, axis=-1)


def test_elastic_displacement_has_the_stated_spread():
    config = augment.AugmentConfig(elastic_sigma=(3.0, 3.0), elastic_alpha=(60.0, 60.0))
    u = augment.elastic_displacement(jax.random.key(0), (400, 300), config=config)
    assert u.shape == (400, 300, 2)
    inner = np.asarray(u)[20:-20, 20:-20]
    deviation = 60 / (3 * math.sqrt(12 * math.pi))
    np.testing.assert_allclose(inner.std(axis=(0, 1)), deviation, rtol=0.05)
    slopes = np.diff(inner, axis=0).std(), np.diff(inner, axis=1).std()
    np.testing.assert_allclose(slopes, deviation / (3 * math.sqrt(2)), rtol=0.05)


def test_coordinates_without_transform_are_the_pixels():
    transform = spatial_transform(0, (30, 41), NO_TRANSFORM)
    grid = np.stack(np.indices((30, 41)), axis=-1)
    np.testing.assert_array_equal(sampling_coordinates(transform), grid)


@pytest.mark.parametrize("mirror", [(True, False), (False, True), (True, True)])
def test_mirror_is_numpy_flip(mirror):
    image, _, _ = random_view(1, shape=(30, 41))
    transform = spatial_transform(0, (30, 41), NO_TRANSFORM)._replace(mirror=jnp.array(mirror))
    warped = augment.warp_image(image, sampling_coordinates(transform))
    np.testing.assert_array_equal(warped, np.flip(image, axis=np.flatnonzero(mirror)))


@pytest.mark.parametrize("seed", range(4))
def test_coordinates_equal_the_formula_pixel_by_pixel(seed):
    shape = (17, 24)
    transform = jax.device_get(spatial_transform(seed, shape))
    centre = (np.array(shape) - 1) / 2
    expected = np.zeros((*shape, 2))
    for q in np.ndindex(shape):
        position = centre + transform.matrix @ (q - centre + transform.displacement[q])
        last = np.array(shape) - 1
        expected[q] = np.where(transform.mirror, last - position, position)
    coordinates = sampling_coordinates(transform)
    assert coordinates.dtype == jnp.float32
    np.testing.assert_allclose(coordinates, expected, atol=1e-4)


def test_scale_above_one_shrinks_the_image():
    config = augment.AugmentConfig(
        mirror_probability=0.0,
        spatial_probability=1.0,
        elastic_alpha=(0.0, 0.0),
        magnify_probability=0.0,
        shrink_scale=(1.3, 1.3),
    )
    image = np.ones((101, 101, 1), np.float32)
    coordinates = sampling_coordinates(spatial_transform(3, (101, 101), config))
    covered = float(augment.warp_image(image, coordinates).mean())
    assert covered == pytest.approx(1 / 1.3**2, abs=0.02)


def test_draws_follow_the_configuration():
    keys = jax.random.split(jax.random.key(0), 2000)
    draw = functools.partial(augment.sample_transform, shape=(2, 2))
    transforms = jax.device_get(jax.jit(jax.vmap(draw))(keys))
    np.testing.assert_allclose(transforms.mirror.mean(axis=0), 0.5, atol=0.05)
    spatial = (transforms.displacement != 0).any(axis=(1, 2, 3))
    assert spatial.mean() == pytest.approx(0.67, abs=0.04)
    np.testing.assert_array_equal(
        transforms.matrix[~spatial], np.broadcast_to(np.eye(2), ((~spatial).sum(), 2, 2))
    )
    matrix = transforms.matrix[spatial]
    scale = np.sqrt(np.linalg.det(matrix))
    gram = matrix @ matrix.transpose(0, 2, 1) / scale[:, None, None] ** 2
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(2), gram.shape), atol=1e-5)
    quartiles = np.quantile(scale, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(quartiles, [0.7, 0.85, 1.0, 1.15, 1.3], atol=0.03)
    angle = np.arctan2(matrix[:, 1, 0], matrix[:, 0, 0])
    counts, _ = np.histogram(angle, bins=8, range=(-math.pi, math.pi))
    assert counts.min() > 0.7 * len(angle) / 8


def test_config_lists_every_fault():
    with pytest.raises(ValueError, match="AugmentConfig") as caught:
        augment.AugmentConfig(
            mirror_probability=1.5, elastic_alpha=(3.0, 2.0), magnify_scale=(0.0, 1.0)
        )
    for fault in ("mirror_probability is 1.5", "elastic_alpha is (3.0, 2.0)", "magnify_scale"):
        assert fault in str(caught.value)


@pytest.mark.parametrize("seed", range(3))
def test_warps_equal_scipy(seed):
    shape = (60, 90)
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((*shape, 2)).astype(np.float32)
    label = rng.integers(1, 8, (*shape, 1)).astype(np.uint8)
    coordinates = sampling_coordinates(spatial_transform(seed, shape))
    warped = jax.jit(augment.warp_image)(image, coordinates)
    np.testing.assert_allclose(warped, scipy_warp(image, coordinates, 1), atol=1e-4)
    nearest = jax.jit(augment.warp_label)(label, coordinates)
    assert nearest.dtype == jnp.uint8
    np.testing.assert_array_equal(nearest, scipy_warp(label, coordinates, 0))
    assert 0 < (np.asarray(nearest) == 0).mean() < 0.7


def test_a_position_a_little_outside_is_outside():
    image = np.ones((4, 5, 1), np.float32)
    positions = np.array([[[0, 0], [-0.01, 2], [3, 4], [3.01, 4], [1, 4.3], [1, -0.3]]], np.float32)
    expected = [[1, 0, 1, 0, 0, 0]]
    np.testing.assert_array_equal(augment.warp_image(image, positions)[..., 0], expected)
    np.testing.assert_array_equal(augment.warp_label(image, positions)[..., 0], expected)
    np.testing.assert_array_equal(scipy_warp(image, positions, 1)[..., 0], expected)


def test_keypoints_from_index_map_golden():
    golden = np.load(GOLDEN)
    expected = golden["index_map_keypoints"]
    read = jax.jit(augment.keypoints_from_index_map, static_argnums=1)
    keypoints, mask = read(golden["index_map"], len(expected))
    np.testing.assert_array_equal(np.where(mask[:, None], keypoints, -1), expected)
    assert 0 < int(mask.sum()) < len(expected)
    np.testing.assert_array_equal(np.asarray(keypoints)[~np.asarray(mask)], 0)


def loop_transfer(keypoints, mask, coordinates):
    """The index map's way in plain numpy and scipy: the oracle of the segment sums."""
    index_map = np.zeros(coordinates.shape[:2], np.int32)
    for number, (row, col) in enumerate(keypoints, start=1):
        if mask[number - 1]:
            index_map[row, col] = number
    warped = scipy_warp(index_map[..., None], coordinates, 0)[..., 0]
    moved, kept = np.zeros_like(keypoints), np.zeros_like(mask)
    for index in range(len(keypoints)):
        pixels = np.argwhere(warped == index + 1)
        if len(pixels):
            moved[index], kept[index] = np.trunc(pixels.mean(axis=0)), True
    return moved, kept


@pytest.mark.parametrize("seed", range(5))
def test_index_map_mode_equals_a_loop(seed):
    _, keypoints, mask = random_view(seed)
    keypoints[7] = keypoints[3]  # two on one pixel
    transform = spatial_transform(seed, (96, 128))
    moved, kept = transfer_keypoints(keypoints, mask, transform)
    coordinates = sampling_coordinates(transform)
    expected, expected_kept = loop_transfer(keypoints, mask, coordinates)
    np.testing.assert_array_equal(kept, expected_kept)
    np.testing.assert_array_equal(moved, expected)


def test_of_keypoints_on_one_pixel_the_last_real_one_stays():
    keypoints = np.array([[5, 6], [5, 6], [5, 6], [0, 0]], np.int32)
    mask = np.array([True, True, False, False])
    transform = spatial_transform(0, (12, 12), NO_TRANSFORM)
    moved, kept = transfer_keypoints(keypoints, mask, transform)
    np.testing.assert_array_equal(kept, [False, True, False, False])
    np.testing.assert_array_equal(moved, [[0, 0], [5, 6], [0, 0], [0, 0]])


def interpolated(field, q):
    """Bilinear value of [h, w, 2] at the positions q [n, 2], by scipy."""
    channels = np.moveaxis(np.asarray(field, np.float64), -1, 0)
    return np.stack([scipy.ndimage.map_coordinates(c, q.T, order=1) for c in channels], axis=-1)


@pytest.mark.parametrize("seed", range(3))
def test_invert_transform_inverts_the_coordinates(seed):
    shape = (256, 256)
    _, keypoints, _ = random_view(seed, shape=shape, num_keypoints=200, num_real=200)
    transform = spatial_transform(seed, shape, STEEPEST)
    q, found = jax.device_get(jax.jit(augment.invert_transform)(transform, keypoints))
    inner = found & ((q >= 0) & (q <= 255)).all(axis=-1)
    assert inner.mean() > 0.4
    back = interpolated(sampling_coordinates(transform), q[inner])
    np.testing.assert_allclose(back, keypoints[inner], atol=0.02)


def test_a_fold_is_given_up():
    # Rows run backwards through u = -2 (row - 10): T(10) = 10, with a determinant of -1.
    transform = spatial_transform(0, (21, 21), NO_TRANSFORM)
    backwards = -2.0 * (jnp.arange(21.0)[:, None] - 10)
    fold = transform._replace(displacement=transform.displacement.at[..., 0].set(backwards))
    positions = jnp.full((1, 2), 10.0)
    q, found = augment.invert_transform(fold, positions)
    np.testing.assert_array_equal(q, positions)
    assert not found.any()
    assert augment.invert_transform(transform, positions)[1].all()


@pytest.mark.parametrize("config", [augment.DEFAULT_CONFIG, STEEPEST], ids=["default", "steepest"])
def test_both_modes_agree_within_a_pixel(config):
    def transfer_both(key):
        shape, mask = (160, 224), jnp.ones(100, bool)
        transform = augment.sample_transform(key, shape, config=config)
        keypoints = jax.random.randint(key, (100, 2), 0, jnp.array(shape))
        by_map = augment.transfer_keypoints(keypoints, mask, transform, mode="index_map")
        return by_map, augment.transfer_keypoints(keypoints, mask, transform, mode="analytic")

    keys = jax.random.split(jax.random.key(0), 100)
    by_map, analytic = jax.device_get(
        jax.jit(lambda keys: jax.lax.map(transfer_both, keys, batch_size=10))(keys)
    )
    both = by_map[1] & analytic[1]
    assert both.mean() > 0.5
    assert np.abs(by_map[0] - analytic[0])[both].max() <= 1
    # What the map keeps the inverse keeps too, but at the image's border.
    assert (by_map[1] & ~analytic[1]).mean() < 0.01
    assert analytic[1].mean() > by_map[1].mean()


@MODES
@pytest.mark.parametrize("seed", range(4))
def test_a_bright_dot_stays_under_its_keypoint(mode, seed):
    shape = (160, 160)
    keypoints = np.stack(np.meshgrid(*[np.arange(24, 137, 16)] * 2), axis=-1).reshape(-1, 2)
    mask = np.ones(len(keypoints), bool)
    image = np.zeros((*shape, 1), np.float32)
    for row, col in keypoints:
        image[row - 1 : row + 2, col - 1 : col + 2] = 1.0
    key = jax.random.key(seed)
    warped, moved, kept = augment_view(key, image, keypoints, mask, mode=mode, config=ALWAYS)
    moved, kept = np.asarray(moved), np.asarray(kept)
    assert kept.sum() > 15
    assert np.asarray(warped)[moved[kept, 0], moved[kept, 1]].min() > 0.5


@MODES
def test_masked_stay_masked_and_lost_become_masked(mode):
    config = augment.AugmentConfig(
        spatial_probability=1.0, magnify_probability=1.0, magnify_scale=(0.7, 0.7)
    )
    image, keypoints, mask = random_view(4)
    _, moved, kept = augment_view(
        jax.random.key(1), image, keypoints, mask, mode=mode, config=config
    )
    kept = np.asarray(kept)
    assert not kept[~mask].any()
    assert 0 < kept.sum() < mask.sum()
    np.testing.assert_array_equal(np.asarray(moved)[~kept], 0)
    assert moved.dtype == jnp.int32


@MODES
def test_keypoints_outside_the_image_count_as_masked(mode):
    keypoints = np.array([[-1, 3], [3, 12], [11, 11]], np.int32)
    transform = spatial_transform(0, (12, 12), NO_TRANSFORM)
    moved, kept = transfer_keypoints(keypoints, np.ones(3, bool), transform, mode=mode)
    np.testing.assert_array_equal(kept, [False, False, True])
    np.testing.assert_array_equal(moved, [[0, 0], [0, 0], [11, 11]])


@MODES
def test_no_transform_changes_nothing(mode):
    image, keypoints, mask = random_view(5)
    unchanged = augment_view(
        jax.random.key(0), image, keypoints, mask, mode=mode, config=NO_TRANSFORM
    )
    for found, expected in zip(unchanged, (image, keypoints, mask), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_unknown_mode_names_the_choices():
    image, keypoints, mask = random_view(0)
    with pytest.raises(ValueError, match=r"'nearest', expected one of index_map, analytic"):
        augment_view(jax.random.key(0), image, keypoints, mask, mode="nearest")


def assert_same(found, expected):
    """Integers and masks equal; images nearly so, as positions may differ in their last bits."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, atol=2e-3 if a.dtype == jnp.float32 else 0)


def test_transfer_correspondence():
    correspondence = np.array([2, -1, 0, 1, 3], np.int16)
    mask_1 = np.array([True, True, True, False, True])
    mask_2 = np.array([True, True, True, False])
    followed = augment.transfer_correspondence(correspondence, mask_1, mask_2)
    assert followed.dtype == jnp.int32
    np.testing.assert_array_equal(followed, [2, -1, 0, -1, -1])


def test_label_follows_the_image():
    image, keypoints, mask = random_view(6)
    label = (image > 0).astype(np.uint8)
    key = jax.random.key(2)
    *view, warped = augment_view(key, image, keypoints, mask, label=label, config=ALWAYS)
    assert_same(view, augment_view(key, image, keypoints, mask, config=ALWAYS))
    transform = draw_transform(key, label.shape[:2], config=ALWAYS)
    coordinates = sampling_coordinates(transform)
    np.testing.assert_array_equal(warped, scipy_warp(label, coordinates, 0))


@MODES
def test_pair_moves_each_view_by_itself_and_keeps_what_is_matched(mode):
    view_1, view_2 = random_view(7), random_view(8)
    correspondence = np.where(view_1[2], np.roll(np.arange(60), 4) % 45, -1)
    key = jax.random.key(5)
    moved_1, moved_2, followed = augment_pair(
        key, view_1, view_2, correspondence, mode=mode, config=ALWAYS
    )
    key_1, key_2 = jax.random.split(key)
    assert_same(moved_1, augment_view(key_1, *view_1, mode=mode, config=ALWAYS))
    assert_same(moved_2, augment_view(key_2, *view_2, mode=mode, config=ALWAYS))
    for index, partner in enumerate(correspondence):
        both_kept = partner >= 0 and moved_1[2][index] and moved_2[2][partner]
        assert followed[index] == (partner if both_kept else -1)
    assert 0 < (np.asarray(followed) >= 0).sum() < (correspondence >= 0).sum()


@MODES
def test_same_key_same_result_vmapped_jitted_or_not(mode):
    view_1, view_2 = (
        tuple(np.stack(leaves) for leaves in zip(*map(random_view, seeds), strict=True))
        for seeds in ([0, 1, 2], [3, 4, 5])
    )
    arguments = (
        jax.random.split(jax.random.key(9), 3),
        view_1,
        view_2,
        np.tile(np.arange(60), (3, 1)),
    )
    options = {"mode": mode, "config": ALWAYS}
    batched = jax.jit(jax.vmap(functools.partial(augment.augment_pair, **options)))(*arguments)
    for index in range(3):
        one = jax.tree.map(lambda leaf, i=index: leaf[i], (arguments, batched))
        assert_same(augment_pair(*one[0], **options), one[1])
    key_1, _ = jax.random.split(one[0][0])
    assert_same(augment.augment_view(key_1, *one[0][1], **options), one[1][0])


def test_intensities_change_after_the_transform_and_leave_it_as_it_is() -> None:
    image, keypoints, mask = random_view(4)
    key = jax.random.key(5)
    config = IntensityConfig(brightness_probability=1.0)
    plain = augment_view(key, image, keypoints, mask, label=image, config=ALWAYS)
    found = jax.jit(
        functools.partial(augment.augment_view, config=ALWAYS, intensity=config), static_argnames=()
    )(key, image, keypoints, mask, label=image)
    for a, b in zip(found[1:], plain[1:], strict=True):
        np.testing.assert_array_equal(a, b)
    changed = augment_intensity(jax.random.fold_in(key, 100), plain[0], config=config)
    np.testing.assert_allclose(found[0], changed, atol=1e-4)
    assert np.abs(np.asarray(found[0] - plain[0])).max() > 0.01


def test_keys_of_transform_and_intensities_differ() -> None:
    key = jax.random.key(0)
    own = [*jax.random.split(key, 4), jax.random.fold_in(key, 100)]
    assert len({tuple(jax.random.key_data(k).tolist()) for k in own}) == 5
