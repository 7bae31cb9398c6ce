"""kafjax.intensity against scipy and numpy; each change alone, and all of them by their odds."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
import scipy.ndimage

from kafjax import intensity
from kafjax.intensity import IntensityConfig

NEVER = {
    f"{name}_probability": 0.0
    for name in ("noise", "blur", "brightness", "contrast", "resolution", "gamma")
}
augment_intensity = jax.jit(intensity.augment_intensity, static_argnames="config")


def draw_image(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def only(change: str, **ranges: tuple[float, float]) -> IntensityConfig:
    return IntensityConfig(**{**NEVER, f"{change}_probability": 1.0, **ranges})


def many(config: IntensityConfig, image: np.ndarray, number: int = 200) -> np.ndarray:
    """The image changed by as many keys, [number, h, w, c]."""
    keys = jax.random.split(jax.random.key(1), number)
    change = functools.partial(intensity.augment_intensity, config=config)
    return np.asarray(jax.jit(jax.vmap(change, (0, None)))(keys, image))


@pytest.mark.parametrize("sigma", [1.3, 5.6, 14.0, 17.0])
def test_gaussian_filter_equals_scipy(sigma: float) -> None:
    images = np.random.default_rng(0).uniform(-1, 1, (2, 70, 110)).astype(np.float32)
    expected = [scipy.ndimage.gaussian_filter(image, sigma, mode="constant") for image in images]
    filtered = jax.jit(functools.partial(intensity.gaussian_filter, max_sigma=17.0))(images, sigma)
    np.testing.assert_allclose(filtered, expected, atol=2e-6)


@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_blur_is_scipys_filter_over_what_lies_inside(sigma: float) -> None:
    image = draw_image(20, 33, 2)
    smooth = functools.partial(scipy.ndimage.gaussian_filter, sigma=sigma, mode="constant")
    expected = [smooth(image[..., c]) / smooth(np.ones((20, 33))) for c in range(2)]
    found = jax.jit(functools.partial(intensity.blur, max_sigma=1.0))(image, sigma)
    np.testing.assert_allclose(found, np.stack(expected, axis=-1), atol=2e-6)


def test_contrast_scales_about_the_mean_between_the_extremes() -> None:
    image = draw_image(9, 7, 1)
    for scale in (0.75, 1.25):
        expected = np.clip((image - image.mean()) * scale + image.mean(), image.min(), image.max())
        found = jax.jit(intensity.change_contrast)(image, scale)
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("power", [0.7, 1.0, 1.5])
def test_gamma_keeps_mean_and_deviation(power: float) -> None:
    image = draw_image(30, 20, 1) * 3 + 5
    share = (image - image.min()) / np.ptp(image)
    curved = share**power
    expected = (curved - curved.mean()) / curved.std() * image.std() + image.mean()
    found = jax.jit(intensity.change_gamma)(image, power)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    order = np.argsort(image.ravel())
    assert (np.diff(np.asarray(found).ravel()[order]) >= 0).all()


def test_a_slice_of_one_intensity_stays_under_gamma_and_contrast() -> None:
    flat = np.full((6, 5, 1), 2.5, np.float32)
    np.testing.assert_allclose(intensity.change_gamma(flat, 0.7), flat, rtol=1e-6)
    np.testing.assert_allclose(intensity.change_contrast(flat, 1.2), flat, rtol=1e-6)


@pytest.mark.parametrize("scale", [0.5, 0.61, 0.75, 0.9, 0.01])
def test_low_resolution_is_interpolated_from_the_nearest_pixels(scale: float) -> None:
    image = draw_image(24, 17, 1)
    counts = [max(1, math.floor(n * np.float32(scale))) for n in (24, 17)]
    nearest = [
        [math.floor((i + 0.5) * n / count) for i in range(count)]
        for n, count in zip((24, 17), counts, strict=True)
    ]
    coarse = image[..., 0][np.ix_(*nearest)]
    places = np.meshgrid(
        *((np.arange(n) + 0.5) * c / n - 0.5 for n, c in zip((24, 17), counts, strict=True)),
        indexing="ij",
    )
    expected = scipy.ndimage.map_coordinates(coarse, places, order=1, mode="nearest")
    found = jax.jit(intensity.lower_resolution)(image, scale)
    np.testing.assert_allclose(found[..., 0], expected, atol=1e-5)
    np.testing.assert_allclose(intensity.lower_resolution(image, 1.0), image, atol=1e-6)


def test_noise_is_normal_of_a_drawn_deviation() -> None:
    image = draw_image(40, 40, 1)
    noise = many(only("noise", noise_deviation=(0.1, 0.3)), image) - image
    deviations = noise.std(axis=(1, 2, 3))
    assert 0.09 < deviations.min() < 0.12
    assert 0.28 < deviations.max() < 0.32
    whitened = noise / deviations[:, None, None, None]
    assert abs(scipy.stats.kurtosis(whitened.ravel())) < 0.05
    assert abs(np.corrcoef(whitened[:, :-1].ravel(), whitened[:, 1:].ravel())[0, 1]) < 0.01


def test_brightness_is_one_shift_for_the_slice() -> None:
    image = draw_image(12, 9, 1)
    shifts = many(only("brightness"), image) - image
    np.testing.assert_allclose(np.ptp(shifts, axis=(1, 2, 3)), 0, atol=1e-6)
    assert -0.3 <= shifts.min() < -0.25
    assert 0.25 < shifts.max() <= 0.3


@pytest.mark.parametrize("change", ["blur", "contrast", "resolution", "gamma"])
def test_a_change_alone_is_its_function_of_a_number_in_its_range(change: str) -> None:
    """Bounds that meet leave one number to draw; gamma bends the image or its negative."""
    image = draw_image(16, 12, 1)
    field = next(f.name for f in dataclasses.fields(IntensityConfig) if f.name.startswith(change))
    field = {"blur": "blur_sigma", "gamma": "gamma_power"}.get(change, f"{change}_scale")
    functions = {
        "blur": lambda x: intensity.blur(x, 0.8, max_sigma=0.8),
        "contrast": lambda x: intensity.change_contrast(x, 0.8),
        "resolution": lambda x: intensity.lower_resolution(x, 0.8),
        "gamma": lambda x: intensity.change_gamma(x, 0.8),
    }
    expected = [functions[change](image)]
    if change == "gamma":
        expected.append(-functions[change](-image))
    found = many(only(change, **{field: (0.8, 0.8)}), image, 20)
    nearest = [min(np.abs(x - y).max() for y in expected) for x in found]
    assert max(nearest) < 1e-4
    assert len({round(float(x[0, 0, 0]), 4) for x in found}) == len(expected)


def test_changes_come_as_often_as_they_shall() -> None:
    image = draw_image(8, 8, 1)
    for odds in (0.0, 0.3, 1.0):
        config = IntensityConfig(**{**NEVER, "brightness_probability": 0.5, "probability": odds})
        changed = np.any(many(config, image, 2000) != image, axis=(1, 2, 3)).mean()
        assert changed == pytest.approx(odds / 2, abs=0.03)


def test_probability_0_leaves_every_bit() -> None:
    image = draw_image(8, 8, 1)
    for config in (IntensityConfig(probability=0.0), IntensityConfig(**NEVER)):
        found = augment_intensity(jax.random.key(0), image, config=config)
        np.testing.assert_array_equal(found, image)


def test_vmap_is_each_slice_by_itself() -> None:
    images = draw_image(6, 16, 12, 1)
    keys = jax.random.split(jax.random.key(3), 6)
    batched = jax.jit(jax.vmap(intensity.augment_intensity))(keys, images)
    for key, image, expected in zip(keys, images, batched, strict=True):
        found = augment_intensity(key, image, config=intensity.DEFAULT_INTENSITY)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    half = intensity.augment_intensity(keys[0], images[0].astype(jax.numpy.bfloat16))
    assert half.dtype == jax.numpy.bfloat16


def test_every_field_out_of_its_range_is_listed() -> None:
    with pytest.raises(ValueError) as error:
        IntensityConfig(probability=2.0, gamma_power=(0.0, 1.0), contrast_scale=(2.0, 1.0))
    assert str(error.value) == (
        "IntensityConfig: probability is 2.0, expected 0 to 1; "
        "contrast_scale is (2.0, 1.0), expected (low, high) with low <= high; "
        "gamma_power is (0.0, 1.0), expected above 0"
    )


def test_intensity_is_scaled_about_the_mean_and_shifted() -> None:
    image = draw_image(6, 5, 1)
    keys = jax.random.split(jax.random.key(0), 200)
    changed = np.asarray(jax.vmap(intensity.change_intensity, (0, None))(keys, image))
    slopes = np.std(changed, axis=(1, 2, 3)) / np.std(image)
    shifts = (np.mean(changed, axis=(1, 2, 3)) - np.mean(image)) / np.ptp(image)
    expected = image.mean() + (image - image.mean()) * slopes[:, None, None, None]
    shifted = expected + (shifts * np.ptp(image))[:, None, None, None]
    np.testing.assert_allclose(changed, shifted, atol=1e-5)
    for found, low, high in ((slopes, 0.8, 1.2), (shifts, -0.1, 0.1)):
        assert low - 1e-5 <= found.min() < low + (high - low) / 20
        assert high - (high - low) / 20 < found.max() <= high + 1e-5
