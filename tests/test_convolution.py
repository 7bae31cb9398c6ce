"""The 3x3 convolution's forms for CPUs against XLA's, in every type and transformation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kafjax.models import convolution
from kafjax.models.convolution import (
    conv3x3,
    conv3x3_by_blocks,
    kernel_gradient_by_products,
    native_conv3x3,
    native_kernel_gradient,
)

TOLERANCE = {"float64": 1e-12, "float32": 2e-5, "bfloat16": 2e-2}


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def close(found: Any, expected: Any, dtype: str) -> None:
    """Equal to rounding of the largest entry."""
    assert found.dtype == expected.dtype == dtype
    found, expected = (np.asarray(a, np.float64) for a in (found, expected))
    np.testing.assert_allclose(found, expected, atol=TOLERANCE[dtype] * np.abs(expected).max())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("shape", "features"),
    [
        ((2, 6, 5, 3), 4),
        ((2, 6, 8, 3), 4),  # pixels in pairs
        ((1, 1, 1, 2), 1),
        ((1, 22, 64, 40), 28),  # three products
        ((1, 22, 128, 160), 96),  # one, in blocks of rows
    ],
)
def test_products_give_xlas_gradient(shape: tuple[int, ...], features: int, dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray(draw(*shape), dtype)
        gradient = jnp.asarray(draw(*shape[:3], features, seed=1), dtype)
        found = jax.jit(kernel_gradient_by_products)(x, gradient)
        wide = jnp.float32 if dtype == "bfloat16" else dtype
        expected = jax.jit(native_kernel_gradient)(x.astype(wide), gradient.astype(wide))
        close(found, expected.astype(dtype), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("pixels", [2, 4])
def test_blocks_of_pixels_give_the_native_convolution(pixels: int, dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        x, kernel = draw(2, 5, 8, 3), draw(3, 3, 3, 4, seed=1)
        x, kernel = jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)
        found = jax.jit(lambda *a: conv3x3_by_blocks(*a, pixels=pixels))(x, kernel)
        wide = jnp.float32 if dtype == "bfloat16" else dtype
        expected = jax.jit(native_conv3x3)(x.astype(wide), kernel.astype(wide))
        close(found, expected.astype(dtype), dtype)


@pytest.fixture
def by_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU's form for every map, also those that are too small to gain."""
    monkeypatch.setattr(convolution, "_products_are_faster", lambda shape, d: True)


def gradients(conv: Any, x: Any, kernel: Any) -> Any:
    return jax.grad(lambda *a: jnp.sum(jnp.sin(conv(*a))), argnums=(0, 1))(x, kernel)


@pytest.mark.usefixtures("by_products")
@pytest.mark.parametrize("transformation", ["jit", "vmap", "scan", "remat"])
def test_transformations_find_the_native_gradients(transformation: str) -> None:
    x, kernel = jnp.asarray(draw(3, 2, 4, 6, 2)), jnp.asarray(draw(3, 3, 3, 2, 2, seed=1))

    def each(conv: Any) -> Any:
        if transformation == "remat":
            conv = jax.checkpoint(conv)
        if transformation == "vmap":
            return jax.vmap(lambda x, kernel: gradients(conv, x, kernel))(x, kernel)
        if transformation == "scan":
            return jax.lax.scan(lambda _, a: (None, gradients(conv, *a)), None, (x, kernel))[1]
        return gradients(conv, x[0], kernel[0])

    found, expected = (jax.jit(each, static_argnums=0)(conv) for conv in (conv3x3, native_conv3x3))
    for a, b in zip(found, expected, strict=True):
        close(a, b, "float32")


@pytest.mark.usefixtures("by_products")
def test_accelerators_keep_xlas_forms() -> None:
    traced = jax.jit(lambda *a: gradients(conv3x3, *a)).trace(draw(1, 4, 4, 2), draw(3, 3, 2, 2))
    for platform in ("cpu", "cuda", "tpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("dot_general" in text) == (platform == "cpu")  # the kernel's gradient
        assert ("stablehlo.pad" in text) == (platform == "cpu")  # blocks of pixels
