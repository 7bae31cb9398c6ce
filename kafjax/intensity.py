"""Random changes of a slice's intensities, on the device, and the Gaussian filter.

One sample at a time, static shapes: `jax.vmap` over samples and keys, `jax.jit` around all. Images
are floats; in a run their unit is their volume's standard deviation, and 0 is its mean.

The changes follow nnU-Net (Isensee et al., Nature Methods 2021, supplementary note 4), in its
order: noise, blur, brightness, contrast, low resolution, gamma. Brightness adds a constant here,
because contrast already is a factor.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, ScalarLike

from kafjax.errors import UserError


def check_ranges(config: Any) -> None:
    """Raises ValueError that lists every out-of-range field of a dataclass of ranges.

    A field whose name ends in `probability` is one; others are pairs (low, high), which must be
    above 0 if the name ends in `_sigma`, `_scale` or `_power`.
    """
    faults = []
    for name, value in dataclasses.asdict(config).items():
        if name.endswith("probability"):
            if not 0 <= value <= 1:
                faults.append(f"{name} is {value}, expected 0 to 1")
        elif value[0] > value[1]:
            faults.append(f"{name} is {value}, expected (low, high) with low <= high")
        elif name.endswith(("_sigma", "_scale", "_power")) and value[0] <= 0:
            faults.append(f"{name} is {value}, expected above 0")
    if faults:
        raise UserError(f"{type(config).__name__}: " + "; ".join(faults))


@dataclasses.dataclass(frozen=True)
class IntensityConfig:
    """Probabilities and ranges of intensity changes; ranges are (low, high)."""

    probability: float = 1.0  # of changing a slice at all; each change then has its own
    noise_probability: float = 0.15
    noise_deviation: tuple[float, float] = (0.0, 0.3)  # standard deviation, in the image's unit
    blur_probability: float = 0.2
    blur_sigma: tuple[float, float] = (0.5, 1.0)  # pixels
    brightness_probability: float = 0.15
    brightness_shift: tuple[float, float] = (-0.3, 0.3)  # added, in the image's unit
    contrast_probability: float = 0.15
    contrast_scale: tuple[float, float] = (0.75, 1.25)  # factor about the slice's mean
    resolution_probability: float = 0.25
    resolution_scale: tuple[float, float] = (0.5, 1.0)  # remaining fraction of an edge's pixels
    gamma_probability: float = 0.3
    gamma_power: tuple[float, float] = (0.7, 1.5)  # of intensities between the slice's extremes

    def __post_init__(self) -> None:
        """Raises ValueError that lists every field out of its range."""
        check_ranges(self)


DEFAULT_INTENSITY = IntensityConfig()


def augment_intensity(
    key: PRNGKeyArray,
    image: Float[Array, "h w c"],
    *,
    config: IntensityConfig = DEFAULT_INTENSITY,
) -> Float[Array, "h w c"]:
    """Changes a slice's intensities at random, each change with its own probability.

    Each of several channels changes independently of the others.
    """
    return _by_channel(functools.partial(_change, config=config), key, image)


def _by_channel(
    change: Callable[[jax.Array, jax.Array], jax.Array], key: jax.Array, image: jax.Array
) -> jax.Array:
    """A random change of [h, w, 1], applied to each channel with a key of its own."""
    num_channels = image.shape[-1]
    if num_channels == 1:
        return change(key, image)
    channels = jnp.moveaxis(image, -1, 0)[..., None]
    changed = jax.vmap(change)(jax.random.split(key, num_channels), channels)
    return jnp.moveaxis(changed[..., 0], 0, -1)


def _change(key: jax.Array, image: jax.Array, *, config: IntensityConfig) -> jax.Array:
    any_key, *keys = jax.random.split(key, 7)
    changes = (
        (config.noise_probability, functools.partial(_noise, config=config)),
        (config.blur_probability, functools.partial(_blur, config=config)),
        (config.brightness_probability, functools.partial(_brightness, config=config)),
        (config.contrast_probability, functools.partial(_contrast, config=config)),
        (config.resolution_probability, functools.partial(_resolution, config=config)),
        (config.gamma_probability, functools.partial(_gamma, config=config)),
    )
    changed = image
    for change_key, (probability, change) in zip(keys, changes, strict=True):
        draw_key, own_key = jax.random.split(change_key)
        drawn = jax.random.bernoulli(draw_key, probability)
        changed = jnp.where(drawn, change(own_key, changed), changed)
    drawn = jax.random.bernoulli(any_key, config.probability)
    return jnp.where(drawn, changed, image).astype(image.dtype)


def blur(
    image: Float[Array, "h w c"], sigma: ScalarLike, *, max_sigma: float
) -> Float[Array, "h w c"]:
    """Filters a slice by a Gaussian of `sigma` pixels, normalised at the borders.

    `sigma` may be traced, `max_sigma` is its static bound.
    """
    channels = jnp.moveaxis(image, -1, 0)
    smooth, total = (
        gaussian_filter(x, sigma, max_sigma=max_sigma)
        for x in (channels, jnp.ones((1, *image.shape[:2]), channels.dtype))
    )
    return jnp.moveaxis(smooth / total, 0, -1)


def change_contrast(image: Float[Array, "h w c"], scale: ScalarLike) -> Float[Array, "h w c"]:
    """Multiplies differences from the slice's mean by `scale`, clipped to its original range."""
    mean = jnp.mean(image)
    return jnp.clip(mean + scale * (image - mean), jnp.min(image), jnp.max(image))


def change_gamma(image: Float[Array, "h w c"], power: ScalarLike) -> Float[Array, "h w c"]:
    """Raises intensities, scaled from minimum to maximum to [0, 1], to a power.

    The slice keeps its mean and standard deviation. A constant slice does not change.
    """
    low, extent = jnp.min(image), jnp.max(image) - jnp.min(image)
    curved = ((image - low) / jnp.where(extent > 0, extent, 1)) ** power
    deviation = jnp.std(curved)
    scale = jnp.std(image) / jnp.where(deviation > 0, deviation, 1)
    return jnp.mean(image) + scale * (curved - jnp.mean(curved))


def lower_resolution(image: Float[Array, "h w c"], scale: ScalarLike) -> Float[Array, "h w c"]:
    """Simulates fewer pixels: nearest-neighbour downsampling, then linear upsampling.

    An edge of n pixels becomes max(1, floor(n `scale`)) of the same length, and n again.

    Args:
      image: to change.
      scale: remaining fraction of an edge's pixels, in (0, 1]; may be traced.
    """
    for axis in (0, 1):
        length = image.shape[axis]
        count = jnp.maximum(jnp.floor(length * scale), 1)
        # Pixels' centres in units of the coarse pixels.
        place = (jnp.arange(length) + 0.5) * count / length - 0.5
        below = jnp.floor(place)
        near, far = (jnp.take(image, _nearest(i, count, length), axis) for i in (below, below + 1))
        share = jnp.expand_dims(place - below, (1 - axis, 2))
        image = near + share * (far - near)
    return image


def change_intensity(
    key: PRNGKeyArray,
    image: Float[Array, "h w c"],
    *,
    contrast: tuple[float, float] = (0.8, 1.2),
    brightness: tuple[float, float] = (-0.1, 0.1),
) -> Float[Array, "h w c"]:
    """Scales a slice about its mean by U(contrast), and adds U(brightness) times its range.

    Each of several channels changes independently of the others.

    Args:
      key: PRNG key.
      image: to change.
      contrast: (low, high).
      brightness: (low, high), in units of the slice's range, maximum minus minimum.
    """

    def change(key: jax.Array, image: jax.Array) -> jax.Array:
        contrast_key, brightness_key = jax.random.split(key)
        mean, extent = jnp.mean(image), jnp.max(image) - jnp.min(image)
        changed = mean + (image - mean) * uniform(contrast_key, contrast)
        return (changed + uniform(brightness_key, brightness) * extent).astype(image.dtype)

    return _by_channel(change, key, image)


def gaussian_filter(
    images: Float[Array, "n h w"], sigma: ScalarLike, *, max_sigma: float
) -> Float[Array, "n h w"]:
    """Filters images over h and w as scipy.ndimage.gaussian_filter(mode='constant').

    `sigma` is in pixels and may be traced, `max_sigma` is its static bound.
    """
    _, height, width = images.shape
    # Products with banded matrices: fast everywhere, and the kernel's radius may be traced.
    down = _gaussian_matrix(height, sigma, max_sigma)
    across = _gaussian_matrix(width, sigma, max_sigma)
    return jnp.einsum("ij,njk,kl->nil", down, images, across, precision="highest")


def _nearest(coarse: jax.Array, count: jax.Array, length: int) -> jax.Array:
    """The pixels of `length` nearest to the centres of `count` coarse ones."""
    centre = (jnp.clip(coarse, 0, count - 1) + 0.5) * length / count
    return jnp.floor(centre).astype(jnp.int32)


def uniform(key: PRNGKeyArray, bounds: tuple[float, float]) -> Float[Array, ""]:
    """Draws a number between two bounds."""
    return jax.random.uniform(key, minval=bounds[0], maxval=bounds[1])


def _noise(key: jax.Array, image: jax.Array, *, config: IntensityConfig) -> jax.Array:
    noise_key, deviation_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, image.shape, image.dtype)
    return image + uniform(deviation_key, config.noise_deviation) * noise


def _blur(key: jax.Array, image: jax.Array, *, config: IntensityConfig) -> jax.Array:
    return blur(image, uniform(key, config.blur_sigma), max_sigma=config.blur_sigma[1])


def _brightness(key: jax.Array, image: jax.Array, *, config: IntensityConfig) -> jax.Array:
    return image + uniform(key, config.brightness_shift)


def _contrast(key: jax.Array, image: jax.Array, *, config: IntensityConfig) -> jax.Array:
    return change_contrast(image, uniform(key, config.contrast_scale))


def _resolution(key: jax.Array, image: jax.Array, *, config: IntensityConfig) -> jax.Array:
    return lower_resolution(image, uniform(key, config.resolution_scale))


def _gamma(key: jax.Array, image: jax.Array, *, config: IntensityConfig) -> jax.Array:
    """Gamma of the image or, equally often, its negative, to spread bright and dark parts."""
    power_key, sign_key = jax.random.split(key)
    sign = jnp.where(jax.random.bernoulli(sign_key), 1.0, -1.0)
    return sign * change_gamma(sign * image, uniform(power_key, config.gamma_power))


def _gaussian_matrix(size: int, sigma: ScalarLike, max_sigma: float) -> jax.Array:
    """Symmetric banded [size, size] matrix whose rows hold the kernel, cut at the borders."""

    def kernel(offsets: jax.Array) -> jax.Array:
        within = jnp.abs(offsets) <= jnp.floor(4 * sigma + 0.5)  # scipy's radius
        return jnp.where(within, jnp.exp(-0.5 * (offsets / sigma) ** 2), 0.0)

    radius = math.floor(4 * max_sigma + 0.5)
    total = kernel(jnp.arange(-radius, radius + 1)).sum()
    return kernel(jnp.arange(size)[:, None] - jnp.arange(size)) / total
