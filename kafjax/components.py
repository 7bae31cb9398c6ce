"""Connected components of predicted classes, on the device."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Integer

_NEIGHBOURS = ((1, 1), (1, -1), (2, 1), (2, -1))  # (axis, shift): pixels that share an edge


def label_components(classes: Integer[Array, "b h w"]) -> Int[Array, "b h w"]:
    """Numbers the connected components of equal class of each slice.

    Pixels are connected if they share an edge, as in `scipy.ndimage.label`. A pixel takes the
    smallest number among its neighbours of the same class, then that of the pixel so numbered,
    which is of the same component; the steps stop when nothing changes, so the result is exact.
    The second rule (pointer jumping; Shiloach and Vishkin, J. Algorithms 1982) makes their number
    about the logarithm of a component's diameter.

    Args:
      classes: class numbers; the background's pixels form components too.

    Returns:
      For each pixel the index, row by row, of the first pixel of its component.
    """
    b, h, w = classes.shape
    joined = [jnp.roll(classes, shift, axis) == classes for axis, shift in _NEIGHBOURS]
    rows, cols = jnp.indices((h, w))
    ends = {(1, 1): rows > 0, (1, -1): rows < h - 1, (2, 1): cols > 0, (2, -1): cols < w - 1}
    joined = [same & ends[n] for n, same in zip(_NEIGHBOURS, joined, strict=True)]

    def spread(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        before, _ = state
        number = before
        for (axis, shift), same in zip(_NEIGHBOURS, joined, strict=True):
            number = jnp.where(same, jnp.minimum(number, jnp.roll(before, shift, axis)), number)
        flat = number.reshape(b, -1)
        number = jnp.take_along_axis(flat, flat, axis=1).reshape(b, h, w)
        return number, jnp.any(number != before)

    own = jnp.broadcast_to(jnp.arange(h * w, dtype=jnp.int32).reshape(h, w), (b, h, w))
    number, _ = jax.lax.while_loop(lambda state: state[1], spread, (own, jnp.array(True)))
    return number


def largest_components(
    classes: Integer[Array, "b h w"], num_classes: int
) -> Integer[Array, "b h w"]:
    """Only the largest component of each foreground class of each slice; the rest is background.

    Of equally large components, the one whose first pixel, row by row, comes first stays.

    Args:
      classes: class numbers.
      num_classes: d, with the background.
    """
    b, h, w = classes.shape
    number = label_components(classes).reshape(b, -1)
    sizes = jax.vmap(lambda n: jnp.zeros(h * w, jnp.int32).at[n].add(1))(number)
    size = jnp.take_along_axis(sizes, number, axis=1)
    flat = classes.reshape(b, -1)
    kept = jnp.zeros_like(flat)
    for i in range(1, num_classes):
        of_class = flat == i
        largest = jnp.max(jnp.where(of_class, size, 0), axis=1, keepdims=True)
        first = jnp.where(of_class & (size == largest), number, h * w).min(axis=1, keepdims=True)
        kept = jnp.where(of_class & (number == first), i, kept)
    return kept.reshape(b, h, w)
