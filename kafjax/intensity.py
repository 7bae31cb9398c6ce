"""Random changes of a slice's intensities, on the device, and the Gaussian filter.

One sample at a time, static shapes: `jax.vmap` over samples and keys, `jax.jit` around all. Images
are [h, w, c] float; in a run their unit is the standard deviation of their volume, and 0 its mean.

The changes are those that a strong baseline draws (Isensee et al., nnU-Net, Nature Methods 2021,
supplementary note 4), in its order: noise, blur, brightness, contrast, low resolution, gamma.
Brightness is an added constant here: a factor is what contrast is already.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from kafjax.errors import UserError


def check_ranges(config: Any) -> None:
    """Raises ValueError that lists every field out of its range of a dataclass of ranges.

    A field is a probability by its name's end, or a pair (low, high); one that ends in `_sigma`,
    `_scale` or `_power` must be above 0.
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
    """How often and how much intensities change; ranges are (low, high)."""

    probability: float = 1.0  # of changing a slice at all; then each change by its own
    noise_probability: float = 0.15
    noise_deviation: tuple[float, float] = (0.0, 0.3)  # standard deviation, in the image's unit
    blur_probability: float = 0.2
    blur_sigma: tuple[float, float] = (0.5, 1.0)  # pixels
    brightness_probability: float = 0.15
    brightness_shift: tuple[float, float] = (-0.3, 0.3)  # added, in the image's unit
    contrast_probability: float = 0.15
    contrast_scale: tuple[float, float] = (0.75, 1.25)  # factor about the slice's mean
    resolution_probability: float = 0.25
    resolution_scale: tuple[float, float] = (0.5, 1.0)  # pixels of an edge that are left, a share
    gamma_probability: float = 0.3
    gamma_power: tuple[float, float] = (0.7, 1.5)  # of intensities between the slice's extremes

    def __post_init__(self) -> None:
        """Raises ValueError that lists every field out of its range."""
        check_ranges(self)


DEFAULT_INTENSITY = IntensityConfig()


def augment_intensity(
    key: jax.Array, image: jax.Array, *, config: IntensityConfig = DEFAULT_INTENSITY
) -> jax.Array:
    """Changes a slice's intensities at random, each change with its own probability.

    Args:
      key: PRNG key.
      image: float [h, w, c].
      config: probabilities and ranges.

    Returns:
      [h, w, c] of the image's dtype.
    """
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


def blur(image: jax.Array, sigma: jax.Array, *, max_sigma: float) -> jax.Array:
    """Filters a slice [h, w, c] by a Gaussian of `sigma` pixels; at borders by what is inside.

    `sigma` may be traced, `max_sigma` is its static bound.
    """
    channels = jnp.moveaxis(image, -1, 0)
    smooth, total = (
        gaussian_filter(x, sigma, max_sigma=max_sigma)
        for x in (channels, jnp.ones((1, *image.shape[:2]), channels.dtype))
    )
    return jnp.moveaxis(smooth / total, 0, -1)


def change_contrast(image: jax.Array, scale: jax.Array) -> jax.Array:
    """Multiplies differences from the slice's mean by `scale`, cut at the slice's old extremes."""
    mean = jnp.mean(image)
    return jnp.clip(mean + scale * (image - mean), jnp.min(image), jnp.max(image))


def change_gamma(image: jax.Array, power: jax.Array) -> jax.Array:
    """Raises intensities, as shares of the way from minimum to maximum, to a power.

    Mean and standard deviation of the slice stay. A slice of one intensity stays as it is.
    """
    low, extent = jnp.min(image), jnp.max(image) - jnp.min(image)
    curved = ((image - low) / jnp.where(extent > 0, extent, 1)) ** power
    deviation = jnp.std(curved)
    scale = jnp.std(image) / jnp.where(deviation > 0, deviation, 1)
    return jnp.mean(image) + scale * (curved - jnp.mean(curved))


def lower_resolution(image: jax.Array, scale: jax.Array) -> jax.Array:
    """Shows a slice as if it had fewer pixels: the nearest are taken, and lines drawn between.

    An edge of n pixels becomes max(1, floor(n `scale`)) of the same length, and n again.

    Args:
      image: float [h, w, c].
      scale: share of an edge's pixels that is left, in (0, 1]; may be traced.
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
    key: jax.Array,
    image: jax.Array,
    *,
    contrast: tuple[float, float] = (0.8, 1.2),
    brightness: tuple[float, float] = (-0.1, 0.1),
) -> jax.Array:
    """Scales a slice about its mean by U(contrast), and adds U(brightness) times its range.

    Args:
      key: PRNG key.
      image: float [h, w, c].
      contrast: (low, high).
      brightness: (low, high), of the difference of the slice's maximum and minimum.
    """
    contrast_key, brightness_key = jax.random.split(key)
    mean, extent = jnp.mean(image), jnp.max(image) - jnp.min(image)
    changed = mean + (image - mean) * uniform(contrast_key, contrast)
    return (changed + uniform(brightness_key, brightness) * extent).astype(image.dtype)


def gaussian_filter(images: jax.Array, sigma: jax.Array, *, max_sigma: float) -> jax.Array:
    """Filters float32 [n, h, w] over h and w as scipy.ndimage.gaussian_filter(mode='constant').

    `sigma` is in pixels and may be traced, `max_sigma` is its static bound.
    """
    _, height, width = images.shape
    # Products with banded matrices: fast everywhere, and the kernel's radius may be traced.
    down = _gaussian_matrix(height, sigma, max_sigma)
    across = _gaussian_matrix(width, sigma, max_sigma)
    return jnp.einsum("ij,njk,kl->nil", down, images, across, precision="highest")


def _nearest(coarse: jax.Array, count: jax.Array, length: int) -> jax.Array:
    """The pixels of `length` that are nearest to the centres of `count` coarse ones."""
    centre = (jnp.clip(coarse, 0, count - 1) + 0.5) * length / count
    return jnp.floor(centre).astype(jnp.int32)


def uniform(key: jax.Array, bounds: tuple[float, float]) -> jax.Array:
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
    """Of the image or, as often, of its negative, so that bright and dark parts both spread."""
    power_key, sign_key = jax.random.split(key)
    sign = jnp.where(jax.random.bernoulli(sign_key), 1.0, -1.0)
    return sign * change_gamma(sign * image, uniform(power_key, config.gamma_power))


def _gaussian_matrix(size: int, sigma: jax.Array, max_sigma: float) -> jax.Array:
    """Symmetric banded [size, size] matrix whose rows hold the kernel, cut at the borders."""

    def kernel(offsets: jax.Array) -> jax.Array:
        within = jnp.abs(offsets) <= jnp.floor(4 * sigma + 0.5)  # scipy's radius
        return jnp.where(within, jnp.exp(-0.5 * (offsets / sigma) ** 2), 0.0)

    radius = math.floor(4 * max_sigma + 0.5)
    total = kernel(jnp.arange(-radius, radius + 1)).sum()
    return kernel(jnp.arange(size)[:, None] - jnp.arange(size)) / total
