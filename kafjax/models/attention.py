"""Attention among keypoints; masks mark the real ones.

After Sarlin et al., CVPR 2020, section 3.1, with the numbers of docs/method.md section 4. No padded
keypoint is attended to or enters a statistic; outputs at padding are finite and must not be used.
The residual stream stays float32 where layers compute in bfloat16.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kafjax.models.layers import BatchNorm, Linear, parameter_dtype

KEYPOINT_FEATURES = 256
POSITION_MLP_FEATURES = (32, 64, 128, 256)
# Queries per block: without blocks, memory grows with the square of the keypoints.
QUERY_BLOCK = 256
# Minimum real keypoints for batch statistics, over all slices of a batch: with two or three,
# gradients through the norms of the positional code alone reach a thousand times the loss's.
FEWEST_KEYPOINTS = 16


def normalize_keypoints(
    keypoints: Int[Array, "b k 2"], shape: tuple[int, int], dtype: Any
) -> Float[Array, "b k 2"]:
    """Maps (row, col) pixels of an image of `shape` (h, w) to about [-0.7, 0.7]."""
    center = jnp.asarray(shape, dtype) / 2
    return (keypoints.astype(dtype) - center) / (0.7 * max(shape))


def masked_attention(
    query: Float[Array, "b k heads c"],
    key: Float[Array, "b s heads c"],
    value: Float[Array, "b s heads c"],
    mask: Bool[Array, "b s"],
) -> Float[Array, "b k heads c"]:
    """Scaled dot-product attention that ignores padded keys.

    `jax.nn.dot_product_attention` computes its softmax in float32 even for float64 inputs, which is
    too coarse for comparing gradients to the last digit.

    Args:
      query: of k keypoints.
      key: of s keypoints.
      value: of s keypoints.
      mask: true for real keys. Without any, the result is 0.

    Returns:
      The messages in the query's type; the softmax is float32 or wider.
    """
    wide = jnp.promote_types(query.dtype, jnp.float32)
    logits = jnp.einsum("bkhc,bshc->bhks", query, key, preferred_element_type=wide)
    logits = logits / query.shape[-1] ** 0.5
    real = mask[:, None, None, :]
    logits = jnp.where(real, logits, jnp.finfo(wide).min / 2)
    # With padding only, the softmax is uniform and would leak the padding's values.
    weights = jnp.where(real, jax.nn.softmax(logits, axis=-1), 0).astype(value.dtype)
    return jnp.einsum("bhks,bshc->bkhc", weights, value)


def blocked_attention(
    query: Float[Array, "b k heads c"],
    key: Float[Array, "b s heads c"],
    value: Float[Array, "b s heads c"],
    mask: Bool[Array, "b s"],
    *,
    block: int = QUERY_BLOCK,
) -> Float[Array, "b k heads c"]:
    """`masked_attention`, at most `block` queries at a time: memory grows with k, not with k * s.

    The backward pass recomputes each block's weights. Arguments and result are those of
    `masked_attention`. `jax.nn.dot_product_attention` has a fused form only on CUDA in half
    precision, where masks become [k, s] biases again.
    """
    b, k, heads, c = query.shape
    if k <= block:
        return masked_attention(query, key, value, mask)
    count = -(-k // block)
    size = -(-k // count)
    padded = jnp.pad(query, ((0, 0), (0, count * size - k), (0, 0), (0, 0)))
    blocks = jnp.moveaxis(padded.reshape(b, count, size, heads, c), 1, 0)

    def attend(queries: jax.Array) -> jax.Array:
        return masked_attention(queries, key, value, mask)

    message = jax.lax.map(jax.checkpoint(attend, prevent_cse=False), blocks)
    return jnp.moveaxis(message, 0, 1).reshape(b, count * size, heads, c)[:, :k]


class KeypointMLP(nn.Module):
    """Linear maps of each keypoint's features, with masked batch norm and ReLU between them."""

    hidden: tuple[int, ...]
    features: int
    axis_name: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b k c"], mask: Bool[Array, "b k"], *, train: bool
    ) -> Float[Array, "b k {self.features}"]:
        """Applies the MLP to each keypoint."""
        for i, features in enumerate(self.hidden, start=1):
            x = Linear(features, dtype=self.dtype, name=f"linear_{i}")(x)
            norm = BatchNorm(
                self.axis_name, dtype=self.dtype, fewest=FEWEST_KEYPOINTS, name=f"norm_{i}"
            )
            x = nn.relu(norm(x, train=train, mask=mask))
        return Linear(self.features, dtype=self.dtype, name=f"linear_{len(self.hidden) + 1}")(x)


class PositionalEncoder(nn.Module):
    """Positional code of keypoints: an MLP of their normalised positions (docs/method.md 4.2).

    Computes in float32 or wider: bfloat16 would round positions to more than a pixel.
    """

    axis_name: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        keypoints: Int[Array, "b k 2"],
        mask: Bool[Array, "b k"],
        shape: tuple[int, int],
        *,
        train: bool,
    ) -> Float[Array, "b k 256"]:
        """Encodes keypoints in pixels of an image of `shape` (h, w)."""
        wide = parameter_dtype(self.dtype)
        x = normalize_keypoints(keypoints, shape, wide)
        mlp = KeypointMLP(
            POSITION_MLP_FEATURES, KEYPOINT_FEATURES, self.axis_name, wide, name="mlp"
        )
        return mlp(x, mask, train=train)


class AttentionLayer(nn.Module):
    """One residual layer of multi-head attention and MLP (docs/method.md 4.3).

    Queries come from `x`, keys and values from `source`, which is `x` for self-attention.
    """

    train: bool
    num_heads: int = 4
    axis_name: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b k c"],
        mask: Bool[Array, "b k"],
        source: Float[Array, "b s c"],
        source_mask: Bool[Array, "b s"],
    ) -> Float[Array, "b k c"]:
        """Updates x by a message from the source."""
        features = x.shape[-1]
        heads = (self.num_heads, features // self.num_heads)

        def project(name: str, values: jax.Array) -> jax.Array:
            y = Linear(features, dtype=self.dtype, name=name)(values)
            return y.reshape(*y.shape[:2], *heads)

        message = blocked_attention(
            project("query", x), project("key", source), project("value", source), source_mask
        )
        message = Linear(features, dtype=self.dtype, name="merge")(message.reshape(x.shape))
        mlp = KeypointMLP((2 * features,), features, self.axis_name, self.dtype, name="mlp")
        update = mlp(jnp.concatenate([x, message], axis=-1), mask, train=self.train)
        return x + update


class _SelfAttentionBody(nn.Module):
    """`AttentionLayer` with the signature that `nn.scan` requires."""

    train: bool
    num_heads: int
    axis_name: str | None
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        layer = AttentionLayer(self.train, self.num_heads, self.axis_name, self.dtype, name="layer")
        return layer(x, mask, x, mask), None


class SelfAttention(nn.Module):
    """A stack of self-attention layers, compiled once: parameters have a leading layer axis.

    The backward pass recomputes the layers' activations, which costs no measurable time and saves
    their memory.
    """

    num_layers: int
    num_heads: int = 4
    axis_name: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b k c"], mask: Bool[Array, "b k"], *, train: bool
    ) -> Float[Array, "b k c"]:
        """Updates each keypoint's features."""
        stack = nn.scan(
            nn.remat(_SelfAttentionBody, prevent_cse=False),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.num_layers,
        )
        layers = stack(train, self.num_heads, self.axis_name, self.dtype, name="layers")
        return layers(x, mask)[0]
