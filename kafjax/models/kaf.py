"""The keypoint-augmented fusion (KAF) layer: docs/method.md section 4.

Feature maps are [b, h, w, c]; keypoints [b, k, 2] are (row, col) in pixels of that map, masks
[b, k] say which are real. Where several real keypoints share a pixel, the last in order fills it.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kafjax.models.attention import KEYPOINT_FEATURES, PositionalEncoder, SelfAttention
from kafjax.models.layers import Conv, Linear, he_normal, normalize, parameter_dtype

FUSION_FEATURES = 64


def gather_at_keypoints(x: jax.Array, keypoints: jax.Array) -> jax.Array:
    """Features of a map [b, h, w, c] at keypoints [b, k, 2]: [b, k, c]."""
    return jax.vmap(lambda m, p: m[p[:, 0], p[:, 1]])(x, keypoints)


def last_at_pixel(keypoints: jax.Array, mask: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Says which real keypoints are the last, in order, of those at their pixel: bool [b, k]."""
    h, w = shape
    order = jnp.arange(keypoints.shape[1], dtype=jnp.int32)

    def one(points: jax.Array, real: jax.Array) -> jax.Array:
        pixel = jnp.where(real, points[:, 0] * w + points[:, 1], h * w)
        last = jnp.full(h * w + 1, -1, jnp.int32).at[pixel].max(order)
        return real & (last[pixel] == order)

    return jax.vmap(one)(keypoints, mask)


def scatter_values(features: jax.Array, winner: jax.Array, mask: jax.Array) -> jax.Array:
    """What each keypoint adds to the map: its features if it wins its pixel, else 0.

    In the backward pass every real keypoint receives its pixel's gradient, losers included, as the
    release trains (docs/method.md 4.4).
    """
    loser = features - jax.lax.stop_gradient(features)
    values = jnp.where(winner[..., None], features, loser)
    return jnp.where(mask[..., None], values, 0)


def sparse_conv3x3(
    values: jax.Array, keypoints: jax.Array, kernel: jax.Array, shape: tuple[int, int]
) -> jax.Array:
    """3x3 convolution, zero padding, of a map that is zero but at keypoints.

    Nine products a keypoint, added at its neighbours, in place of the dense map: 0.6 GFLOP for
    512 keypoints, whatever the image's size (77 for the dense form at 512 x 512).

    Args:
      values: [b, k, c], what each keypoint adds to its pixel; 0 for padding.
      keypoints: int [b, k, 2].
      kernel: [3, 3, c, d].
      shape: (h, w) of the map.

    Returns:
      [b, h, w, d].
    """
    h, w = shape
    # Pixel p feeds the output at p + 1 - (i, j) through kernel[i, j]; one pixel of border takes
    # what falls outside.
    flipped = kernel[::-1, ::-1]
    products = jnp.einsum("bkc,ijcd->bkijd", values, flipped)
    window = jnp.arange(3)

    def one(points: jax.Array, updates: jax.Array) -> jax.Array:
        rows = points[:, 0, None, None] + window[:, None]
        columns = points[:, 1, None, None] + window[None, :]
        border = jnp.zeros((h + 2, w + 2, updates.shape[-1]), updates.dtype)
        return border.at[rows, columns].add(updates)[1:-1, 1:-1]

    return jax.vmap(one)(keypoints, products)


class KeypointConv(nn.Module):
    """Scatter of keypoint features to their pixels and a 3x3 convolution of that map."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, keypoints: jax.Array, mask: jax.Array, shape: tuple[int, int]
    ) -> jax.Array:
        """Maps keypoint features [b, k, c] to [b, h, w, features]."""
        param_dtype = parameter_dtype(self.dtype)
        kernel_shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", he_normal, kernel_shape, param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), param_dtype)
        winner = last_at_pixel(keypoints, mask, shape)
        values = scatter_values(x.astype(self.dtype), winner, mask)
        y = sparse_conv3x3(values, keypoints, kernel.astype(self.dtype), shape)
        return y + bias.astype(self.dtype)


class KAF(nn.Module):
    """Keypoint-augmented fusion: long-range context among keypoints, brought back to the map.

    Attributes:
      num_attention_layers: 2 L of the paper.
      num_heads: of each attention layer.
      axis_name: the mapped axis whose devices share batch statistics.
      dtype: of the computation.
      norm: of the context's map; keypoints are normalised over the batch whatever it is.
    """

    num_attention_layers: int = 16
    num_heads: int = 4
    axis_name: str | None = None
    dtype: Any = jnp.float32
    norm: str = "batch"

    @nn.compact
    def __call__(
        self, x: jax.Array, keypoints: jax.Array, mask: jax.Array, *, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Fuses keypoint context into a feature map.

        Args:
          x: [b, h, w, c].
          keypoints: int [b, k, 2], in pixels of x; any place inside for padding.
          mask: bool [b, k].
          train: normalise by the batch's statistics and update the running ones.

        Returns:
          The map [b, h, w, 2c]: x and c channels of keypoint context; and the keypoints' features
          [b, k, 256], meaningless at padding.
        """
        common = {"axis_name": self.axis_name, "dtype": self.dtype}
        keypoints = keypoints.astype(jnp.int32)  # a pixel's number overflows int16
        shape = (x.shape[1], x.shape[2])
        points = Linear(KEYPOINT_FEATURES, dtype=self.dtype, name="project")(
            gather_at_keypoints(x, keypoints)
        )
        encoder = PositionalEncoder(**common, name="position")
        points = points + encoder(keypoints, mask, shape, train=train)
        attention = SelfAttention(
            self.num_attention_layers, self.num_heads, **common, name="attention"
        )
        points = attention(points, mask, train=train)

        context = KeypointConv(FUSION_FEATURES, dtype=self.dtype, name="scatter")(
            points, keypoints, mask, shape
        )
        context = nn.relu(normalize(context, self.norm, train=train, name="norm", **common))
        context = Conv(x.shape[-1], dtype=self.dtype, name="fuse")(context)
        return jnp.concatenate([x, context], axis=-1), points
