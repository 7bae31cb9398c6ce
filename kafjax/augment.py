"""Random mirror and spatial transforms of images, labels and keypoints, on the device.

One sample at a time, static shapes, no host round trip: `jax.vmap` over samples and keys, `jax.jit`
around all. Positions and keypoints are (row, col) in pixels of the same image, a pixel's centre at
its integer position; a mask marks the real keypoints.

All transforms map from the output to the input: T(q) is the position in the input at which output
pixel q is sampled. With c the image's centre, u the elastic displacement, R a rotation and s a
scale,

    T(q) = mirror(c + s R (q - c + u(q)))

so s < 1 magnifies and s > 1 shows zeros around a smaller image.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Real, Shaped

from kafjax.intensity import (
    IntensityConfig,
    augment_intensity,
    check_ranges,
    gaussian_filter,
    uniform,
)

KEYPOINT_MODES = ("index_map", "analytic")

# At the steepest u of the default ranges, 4 steps left 2 of 240,000 keypoints unsolved; 6, none.
_NEWTON_STEPS = 6
# A position counts as inverted if its error is below this many pixels.
_TOLERANCE = 0.01
# Bound on the determinant of q + u(q); below it, a pixel at p covers more than four at q.
_LEAST_DETERMINANT = 0.25

# (image, keypoints, mask) of one slice.
View = tuple[Float[Array, "h w c"], Int[Array, "k 2"], Bool[Array, " k"]]


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Ranges of the random transform; the defaults are the paper's. Ranges are (low, high)."""

    mirror_probability: float = 0.5  # of each axis independently
    spatial_probability: float = 0.67  # of displacement, rotation and scale, all three together
    elastic_sigma: tuple[float, float] = (14.0, 17.0)  # pixels, of the filter of the noise
    elastic_alpha: tuple[float, float] = (100.0, 350.0)  # factor on the filtered noise
    rotation: tuple[float, float] = (0.0, 2 * math.pi)  # radians about the centre
    magnify_probability: float = 0.5  # of a scale from magnify_scale, else from shrink_scale
    magnify_scale: tuple[float, float] = (0.7, 1.0)
    shrink_scale: tuple[float, float] = (1.0, 1.3)

    def __post_init__(self) -> None:
        """Raises ValueError that lists every field out of its range."""
        check_ranges(self)


DEFAULT_CONFIG = AugmentConfig()


class Transform(NamedTuple):
    """A drawn transform T of images of h x w pixels; see the formula in the module's docstring."""

    mirror: Bool[Array, "2"]  # mirror rows, mirror columns
    matrix: Float[Array, "2 2"]  # s R
    displacement: Float[Array, "h w 2"]  # u at the output pixels, (row, col) in pixels

    @property
    def shape(self) -> tuple[int, int]:
        """(h, w)."""
        height, width, _ = self.displacement.shape
        return height, width


def sample_transform(
    key: PRNGKeyArray, shape: tuple[int, int], *, config: AugmentConfig = DEFAULT_CONFIG
) -> Transform:
    """Draws a transform for images of the static `shape` (h, w)."""
    mirror_key, spatial_key, elastic_key, matrix_key = jax.random.split(key, 4)
    spatial = jax.random.bernoulli(spatial_key, config.spatial_probability)
    matrix = _scaled_rotation(matrix_key, config)
    displacement = elastic_displacement(elastic_key, shape, config=config)
    return Transform(
        mirror=jax.random.bernoulli(mirror_key, config.mirror_probability, (2,)),
        matrix=jnp.where(spatial, matrix, jnp.eye(2)),
        displacement=jnp.where(spatial, displacement, 0.0),
    )


def sampling_coordinates(transform: Transform) -> Float[Array, "h w 2"]:
    """T(q) for every output pixel q, (row, col) in the input."""
    centre = _centre(transform.shape)
    offset = _pixel_grid(transform.shape) - centre + transform.displacement
    return centre + _mirror(transform, _multiply(transform.matrix, offset))


def elastic_displacement(
    key: PRNGKeyArray, shape: tuple[int, int], *, config: AugmentConfig = DEFAULT_CONFIG
) -> Float[Array, "h w 2"]:
    """Draws a smooth displacement, (row, col) in pixels.

    Noise of U(-1, 1), Gaussian-filtered with sigma ~ U(elastic_sigma), times alpha ~
    U(elastic_alpha): a standard deviation of alpha / (sigma sqrt(12 pi)) per axis. At sigma 14 and
    alpha 350 that is 4.1 px, and 0.21 for the slopes.
    """
    noise_key, sigma_key, alpha_key = jax.random.split(key, 3)
    noise = jax.random.uniform(noise_key, (2, *shape), minval=-1.0, maxval=1.0)
    sigma = uniform(sigma_key, config.elastic_sigma)
    smooth = gaussian_filter(noise, sigma, max_sigma=config.elastic_sigma[1])
    return jnp.moveaxis(uniform(alpha_key, config.elastic_alpha) * smooth, 0, -1)


def warp_image(
    image: Float[Array, "h w c"], coordinates: Float[Array, "rows columns 2"]
) -> Float[Array, "rows columns c"]:
    """Samples an image bilinearly.

    As scipy.ndimage.map_coordinates(order=1, mode='constant'): any position outside [0, h - 1] x
    [0, w - 1] gives 0, even by less than a pixel. The border does not fade, and images and labels
    end at the same pixel.

    Args:
      image: to sample.
      coordinates: (row, col) in `image` of each pixel of the result.
    """
    height, width, _ = image.shape
    inside = _inside(coordinates, (height, width))[..., None]
    return jnp.where(inside, _interpolate(image, coordinates), 0).astype(image.dtype)


def warp_label(
    label: Shaped[Array, "h w c"], coordinates: Float[Array, "rows columns 2"]
) -> Shaped[Array, "rows columns c"]:
    """Samples a label of any dtype at the nearest pixel; 0 where `warp_image` has 0."""
    height, width, _ = label.shape
    row, col = jnp.moveaxis(_nearest_pixel(coordinates), -1, 0)
    sampled = jnp.asarray(label).at[row, col].get(mode="clip")
    return jnp.where(_inside(coordinates, (height, width))[..., None], sampled, 0)


def keypoints_from_index_map(
    index_map: Int[Array, "h w"], num_keypoints: int
) -> tuple[Int[Array, "k 2"], Bool[Array, " k"]]:
    """Reads keypoints from a map of their indices (appendix B).

    Args:
      index_map: at each pixel a keypoint's index or -1.
      num_keypoints: k.

    Returns:
      Keypoints, the mean (row, col) of each index's pixels truncated to integers, and their mask.
      A missing index is masked and placed at (0, 0).
    """
    height, width = index_map.shape
    # Integer sums do not depend on the order of additions. Negative indices are dropped.
    terms = jnp.pad(_pixel_grid((height, width)), ((0, 0), (0, 0), (0, 1)), constant_values=1)
    totals = jax.ops.segment_sum(terms.reshape(-1, 3), index_map.reshape(-1), num_keypoints)
    count = totals[:, 2:]
    return totals[:, :2] // jnp.maximum(count, 1), count[:, 0] > 0


def invert_transform(
    transform: Transform, positions: Real[Array, "k 2"]
) -> tuple[Float[Array, "k 2"], Bool[Array, " k"]]:
    """Finds the output positions q with T(q) = p.

    Mirror, rotation and scale are undone in closed form, which leaves q + u(q) = g, solved by
    Newton steps from q = g - u(g); u is bilinear between pixels and constant beyond the border.
    (Iterating q <- g - u(q) is slow or diverges: slopes of u reach 1.) Where the determinant of q +
    u(q) is small or negative, the map folds and q is not unique; the position is then masked.

    Args:
      transform: T.
      positions: p, (row, col) in the input.

    Returns:
      q, possibly outside the image, and whether it was found.
    """
    centre = _centre(transform.shape)
    goal = centre + _solve(transform.matrix, _mirror(transform, positions - centre))[0]
    displace = functools.partial(_interpolate, transform.displacement)
    slopes = jax.vmap(jax.jacfwd(displace))

    def newton_step(_: jax.Array, q: jax.Array) -> jax.Array:
        return q - _solve(jnp.eye(2) + slopes(q), q + displace(q) - goal)[0]

    q = jax.lax.fori_loop(0, _NEWTON_STEPS, newton_step, goal - displace(goal))
    error = q + displace(q) - goal
    _, determinant = _solve(jnp.eye(2) + slopes(q), error)
    # NaN compares false: a diverged q is masked too.
    return q, (jnp.abs(error).max(axis=-1) < _TOLERANCE) & (determinant > _LEAST_DETERMINANT)


def transfer_keypoints(
    keypoints: Int[Array, "k 2"],
    mask: Bool[Array, " k"],
    transform: Transform,
    *,
    mode: str = "index_map",
) -> tuple[Int[Array, "k 2"], Bool[Array, " k"]]:
    """Moves keypoints with the image that a transform warps.

    Args:
      keypoints: (row, col) in the input; those outside the image are masked.
      mask: true for real keypoints.
      transform: of images of the same h x w.
      mode: 'index_map' warps a map of the keypoints' indices (appendix B, third solution). Of
        several keypoints on one pixel only the last is kept, and where the image shrinks (s > 1)
        about 1 - 1/s^2 fall between the sampled pixels and are lost. 'analytic' inverts the
        transform (first solution) and rounds to the nearest pixel; it loses keypoints that leave
        the image and those that `invert_transform` masks.

    Returns:
      Keypoints, int32, in the output and their mask; masked ones are at (0, 0).

    Raises:
      ValueError: an unknown mode.
    """
    if mode not in KEYPOINT_MODES:
        raise ValueError(f"keypoint mode is {mode!r}, expected one of {', '.join(KEYPOINT_MODES)}")
    mask = mask & _inside(keypoints, transform.shape)
    if mode == "index_map":
        # Indices from 1, because outside pixels are 0; max lets a pixel's last keypoint win.
        numbers = jnp.where(mask, jnp.arange(1, mask.size + 1, dtype=jnp.int32), 0)
        index_map = jnp.zeros((*transform.shape, 1), jnp.int32)
        index_map = index_map.at[keypoints[:, 0], keypoints[:, 1], 0].max(numbers)
        warped = warp_label(index_map, sampling_coordinates(transform))
        return keypoints_from_index_map(warped[..., 0] - 1, mask.size)
    positions, found = invert_transform(transform, keypoints)
    pixels = _nearest_pixel(positions)
    kept = mask & found & _inside(pixels, transform.shape)
    return jnp.where(kept[:, None], pixels, 0), kept


def transfer_correspondence(
    correspondence: Int[Array, " k"], mask_1: Bool[Array, " k"], mask_2: Bool[Array, " n"]
) -> Int[Array, " k"]:
    """Unmatches pairs with a masked end; indices, and so all other pairs, do not change.

    Args:
      correspondence: for each keypoint of view 1 its partner in view 2, or -1.
      mask_1: of view 1, after its transform.
      mask_2: of view 2, after its own.
    """
    kept = (correspondence >= 0) & mask_1 & mask_2[jnp.maximum(correspondence, 0)]
    return jnp.where(kept, correspondence, -1).astype(jnp.int32)


def augment_view(
    key: PRNGKeyArray,
    image: Float[Array, "h w c"],
    keypoints: Int[Array, "k 2"],
    mask: Bool[Array, " k"],
    *,
    label: Shaped[Array, "h w d"] | None = None,
    mode: str = "index_map",
    config: AugmentConfig = DEFAULT_CONFIG,
    intensity: IntensityConfig | None = None,
) -> tuple[jax.Array, ...]:
    """Draws one transform and applies it to a slice, its keypoints and, if given, its label.

    Args:
      key: PRNG key.
      image: sampled bilinearly.
      keypoints: (row, col).
      mask: true for real keypoints.
      label: sampled at the nearest pixel.
      mode: how keypoints are moved, see `transfer_keypoints`.
      config: ranges of the transform.
      intensity: random intensity changes after the transform, if any, of each channel.

    Returns:
      (image, keypoints, mask) and, if given, the label: same shapes, 0 outside; keypoints int32,
      masked ones at (0, 0).

    Raises:
      ValueError: an unknown mode.
    """
    height, width, _ = image.shape
    transform = sample_transform(key, (height, width), config=config)
    coordinates = sampling_coordinates(transform)
    moved = transfer_keypoints(keypoints, mask, transform, mode=mode)
    warped = warp_image(image, coordinates)
    if intensity is not None:
        # A number that `sample_transform` does not use for its own keys.
        warped = augment_intensity(jax.random.fold_in(key, 100), warped, config=intensity)
    view = warped, *moved
    return view if label is None else (*view, warp_label(label, coordinates))


def augment_pair(
    key: PRNGKeyArray,
    view_1: View,
    view_2: View,
    correspondence: Int[Array, " k"],
    *,
    mode: str = "index_map",
    config: AugmentConfig = DEFAULT_CONFIG,
    intensity: IntensityConfig | None = None,
) -> tuple[View, View, Int[Array, " k"]]:
    """Transforms two neighbouring slices independently, and updates their correspondence.

    Args:
      key: PRNG key.
      view_1: (image, keypoints, mask), as for `augment_view`.
      view_2: the same for the neighbour.
      correspondence: index into the neighbour's keypoints or -1.
      mode, config, intensity: as for `augment_view`.

    Returns:
      The two views as `augment_view` returns them, and the correspondence.
    """
    key_1, key_2 = jax.random.split(key)
    one = functools.partial(augment_view, mode=mode, config=config, intensity=intensity)
    image_1, keypoints_1, mask_1 = one(key_1, *view_1)
    image_2, keypoints_2, mask_2 = one(key_2, *view_2)
    correspondence = transfer_correspondence(correspondence, mask_1, mask_2)
    return (image_1, keypoints_1, mask_1), (image_2, keypoints_2, mask_2), correspondence


def _scaled_rotation(key: jax.Array, config: AugmentConfig) -> jax.Array:
    """Draws s R, float32 [2, 2]."""
    angle_key, choice_key, magnify_key, shrink_key = jax.random.split(key, 4)
    angle = uniform(angle_key, config.rotation)
    magnified = uniform(magnify_key, config.magnify_scale)
    shrunk = uniform(shrink_key, config.shrink_scale)
    magnify = jax.random.bernoulli(choice_key, config.magnify_probability)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.where(magnify, magnified, shrunk) * jnp.array([[cos, -sin], [sin, cos]])


def _pixel_grid(shape: tuple[int, int]) -> jax.Array:
    """(row, col) of every pixel, int32 [h, w, 2]."""
    return jnp.stack(jnp.indices(shape, jnp.int32), axis=-1)


def _centre(shape: tuple[int, int]) -> jax.Array:
    return (jnp.array(shape, jnp.float32) - 1) / 2


def _mirror(transform: Transform, offset: jax.Array) -> jax.Array:
    """Mirrors positions [..., 2] about the origin; its own inverse."""
    return jnp.where(transform.mirror, -offset, offset)


def _multiply(matrix: jax.Array, vectors: jax.Array) -> jax.Array:
    """Products [..., 2] of matrices [..., 2, 2] and vectors [..., 2].

    Written out so that no matrix unit rounds positions to bfloat16 and the identity is exact.
    """
    return vectors[..., :1] * matrix[..., 0] + vectors[..., 1:] * matrix[..., 1]


def _solve(matrix: jax.Array, vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Solutions [..., 2] of systems [..., 2, 2], and the determinants [...]."""
    (a, b), (c, d) = jnp.moveaxis(matrix, (-2, -1), (0, 1))
    determinant = a * d - b * c
    adjugate = jnp.moveaxis(jnp.array([[d, -b], [-c, a]]), (0, 1), (-2, -1))
    return _multiply(adjugate, vectors) / determinant[..., None], determinant


def _interpolate(image: jax.Array, coordinates: jax.Array) -> jax.Array:
    """Bilinear samples [..., c] of an image [h, w, c] at [..., 2]; constant beyond its border."""
    position = [coordinates[..., 0], coordinates[..., 1]]
    sample = functools.partial(
        jax.scipy.ndimage.map_coordinates, coordinates=position, order=1, mode="nearest"
    )
    return jax.vmap(sample, in_axes=-1, out_axes=-1)(image)


def _inside(positions: jax.Array, shape: tuple[int, int]) -> jax.Array:
    return jnp.all((positions >= 0) & (positions <= jnp.array(shape) - 1), axis=-1)


def _nearest_pixel(positions: jax.Array) -> jax.Array:
    return jnp.floor(positions + 0.5).astype(jnp.int32)
