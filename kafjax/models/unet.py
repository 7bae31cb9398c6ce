"""UNet, UNet (c2) and KAF-UNet: docs/method.md section 5 and the appendix's table 1.

One encoder, whose blocks' outputs are widened in one of three ways: not at all, by a copy, or by a
KAF layer. Images are [b, h, w, c] with h and w divisible by 16.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kafjax.models.kaf import KAF
from kafjax.models.layers import Conv, ConvBlock, UpConv, max_pool

NUM_LEVELS = 4
WIDENINGS = ("none", "copy", "kaf")


def check_size(image: Float[Array, "b h w c"]) -> None:
    """Raises ValueError unless height and width can be halved four times."""
    h, w = image.shape[1:3]
    if h % 2**NUM_LEVELS or w % 2**NUM_LEVELS:
        raise ValueError(f"image is {h} x {w} pixels, expected both divisible by {2**NUM_LEVELS}")


class Encoding(NamedTuple):
    """The output of an encoder: features of its levels, finest first.

    Attributes:
      levels: the widened block outputs, [b, h / 2^l, w / 2^l, c_l].
      center: the deepest features, [b, h / 16, w / 16, c].
      points: the keypoints' features at each level with a KAF layer.
    """

    levels: tuple[Float[Array, "b _ _ _"], ...]
    center: Float[Array, "b _ _ c"]
    points: tuple[Float[Array, "b k 256"], ...]


def apply_block(block: nn.Module, *inputs: jax.Array, train: bool, remat: bool) -> Any:
    """Applies a block; with `remat`, the backward pass recomputes its activations."""

    def call(block: Any, *inputs: jax.Array) -> Any:
        return block(*inputs, train=train)

    return (nn.remat(call) if remat else call)(block, *inputs)


class WidenedBlock(nn.Module):
    """A convolution block followed by its widening at one level.

    Attributes:
      features: c; the output has c channels, or 2c when widened.
      widening: 'none', 'copy' (UNet (c2)) or 'kaf'.
      level: how often the image has been halved; keypoints are divided by 2^level.
      num_attention_layers: of the KAF layer.
      norm: of maps, one of `kafjax.models.layers.NORMS`.
    """

    features: int
    widening: str
    level: int
    num_attention_layers: int = 16
    axis_name: str | None = None
    dtype: Any = jnp.float32
    norm: str = "batch"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w _"],
        keypoints: Int[Array, "b k 2"],
        mask: Bool[Array, "b k"],
        *,
        train: bool,
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b k 256"] | None]:
        """Returns the widened features and the keypoints' features, if any."""
        common = {"axis_name": self.axis_name, "dtype": self.dtype, "norm": self.norm}
        x = ConvBlock(self.features, **common, name="block")(x, train=train)
        if self.widening == "copy":
            return jnp.concatenate([x, x], axis=-1), None
        if self.widening == "kaf":
            kaf = KAF(self.num_attention_layers, **common, name="kaf")
            return kaf(x, keypoints >> self.level, mask, train=train)
        return x, None


class Encoder(nn.Module):
    """Four widened blocks, each followed by pooling, and the backbone's deepest features.

    Attributes:
      filters: f, the channels of the first block.
      widening: 'none', 'copy' or 'kaf'.
      remat: store only each block's output for the backward pass: less memory, more time on
        accelerators. No gain on CPU, where XLA merges the recomputation.
      norm: of maps, one of `kafjax.models.layers.NORMS`.
    """

    filters: int
    widening: str = "none"
    num_attention_layers: int = 16
    axis_name: str | None = None
    dtype: Any = jnp.float32
    remat: bool = False
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
        """Encodes images with keypoints in their pixels."""
        check_size(image)
        x, levels, points = image.astype(self.dtype), [], []
        for level in range(NUM_LEVELS):
            block = WidenedBlock(
                self.filters * 2**level,
                self.widening,
                level,
                self.num_attention_layers,
                self.axis_name,
                self.dtype,
                self.norm,
                name=f"level_{level}",
            )
            x, level_points = apply_block(block, x, keypoints, mask, train=train, remat=self.remat)
            levels.append(x)
            points += [] if level_points is None else [level_points]
            x = max_pool(x)
        return Encoding(tuple(levels), self.deepest(x, train=train), tuple(points))

    def deepest(
        self, x: Float[Array, "b rows columns c"], *, train: bool
    ) -> Float[Array, "b _ _ d"]:
        """The encoding's centre, computed from the fourth block's pooled features."""
        raise NotImplementedError  # each backbone has its own


class UNetEncoder(Encoder):
    """The UNet's encoder: its centre is two convolutions without normalisation."""

    def deepest(
        self, x: Float[Array, "b rows columns c"], *, train: bool
    ) -> Float[Array, "b rows columns d"]:
        """Applies two convolutions, which keep the size of the pooled features."""
        features = self.filters * 16 * (1 if self.widening == "none" else 2)
        for i in (1, 2):
            x = nn.relu(Conv(features, dtype=self.dtype, name=f"center_{i}")(x))
        return x


class UNetDecoder(nn.Module):
    """From the centre back to the image's size, and to logits.

    Attributes:
      num_classes: d.
      remat: as the encoder's.
      num_blocks: number of blocks, coarsest first. With fewer than four, the output is not logits
        but the last block's features [b, h / 2^n, w / 2^n, c], n = 4 - num_blocks.
      norm: as the encoder's.
    """

    num_classes: int
    axis_name: str | None = None
    dtype: Any = jnp.float32
    remat: bool = False
    num_blocks: int = NUM_LEVELS
    norm: str = "batch"

    @nn.compact
    def __call__(self, encoding: Encoding, *, train: bool) -> Float[Array, "b h w d"]:
        """Returns logits, or features."""
        x = encoding.center
        for level in reversed(range(NUM_LEVELS - self.num_blocks, NUM_LEVELS)):
            features = x.shape[-1] // 2
            x = UpConv(features, dtype=self.dtype, name=f"up_{level}")(x)
            x = jnp.concatenate([x, encoding.levels[level]], axis=-1)
            block = ConvBlock(
                features, self.axis_name, self.dtype, self.norm, name=f"level_{level}"
            )
            x = apply_block(block, x, train=train, remat=self.remat)
        if self.num_blocks < NUM_LEVELS:
            return x
        head = Conv(self.num_classes, kernel_size=1, use_bias=False, dtype=self.dtype, name="head")
        return head(x)
