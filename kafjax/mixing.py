"""Pastes a box of one slice into another, with labels and keypoints, on the device.

Bai et al., "Bidirectional Copy-Paste for Semi-Supervised Medical Image Segmentation" (CVPR 2023).
One sample at a time: `jax.vmap` over pairs. Keypoints are (row, col) in pixels; a mask marks the
real ones.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray


def draw_box(key: PRNGKeyArray, shape: tuple[int, int], *, share: float) -> Bool[Array, "h w"]:
    """Marks a box at a random place, `share` of each edge long.

    Args:
      key: PRNG key.
      shape: (h, w) of the slices.
      share: in (0, 1]; 2/3 in the paper.
    """
    inside = []
    for axis_key, length in zip(jax.random.split(key), shape, strict=True):
        edge = max(1, round(share * length))
        first = jax.random.randint(axis_key, (), 0, length - edge + 1)
        place = jnp.arange(length)
        inside.append((place >= first) & (place < first + edge))
    return inside[0][:, None] & inside[1]


def paste_keypoints(
    inner: Int[Array, "k 2"],
    inner_mask: Bool[Array, " k"],
    outer: Int[Array, "k 2"],
    outer_mask: Bool[Array, " k"],
    box: Bool[Array, "h w"],
) -> tuple[Int[Array, "k 2"], Bool[Array, " k"]]:
    """The keypoints of a mixed slice: each goes with its pixel.

    The k slots suffice for most: a slice and its counterpart, in which inner and outer change
    places, together show at most 2k. Where they do not, each slice's last are kept, in turn:
    the strongest in datasets whose keypoints are ordered by strength. The order among slots means
    nothing to the networks.

    Args:
      inner: of the slice shown in the box.
      inner_mask: its real keypoints.
      outer: of the slice shown around the box.
      outer_mask: its real keypoints.
      box: true where the first is shown.

    Returns:
      Keypoints and their mask; masked ones are at (0, 0).
    """
    seen = [
        inner_mask & box[inner[:, 0], inner[:, 1]],
        outer_mask & ~box[outer[:, 0], outer[:, 1]],
    ]
    num_slots = inner.shape[0]
    # The number of a slice's seen keypoints from here on: 1 for its last.
    from_last = jnp.concatenate([jnp.cumsum(x[::-1])[::-1] for x in seen])
    mask = jnp.concatenate(seen)
    chosen = jnp.argsort(jnp.where(mask, from_last, 2 * num_slots))[:num_slots]
    kept = mask[chosen]
    return jnp.where(kept[:, None], jnp.concatenate([inner, outer])[chosen], 0), kept
