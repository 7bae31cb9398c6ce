"""The 3x3 convolution of feature maps, in forms that suit CPUs.

XLA's gradient of the kernel is a convolution whose window is the whole map. Accelerators have
routines for it; on CPU it reaches a fifth of the forward convolution's speed and takes two thirds
of a training step. On CPU the gradient is a matrix product instead (`kernel_gradient_by_products`),
except for small maps or large batches, where it gains nothing.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_LAYOUT = ("NHWC", "HWIO", "NHWC")
# Numbers in a block of rows with its shifted copies, which must fit a core's cache.
_BLOCK_SIZE = 2**19


@jax.custom_vjp
def conv3x3(x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c d"]) -> Float[Array, "b h w d"]:
    """Cross-correlation with zero padding that keeps the size; x and kernel have the same type."""
    return native_conv3x3(x, kernel)


def native_conv3x3(
    x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c d"]
) -> Float[Array, "b h w d"]:
    """As `conv3x3`, with XLA's own gradients."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=_LAYOUT)


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return native_conv3x3(x, kernel), (x, kernel)


def _backward(
    residuals: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    of_x = native_conv3x3(gradient, kernel[::-1, ::-1].swapaxes(2, 3))
    if _products_are_faster(x.shape):
        of_kernel = jax.lax.platform_dependent(
            x, gradient, cpu=kernel_gradient_by_products, default=native_kernel_gradient
        )
    else:
        of_kernel = native_kernel_gradient(x, gradient)
    return of_x, of_kernel


conv3x3.defvjp(_forward, _backward)


def _products_are_faster(shape: tuple[int, ...]) -> bool:
    """Whether `kernel_gradient_by_products` gains on CPU, as measured for maps [b, h, w, c]."""
    b, h, w, c = shape
    return h * w >= 16 * 16 and b < 16 and c > 1


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
    1 - i rows, so one product of three copies of x with three of the gradient gives all nine.
    Blocks of rows are processed one after the other to keep the copies in the cache.
    """
    b, h, w, c = x.shape
    d = gradient.shape[-1]
    # A block is also several times larger than its product, so that adding products is cheap.
    size = max(_BLOCK_SIZE, 4 * 9 * c * d)
    rows = _largest_divisor(h, size // (b * w * 3 * (c + d)))
    bordered = jnp.pad(gradient, ((0, 0), (1, 1), (0, 0), (0, 0)))

    def add_block(block: jax.Array, total: jax.Array) -> jax.Array:
        start = block * rows
        part = jax.lax.dynamic_slice_in_dim(x, start, rows, axis=1)
        part = jnp.pad(part, ((0, 0), (0, 0), (1, 1), (0, 0)))
        part = jnp.concatenate([part[:, :, j : j + w] for j in range(3)], axis=-1)
        of_part = jax.lax.dynamic_slice_in_dim(bordered, start, rows + 2, axis=1)
        of_part = jnp.concatenate([of_part[:, 2 - i : 2 - i + rows] for i in range(3)], axis=-1)
        # Transposed here: inside the product, the transposition costs a fifth of its speed.
        part = jax.lax.optimization_barrier(part.reshape(-1, 3 * c).T)
        product = jnp.dot(part, of_part.reshape(-1, 3 * d), preferred_element_type=total.dtype)
        return total + product

    zeros = jnp.zeros((3 * c, 3 * d), jnp.promote_types(x.dtype, jnp.float32))
    total = jax.lax.fori_loop(0, h // rows, add_block, zeros)
    return total.reshape(3, c, 3, d).transpose(2, 0, 1, 3).astype(x.dtype)


def _largest_divisor(n: int, bound: int) -> int:
    """The largest divisor of n that is not above `bound`, at least 1."""
    return next(divisor for divisor in range(max(min(n, bound), 1), 0, -1) if n % divisor == 0)
