"""The keypoint-augmented fusion (KAF) layer: docs/method.md section 4.

Keypoints are (row, col) in pixels of the feature map, masks mark the real ones. If several real
keypoints share a pixel, the last in order fills it.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from kafjax.models.attention import KEYPOINT_FEATURES, PositionalEncoder, SelfAttention
from kafjax.models.layers import Conv, Linear, he_normal, normalize, parameter_dtype

FUSION_FEATURES = 64


def gather_at_keypoints(
    x: Shaped[Array, "b h w c"], keypoints: Int[Array, "b k 2"]
) -> Shaped[Array, "b k c"]:
    """Features of a map at keypoints."""
    return jnp.asarray(x)[_samples(keypoints), keypoints[..., 0], keypoints[..., 1]]


def last_at_pixel(
    keypoints: Int[Array, "b k 2"], mask: Bool[Array, "b k"], shape: tuple[int, int]
) -> Bool[Array, "b k"]:
    """Marks the real keypoints that are the last, in order, at their pixel."""
    h, w = shape
    b, k = mask.shape
    order = jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32), (b, k))
    pixel = jnp.where(mask, keypoints[..., 0] * w + keypoints[..., 1], h * w)
    place = _samples(keypoints), pixel
    last = jnp.full((b, h * w + 1), -1, jnp.int32).at[place].max(order)
    return mask & (last[place] == order)


def scatter_values(
    features: Float[Array, "b k c"], winner: Bool[Array, "b k"], mask: Bool[Array, "b k"]
) -> Float[Array, "b k c"]:
    """Each keypoint's contribution to the map: its features if it wins its pixel, else 0.

    In the backward pass every real keypoint receives its pixel's gradient, including losers, as in
    the release's training (docs/method.md 4.4).
    """
    loser = features - jax.lax.stop_gradient(features)
    values = jnp.where(winner[..., None], features, loser)
    return jnp.where(mask[..., None], values, 0)


def sparse_conv3x3(
    values: Float[Array, "b k c"],
    keypoints: Int[Array, "b k 2"],
    kernel: Float[Array, "3 3 c d"],
    shape: tuple[int, int],
) -> Float[Array, "b h w d"]:
    """3x3 convolution with zero padding of a map that is zero except at keypoints.

    Nine products per keypoint, added at its neighbours, replace the dense map: 0.6 GFLOP for 512
    keypoints at any image size (77 for the dense form at 512 x 512).

    Args:
      values: contribution of each keypoint to its pixel; 0 for padding.
      keypoints: (row, col) in the map.
      kernel: of the convolution.
      shape: (h, w) of the map.
    """
    h, w = shape
    # Pixel p feeds the output at p + 1 - (i, j) through kernel[i, j]; a border of one pixel
    # collects what falls outside.
    flipped = kernel[::-1, ::-1]
    products = jnp.einsum("bkc,ijcd->bkijd", values, flipped)
    window = jnp.arange(3)
    samples = _samples(keypoints)[..., None, None]
    rows = keypoints[..., 0, None, None] + window[:, None]
    columns = keypoints[..., 1, None, None] + window
    border = jnp.zeros((values.shape[0], h + 2, w + 2, kernel.shape[-1]), products.dtype)
    return border.at[samples, rows, columns].add(products)[:, 1:-1, 1:-1]


def _samples(keypoints: jax.Array) -> jax.Array:
    """The number of each keypoint's sample in its batch, [b, 1].

    An index of its own, where `jax.vmap` would make batched gathers and scatters: XLA compiles both
    to the same, and ONNX has only this form.
    """
    return jnp.arange(keypoints.shape[0], dtype=jnp.int32)[:, None]


class KeypointConv(nn.Module):
    """Scatter of keypoint features to their pixels and a 3x3 convolution of that map."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b k c"],
        keypoints: Int[Array, "b k 2"],
        mask: Bool[Array, "b k"],
        shape: tuple[int, int],
    ) -> Float[Array, "b h w {self.features}"]:
        """Maps keypoint features to a feature map of `shape` (h, w)."""
        param_dtype = parameter_dtype(self.dtype)
        kernel_shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", he_normal, kernel_shape, param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), param_dtype)
        winner = last_at_pixel(keypoints, mask, shape)
        values = scatter_values(x.astype(self.dtype), winner, mask)
        y = sparse_conv3x3(values, keypoints, kernel.astype(self.dtype), shape)
        return y + bias.astype(self.dtype)


class KAF(nn.Module):
    """Keypoint-augmented fusion: scatters long-range context among keypoints into the map.

    Attributes:
      num_attention_layers: 2 L of the paper.
      num_heads: of each attention layer.
      axis_name: the mapped axis whose devices share batch statistics.
      dtype: of the computation.
      norm: of the context map; keypoints are always normalised over the batch.
    """

    num_attention_layers: int = 16
    num_heads: int = 4
    axis_name: str | None = None
    dtype: Any = jnp.float32
    norm: str = "batch"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        keypoints: Int[Array, "b k 2"],
        mask: Bool[Array, "b k"],
        *,
        train: bool,
    ) -> tuple[Float[Array, "b h w 2*c"], Float[Array, "b k 256"]]:
        """Fuses keypoint context into a feature map.

        Args:
          x: feature map.
          keypoints: in pixels of x; any place inside for padding.
          mask: true for real keypoints.
          train: normalise by the batch's statistics and update the running ones.

        Returns:
          The map, x and c channels of keypoint context; and the keypoints' features, meaningless at
          padding.
        """
        common = {"axis_name": self.axis_name, "dtype": self.dtype}
        keypoints = keypoints.astype(jnp.int32)  # a pixel's flat index overflows int16
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
