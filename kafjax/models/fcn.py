"""FCN and KAF-FCN: the appendix's table 4.

FCN-8s (Long, Shelhamer and Darrell, CVPR 2015) with each VGG block replaced by two convolutions.
Images are [b, h, w, c] with h and w divisible by 16.

Our choices where the appendix is silent: batch norm and leaky ReLU after each convolution, as in
the UNet, so that the two differ only in their decoders; channels f, 2f, 4f, 8f, 16f; KAF layers
after the first four blocks, before pooling, as in KAF-UNet; no fully connected layers between the
fifth block and its scores; score layers with biases; and fixed bilinear upsampling, which Long et
al. partly learn from a bilinear start.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kafjax.models.layers import Conv, ConvBlock, max_pool
from kafjax.models.unet import Encoder, Encoding, apply_block


class FCNEncoder(Encoder):
    """The FCN's encoder: its centre is a fifth block, not widened, and its pooling.

    The centre is at 1/32 of the image's size, rounded up where 32 does not divide it.
    """

    def deepest(
        self, x: Float[Array, "b rows columns c"], *, train: bool
    ) -> Float[Array, "b (rows+1)//2 (columns+1)//2 {16*self.filters}"]:
        """Maps the pooled features at 1/16 of the image's size to 1/32."""
        block = ConvBlock(self.filters * 16, self.axis_name, self.dtype, self.norm, name="level_4")
        x = apply_block(block, x, train=train, remat=self.remat)
        return nn.max_pool(x, (2, 2), (2, 2), padding="SAME")


class FCNDecoder(nn.Module):
    """Scores of the blocks at 1/32, 1/16 and 1/8, each upsampled and added to the next.

    `axis_name`, `remat` and `norm` match other decoders' and have no effect here.
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
        del train

        def score(name: str, x: jax.Array) -> jax.Array:
            return Conv(self.num_classes, kernel_size=1, dtype=self.dtype, name=name)(x)

        x = score("score_32", encoding.center)
        for stride, level in ((16, 3), (8, 2)):
            finer = score(f"score_{stride}", max_pool(encoding.levels[level]))
            x = finer + _upsample(x, 2)[:, : finer.shape[1], : finer.shape[2]]
        return _upsample(x, 8)


def _upsample(x: jax.Array, factor: int) -> jax.Array:
    b, h, w, d = x.shape
    return jax.image.resize(x, (b, factor * h, factor * w, d), "bilinear")
