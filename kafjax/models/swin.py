"""Swin-UNet: a Swin Transformer (Liu et al., ICCV 2021) as the encoder of a UNet.

Images of swin_unet are [b, h, w, 1] with h and w divisible by 16.
`filters` f sets an embedding of 3f and heads of f channels, so f = 32 with 12 layers is Swin-T and
with 24 Swin-S; `num_attention_layers` is the number of transformer blocks (`stage_depths`).

Differences from the authors' paper: windows are 8 x 8 (7 x 7 in the paper), which divides the
tokens of 512 x 512 pixels at every stage; a map that windows do not divide is padded, and padding
is masked where theirs takes part; a map smaller than a window is one window; no drop path, because
networks here are deterministic functions of their inputs and runs are short. The decoder is ours:
the UNet's.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from kafjax.models.layers import ConvBlock, Linear, UpConv, max_pool, parameter_dtype
from kafjax.models.unet import Encoding, UNetDecoder, apply_block, check_size

PATCH = 4
HEADS = (3, 6, 12, 24)
MLP_RATIO = 4
SMALL_STDDEV = 0.02


def stage_depths(num_blocks: int) -> tuple[int, int, int, int]:
    """Blocks of the four stages: 2, 2, n - 6, 2, as in Swin-T (12) and Swin-S (24).

    With fewer than 8, first the first stage has no blocks, then the second, then the fourth.

    Raises:
      ValueError: not a positive even number; plain and shifted windows alternate.
    """
    if num_blocks < 2 or num_blocks % 2:
        raise ValueError(
            f"config.model.num_attention_layers is {num_blocks}, expected an even number from 2 "
            "on: plain and shifted windows take turns"
        )
    others = min(num_blocks // 2 - 1, 3)
    first, second, fourth = (2 if others >= rank else 0 for rank in (3, 2, 1))
    return first, second, num_blocks - 2 * others, fourth


class Tiling(NamedTuple):
    """Windows along one axis of a map of tokens.

    Attributes:
      size: of a window, in tokens.
      number: of windows; they cover the map and less than a window of padding at its end.
      shift: tokens by which the map is rolled towards its start before it is cut.
      groups: number of each token; tokens of a window attend to each other if theirs are equal.
        The last window holds tokens rolled from the other edge, and padding, each in its own group.
    """

    size: int
    number: int
    shift: int
    groups: Int[np.ndarray, "n size"]


def tile(length: int, window: int, *, shifted: bool) -> Tiling:
    """Cuts `length` tokens into windows of `window`, or of `length` if it is smaller.

    Shifted windows begin half a window later; a single window is not shifted.
    """
    size = min(window, length)
    number = -(-length // size)
    shift = size // 2 if shifted and number > 1 else 0
    place = np.roll(np.arange(number * size), -shift)
    groups = np.where(place < length, (place < shift).astype(np.int32), 2)
    return Tiling(size, number, shift, groups.reshape(number, size))


def cut_windows(
    x: Shaped[Array, "b h w c"], rows: Tiling, columns: Tiling
) -> Shaped[Array, "b n t c"]:
    """Cuts a map into n windows of t tokens each, row by row."""
    b, h, w, c = x.shape
    padding = (rows.number * rows.size - h, columns.number * columns.size - w)
    x = jnp.pad(x, ((0, 0), (0, padding[0]), (0, padding[1]), (0, 0)))
    x = jnp.roll(x, (-rows.shift, -columns.shift), axis=(1, 2))
    x = x.reshape(b, rows.number, rows.size, columns.number, columns.size, c)
    return x.swapaxes(2, 3).reshape(b, rows.number * columns.number, rows.size * columns.size, c)


def join_windows(
    windows: Shaped[Array, "b n t c"], rows: Tiling, columns: Tiling, shape: tuple[int, int]
) -> Shaped[Array, "b h w c"]:
    """Undoes `cut_windows`, to a map of `shape` (h, w)."""
    b, c = windows.shape[0], windows.shape[-1]
    x = windows.reshape(b, rows.number, columns.number, rows.size, columns.size, c)
    x = x.swapaxes(2, 3).reshape(b, rows.number * rows.size, columns.number * columns.size, c)
    x = jnp.roll(x, (rows.shift, columns.shift), axis=(1, 2))
    return x[:, : shape[0], : shape[1]]


def visible_tokens(rows: Tiling, columns: Tiling) -> Bool[Array, "n t t"] | None:
    """Marks which tokens of each window attend to which; None for all to all."""
    if not (rows.groups.any() or columns.groups.any()):
        return None
    groups = 3 * rows.groups[:, None, :, None] + columns.groups[None, :, None, :]
    flat = jnp.asarray(groups.reshape(rows.number * columns.number, rows.size * columns.size))
    return flat[:, :, None] == flat[:, None, :]


def offset_index(window: int, size: tuple[int, int]) -> Int[np.ndarray, "t t"]:
    """Rows, in a `window`'s bias table, of the offsets between a smaller one's tokens.

    The table's rows are the offsets query - key in (-window, window), column offsets fastest.
    """
    row, column = (np.arange(n)[:, None] - np.arange(n) + window - 1 for n in size)
    index = row[:, None, :, None] * (2 * window - 1) + column[None, :, None, :]
    return index.reshape(size[0] * size[1], -1)


class SmallLinear(nn.Module):
    """Linear map that starts with normal weights of standard deviation 0.02 and zero biases."""

    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... {self.features}"]:
        """Applies the map."""
        return nn.Dense(
            self.features,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=parameter_dtype(self.dtype),
            kernel_init=nn.initializers.normal(SMALL_STDDEV),
            name="small",
        )(x)


class LayerNorm(nn.Module):
    """Layer normalisation of the last axis, as PyTorch's: epsilon 1e-5."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        """Normalises x."""
        return nn.LayerNorm(
            epsilon=1e-5,
            dtype=self.dtype,
            param_dtype=parameter_dtype(self.dtype),
            use_fast_variance=False,
            name="layer",
        )(x)


class WindowAttention(nn.Module):
    """Multi-head self-attention within (shifted) windows, with relative position bias.

    Attributes:
      num_heads: of c / num_heads channels each.
      window: M; the bias has a number for each head and each of (2M - 1)^2 offsets.
      shifted: windows begin half a window later.
    """

    num_heads: int
    window: int
    shifted: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Applies the paper's equation 4 in each window."""
        _, h, w, c = x.shape
        rows, columns = (tile(length, self.window, shifted=self.shifted) for length in (h, w))
        windows = cut_windows(x, rows, columns)
        qkv = SmallLinear(3 * c, dtype=self.dtype, name="qkv")(windows)
        heads = qkv.reshape(*windows.shape[:3], 3, self.num_heads, c // self.num_heads)
        query, key, value = jnp.moveaxis(heads, 3, 0)

        wide = parameter_dtype(self.dtype)
        logits = jnp.einsum("bnthd,bnshd->bnhts", query, key, preferred_element_type=wide)
        logits = logits / query.shape[-1] ** 0.5 + self._bias((rows.size, columns.size))
        visible = visible_tokens(rows, columns)
        if visible is not None:
            logits = jnp.where(visible[:, None], logits, jnp.finfo(wide).min / 2)
        weights = jax.nn.softmax(logits, axis=-1).astype(self.dtype)
        message = jnp.einsum("bnhts,bnshd->bnthd", weights, value).reshape(windows.shape)
        message = SmallLinear(c, dtype=self.dtype, name="project")(message)
        return join_windows(message, rows, columns, (h, w))

    def _bias(self, size: tuple[int, int]) -> jax.Array:
        """[heads, t, t] for windows of `size`."""
        table = self.param(
            "position_bias",
            nn.initializers.normal(SMALL_STDDEV),
            ((2 * self.window - 1) ** 2, self.num_heads),
            parameter_dtype(self.dtype),
        )
        return jnp.moveaxis(table[offset_index(self.window, size)], -1, 0)


class Block(nn.Module):
    """A transformer block: windowed attention, then an MLP, each pre-normalised and residual."""

    num_heads: int
    window: int
    shifted: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Applies half of the paper's equation 3."""
        attention = WindowAttention(
            self.num_heads, self.window, self.shifted, self.dtype, name="attention"
        )
        x = x + attention(LayerNorm(self.dtype, name="norm_1")(x))
        y = LayerNorm(self.dtype, name="norm_2")(x)
        y = SmallLinear(MLP_RATIO * x.shape[-1], dtype=self.dtype, name="mlp_1")(y)
        y = nn.gelu(y, approximate=False)
        return x + SmallLinear(x.shape[-1], dtype=self.dtype, name="mlp_2")(y)


class _BlockPair(nn.Module):
    """A block of plain and one of shifted windows, with the signature that `nn.scan` requires."""

    num_heads: int
    window: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        for name, shifted in (("plain", False), ("shifted", True)):
            x = Block(self.num_heads, self.window, shifted, self.dtype, name=name)(x)
        return x, None


class Stage(nn.Module):
    """Blocks with alternating plain and shifted windows, compiled once: a leading axis of pairs."""

    num_blocks: int
    num_heads: int
    window: int
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Applies the blocks."""
        if not self.num_blocks:
            return x
        pairs = nn.scan(
            nn.remat(_BlockPair, prevent_cse=False) if self.remat else _BlockPair,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.num_blocks // 2,
        )
        return pairs(self.num_heads, self.window, self.dtype, name="pairs")(x, None)[0]


class PatchMerging(nn.Module):
    """Joins 2 x 2 tokens, normalises, and halves the channels; an odd size is padded by zeros."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b (h+1)//2 (w+1)//2 2*c"]:
        """Merges tokens."""
        b, h, w, c = x.shape
        x = jnp.pad(x, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)))
        x = x.reshape(b, (h + 1) // 2, 2, (w + 1) // 2, 2, c)
        # The authors' order of the four: columns are slower than rows.
        x = x.transpose(0, 1, 3, 4, 2, 5).reshape(b, (h + 1) // 2, (w + 1) // 2, 4 * c)
        x = LayerNorm(self.dtype, name="norm")(x)
        return SmallLinear(2 * c, use_bias=False, dtype=self.dtype, name="reduce")(x)


class SwinTransformer(nn.Module):
    """The four stages.

    Attributes:
      embedding: channels of the first stage's tokens; each later stage has twice as many.
      depths: blocks of each stage, even numbers.
      window: edge of a window, in tokens.
      remat: store only each block pair's output for the backward pass.
    """

    embedding: int = 96
    depths: tuple[int, int, int, int] = (2, 2, 6, 2)
    window: int = 7
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, image: Float[Array, "b h w c"]) -> tuple[Float[Array, "b _ _ _"], ...]:
        """Returns the stages' tokens, from [b, h / 4, w / 4, e] to [b, h / 32, w / 32, 8e].

        h and w are divisible by 4; later halves are rounded up.
        """
        b, h, w, c = image.shape
        patches = image.astype(self.dtype).reshape(b, h // PATCH, PATCH, w // PATCH, PATCH, c)
        patches = patches.swapaxes(2, 3).reshape(b, h // PATCH, w // PATCH, PATCH * PATCH * c)
        x = Linear(self.embedding, dtype=self.dtype, name="embed")(patches)
        x = LayerNorm(self.dtype, name="norm")(x)
        stages = []
        for i, (depth, heads) in enumerate(zip(self.depths, HEADS, strict=True)):
            if i:
                x = PatchMerging(self.dtype, name=f"merge_{i}")(x)
            stage = Stage(depth, heads, self.window, self.dtype, self.remat, name=f"stage_{i}")
            x = stage(x)
            stages.append(x)
        return tuple(stages)


class SwinEncoder(nn.Module):
    """A Swin Transformer without its classifier; keypoints are ignored.

    The encoding's levels are the image and the first three stages, at 1, 1/4, 1/8 and 1/16 of its
    size; its centre is the fourth stage, normalised, at 1/32 rounded up.

    Attributes:
      filters: f; tokens of the first stage have 3f channels.
      num_attention_layers: blocks of all stages together (`stage_depths`).
      axis_name: as other encoders'; has no effect, since there are no batch statistics.
      remat: as `SwinTransformer`'s.
      norm: as other encoders'; has no effect, since tokens have layer norm.
    """

    filters: int
    num_attention_layers: int = 12
    axis_name: str | None = None
    dtype: Any = jnp.float32
    remat: bool = False
    window: int = 8
    norm: str = "batch"

    @nn.compact
    def __call__(
        self,
        image: Float[Array, "b h w c"],
        keypoints: Int[Array, "b k 2"],
        mask: Bool[Array, "b k"],
        *,
        train: bool,
    ) -> Encoding:
        """Encodes images."""
        del keypoints, mask, train
        check_size(image)
        depths = stage_depths(self.num_attention_layers)
        transformer = SwinTransformer(
            3 * self.filters, depths, self.window, self.dtype, self.remat, name="transformer"
        )
        *stages, last = transformer(image)
        center = LayerNorm(self.dtype, name="norm")(last)
        return Encoding((image.astype(self.dtype), *stages), center, ())


class SwinUNetDecoder(nn.Module):
    """The UNet's decoder, one level deeper.

    Tokens resolve nothing finer than a patch, so the two finest levels are convolution blocks of
    the image, as in SwinUNETR (Hatamizadeh et al. 2022); the others are the stages', normalised.
    Blocks and norms belong to the decoder, because no pretraining loss would reach them.
    """

    num_classes: int
    axis_name: str | None = None
    dtype: Any = jnp.float32
    remat: bool = False
    norm: str = "batch"

    @nn.compact
    def __call__(
        self, encoding: Encoding, *, train: bool
    ) -> Float[Array, "b h w {self.num_classes}"]:
        """Returns logits."""

        def block(features: int, name: str, x: jax.Array) -> Any:
            made = ConvBlock(features, self.axis_name, self.dtype, self.norm, name=name)
            return apply_block(made, x, train=train, remat=self.remat)

        image, *stages = encoding.levels
        stage_0, stage_1, stage_2 = (
            LayerNorm(self.dtype, name=f"norm_{i}")(x) for i, x in enumerate(stages)
        )
        width = stage_0.shape[-1]
        full = block(width // 4, "skip_0", image)
        half = block(width // 2, "skip_1", max_pool(full))
        up = UpConv(stage_2.shape[-1], dtype=self.dtype, name="up_4")(encoding.center)
        up = up[:, : stage_2.shape[1], : stage_2.shape[2]]
        center = block(stage_2.shape[-1], "level_4", jnp.concatenate([up, stage_2], axis=-1))
        unet = UNetDecoder(
            self.num_classes, self.axis_name, self.dtype, self.remat, norm=self.norm, name="unet"
        )
        return unet(Encoding((full, half, stage_0, stage_1), center, ()), train=train)
