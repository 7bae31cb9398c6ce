"""The 3x3 convolution of feature maps, in forms that suit CPUs.

XLA's gradient of the kernel is a convolution whose window is the whole map. Accelerators have
routines for it; on CPU it reaches a fifth of the forward convolution's speed and takes two thirds
of a training step. On CPU the gradient is matrix products instead (`kernel_gradient_by_products`),
except for small maps or large batches, where it gains nothing.

Few channels fill few lanes of a CPU's registers. There, neighbouring pixels of a row are taken as
one pixel with the channels of both (`conv3x3_by_blocks`): the arithmetic grows by a third, its
speed by more.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_LAYOUT = ("NHWC", "HWIO", "NHWC")
# Numbers in a block of rows with its shifted copies, which must fit a core's cache.
_BLOCK_SIZE = 2**20
# Up to so many output channels, pixels are taken in pairs; up to so many inputs, in fours.
_FEW_OUTPUTS = 24
_FEW_INPUTS = 4
# From so many output channels on, one product is faster than three without a copy.
_MANY_OUTPUTS = 64


@jax.custom_vjp
def conv3x3(x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c d"]) -> Float[Array, "b h w d"]:
    """Cross-correlation with zero padding that keeps the size; x and kernel have the same type."""
    pixels = _pixels_per_block(x.shape[2], *kernel.shape[2:])
    if pixels == 1:
        return native_conv3x3(x, kernel)
    return jax.lax.platform_dependent(
        x, kernel, cpu=partial(conv3x3_by_blocks, pixels=pixels), default=native_conv3x3
    )


def native_conv3x3(
    x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c d"]
) -> Float[Array, "b h w d"]:
    """As `conv3x3`, with XLA's own gradients."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=_LAYOUT)


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return conv3x3(x, kernel), (x, kernel)


def _backward(
    residuals: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    of_x = conv3x3(gradient, kernel[::-1, ::-1].swapaxes(2, 3))
    if _products_are_faster(x.shape, gradient.shape[-1]):
        of_kernel = jax.lax.platform_dependent(
            x, gradient, cpu=kernel_gradient_by_products, default=native_kernel_gradient
        )
    else:
        of_kernel = native_kernel_gradient(x, gradient)
    return of_x, of_kernel


conv3x3.defvjp(_forward, _backward)


def _products_are_faster(shape: tuple[int, ...], d: int) -> bool:
    """Whether `kernel_gradient_by_products` gains on CPU, as measured for maps [b, h, w, c]."""
    b, h, w, c = shape
    return h * w >= 16 * 16 and c > 1 and (b < 16 or d <= _FEW_OUTPUTS)


def _pixels_per_block(w: int, c: int, d: int) -> int:
    """How many neighbouring pixels to take as one, for the speed of a CPU."""
    wanted = 4 if c <= _FEW_INPUTS else 2 if d <= _FEW_OUTPUTS else 1
    return wanted if w % wanted == 0 else 1


def conv3x3_by_blocks(
    x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c d"], *, pixels: int
) -> Float[Array, "b h w d"]:
    """The same convolution over blocks of `pixels` neighbours in a row, at least 2.

    With one more column on the left, a block's outputs need this block and the next: columns -1 to
    `pixels`. So the kernel is 3 x 2 blocks, of `pixels` times as many channels; shifted by a column
    for each output, it leaves out what that output does not see.
    """
    b, h, w, c = x.shape
    d = kernel.shape[-1]
    x = jnp.pad(x, ((0, 0), (0, 0), (1, pixels - 1), (0, 0)))
    x = x.reshape(b, h, w // pixels + 1, pixels * c)
    kernel = jnp.pad(kernel, ((0, 0), (pixels - 1, 2 * pixels - 3), (0, 0), (0, 0)))
    starts = range(pixels - 1, -1, -1)
    kernel = jnp.stack([kernel[:, start : start + 2 * pixels] for start in starts], axis=3)
    kernel = kernel.reshape(3, 2, pixels * c, pixels * d)
    padding = ((1, 1), (0, 0))
    y = jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=_LAYOUT)
    return y.reshape(b, h, w, d)


def native_kernel_gradient(
    x: Float[Array, "b h w c"], gradient: Float[Array, "b h w d"]
) -> Float[Array, "3 3 c d"]:
    """XLA's gradient of the kernel."""
    shape = (3, 3, x.shape[-1], gradient.shape[-1])
    kernel = jax.ShapeDtypeStruct(shape, x.dtype)
    return jax.linear_transpose(lambda kernel: native_conv3x3(x, kernel), kernel)(gradient)[0]


def kernel_gradient_by_products(
    x: Float[Array, "b h w c"], gradient: Float[Array, "b h w d"]
) -> Float[Array, "3 3 c d"]:
    """The same gradient by matrix products.

    Entry (i, j) is the sum over pixels of x shifted by j - 1 columns times the gradient shifted by
    1 - i rows. So for each i, three copies of x times rows of the gradient give three entries. Of
    few channels, a row of the product is two neighbouring pixels, and the four columns they see.
    Blocks of rows are processed one after the other to keep the copies in the cache.
    """
    b, h, w, c = x.shape
    d = gradient.shape[-1]
    pixels = 2 if d <= _FEW_OUTPUTS and w % 2 == 0 else 1
    columns = pixels + 2
    # A block is also several times larger than its product, so that adding products is cheap.
    size = max(_BLOCK_SIZE, 4 * 9 * c * d)
    rows = _largest_divisor(h, size // (b * w * 3 * (c + d)))
    bordered = jnp.pad(gradient, ((0, 0), (1, 1), (0, 0), (0, 0)))

    def add_block(block: jax.Array, total: jax.Array) -> jax.Array:
        start = block * rows
        part = jax.lax.dynamic_slice_in_dim(x, start, rows, axis=1)
        part = jnp.pad(part, ((0, 0), (0, 0), (1, 1), (0, 0)))
        part = jnp.concatenate(
            [part[:, :, j : j + w - pixels + 1 : pixels] for j in range(columns)], axis=-1
        )
        # Transposed here: inside the product, the transposition costs a fifth of its speed.
        part = jax.lax.optimization_barrier(part.reshape(-1, columns * c).T)
        of_part = jax.lax.dynamic_slice_in_dim(bordered, start, rows + 2, axis=1)
        shifted = [of_part[:, 2 - i : 2 - i + rows].reshape(-1, pixels * d) for i in range(3)]
        if d >= _MANY_OUTPUTS:
            shifted = [jnp.concatenate(shifted, axis=-1)]
        products = [jnp.dot(part, copy, preferred_element_type=total.dtype) for copy in shifted]
        return total + jnp.concatenate(products, axis=-1)

    zeros = jnp.zeros((columns * c, 3 * pixels * d), jnp.promote_types(x.dtype, jnp.float32))
    total = jax.lax.fori_loop(0, h // rows, add_block, zeros)
    total = total.reshape(columns, c, 3, pixels, d)
    of_kernel = sum(total[q : q + 3, :, :, q] for q in range(pixels))
    return of_kernel.transpose(2, 0, 1, 3).astype(x.dtype)


def _largest_divisor(n: int, bound: int) -> int:
    """The largest divisor of n that is not above `bound`, at least 1."""
    return next(divisor for divisor in range(max(min(n, bound), 1), 0, -1) if n % divisor == 0)
