"""The KAF layer: its sparse convolution against the dense one, and padding that nobody sees."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kafjax.models.kaf import KAF, KeypointConv, gather_at_keypoints, last_at_pixel

SHAPE = (6, 5)
FEATURES = 7


def crowded_keypoints() -> tuple[Any, Any]:
    """Keypoints [2, 12, 2] on few pixels of `SHAPE`, corners and borders among them, and a mask."""
    rng = np.random.default_rng(0)
    corners = [[0, 0], [5, 4], [0, 4], [5, 0]]
    crowd = rng.integers((2, 1), (4, 4), (2, 8, 2))  # eight on six pixels
    keypoints = np.concatenate([np.broadcast_to(corners, (2, 4, 2)), crowd], axis=1)
    keypoints = rng.permuted(keypoints, axis=1)
    mask = rng.random((2, 12)) < 0.8
    return keypoints.astype(np.int32), mask


def dense_map(features: Any, keypoints: Any, mask: Any) -> np.ndarray:
    """Keypoint features at their pixels of a map of zeros; the last in order fills a pixel."""
    b, k, c = features.shape
    filled = np.zeros((b, *SHAPE, c), np.float32)
    for s in range(b):
        for i in range(k):
            if mask[s, i]:
                filled[s, keypoints[s, i, 0], keypoints[s, i, 1]] = features[s, i]
    return filled


def convolve(filled: Any, kernel: Any) -> jax.Array:
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        filled, kernel, (1, 1), "SAME", dimension_numbers=dimensions
    )


def test_features_are_gathered_at_row_and_column() -> None:
    x = np.random.default_rng(1).standard_normal((2, *SHAPE, 3)).astype(np.float32)
    keypoints, _ = crowded_keypoints()
    found = jax.jit(gather_at_keypoints)(x, keypoints)
    for b in range(2):
        for i, (row, column) in enumerate(keypoints[b]):
            np.testing.assert_array_equal(found[b, i], x[b, row, column])


@pytest.mark.parametrize("dtype", [np.int16, np.int32])
def test_the_last_real_keypoint_of_a_pixel_wins(dtype: Any) -> None:
    keypoints, mask = crowded_keypoints()
    found = jax.jit(last_at_pixel, static_argnums=2)(keypoints.astype(dtype), mask, SHAPE)
    for b in range(2):
        winners = {tuple(p): i for i, p in enumerate(keypoints[b]) if mask[b, i]}
        expected = np.isin(np.arange(12), list(winners.values()))
        np.testing.assert_array_equal(found[b], expected)
    assert len(winners) < mask[1].sum(), "no collision, nothing tested"


@pytest.fixture(scope="module")
def sparse_and_dense() -> dict[str, Any]:
    """Outputs and gradients of the sparse form and, by plain convolution, of the dense one."""
    rng = np.random.default_rng(2)
    keypoints, mask = crowded_keypoints()
    features = rng.standard_normal((2, 12, 256)).astype(np.float32)
    weights = rng.standard_normal((2, *SHAPE, FEATURES)).astype(np.float32)
    layer = KeypointConv(FEATURES)
    variables = layer.init(jax.random.key(0), features, keypoints, mask, SHAPE)
    params = {**variables["params"], "bias": jnp.arange(FEATURES, dtype=jnp.float32)}

    def sparse_loss(params: Any, features: Any) -> Any:
        y: Any = layer.apply({"params": params}, features, keypoints, mask, SHAPE)
        return jnp.sum(y * weights), y

    def dense_loss(params: Any, filled: Any) -> Any:
        y = convolve(filled, params["kernel"]) + params["bias"]
        return jnp.sum(y * weights), y

    filled = jnp.asarray(dense_map(features, keypoints, mask))
    runs = {}
    for name, loss, x in (("sparse", sparse_loss, features), ("dense", dense_loss, filled)):
        run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
        runs[name] = jax.device_get(run(params, jnp.asarray(x)))
    return {**runs, "keypoints": keypoints, "mask": mask}


def test_the_sparse_convolution_equals_the_dense_one(sparse_and_dense: dict[str, Any]) -> None:
    sparse, dense = sparse_and_dense["sparse"][1], sparse_and_dense["dense"][1]
    np.testing.assert_allclose(sparse, dense, rtol=1e-4, atol=1e-4)


def test_its_parameters_have_the_gradients_of_the_dense_one(
    sparse_and_dense: dict[str, Any],
) -> None:
    sparse, dense = sparse_and_dense["sparse"][0][0], sparse_and_dense["dense"][0][0]
    np.testing.assert_allclose(sparse["kernel"], dense["kernel"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(sparse["bias"], dense["bias"], rtol=1e-4, atol=1e-4)


def test_every_real_keypoint_of_a_pixel_has_the_pixels_gradient(
    sparse_and_dense: dict[str, Any],
) -> None:
    of_features, of_map = sparse_and_dense["sparse"][0][1], sparse_and_dense["dense"][0][1]
    keypoints, mask = sparse_and_dense["keypoints"], sparse_and_dense["mask"]
    for b in range(2):
        for i, (row, column) in enumerate(keypoints[b]):
            expected = of_map[b, row, column] if mask[b, i] else np.zeros(256)
            np.testing.assert_allclose(of_features[b, i], expected, rtol=1e-4, atol=1e-4)


def test_the_sparse_convolution_equals_the_dense_one_under_vmap() -> None:
    keypoints, mask = crowded_keypoints()
    features = np.random.default_rng(3).standard_normal((2, 12, 4)).astype(np.float32)
    layer = KeypointConv(3)
    variables = layer.init(jax.random.key(0), features, keypoints, mask, SHAPE)

    def one(*inputs: Any) -> Any:
        single: Any = layer.apply(variables, *(x[None] for x in inputs), SHAPE)
        return single[0]

    found = jax.jit(jax.vmap(one))(features, keypoints, mask)
    expected = convolve(dense_map(features, keypoints, mask), variables["params"]["kernel"])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_no_map_of_256_channels_is_made() -> None:
    layer = KeypointConv(64)
    inputs = (jnp.zeros((1, 8, 256)), jnp.zeros((1, 8, 2), jnp.int32), jnp.ones((1, 8), bool))
    variables = layer.init(jax.random.key(0), *inputs, (32, 48))

    def loss(variables: Any) -> jax.Array:
        y: Any = layer.apply(variables, *inputs, (32, 48))
        return jnp.sum(jnp.square(y))

    program = jax.jit(jax.grad(loss)).lower(variables).as_text()
    assert "32x48x64" in program
    assert "x256x" in program  # the products' operands
    for rows, columns in ((32, 48), (34, 50)):
        assert f"{rows}x{columns}x256" not in program


def kaf_inputs(num_places: int, *, seed: int) -> tuple[Any, Any, Any]:
    """A map and 48, 1 and 0 keypoints in `num_places` places, spread and padded with rubbish."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 16, 12, 4)).astype(np.float32)
    real = rng.integers(0, (16, 12), (3, 48, 2))
    rng = np.random.default_rng(seed)
    keypoints = rng.integers(0, (16, 12), (3, num_places, 2))
    mask = np.zeros((3, num_places), bool)
    for b, count in enumerate((48, 1, 0)):
        places = np.sort(rng.permutation(num_places)[:count])
        keypoints[b, places], mask[b, places] = real[b, :count], True
    return x, keypoints.astype(np.int32), mask


def test_padding_is_invisible_and_slices_may_have_no_keypoint() -> None:
    weights = np.random.default_rng(5).standard_normal((3, 16, 12, 8))
    runs = []
    with jax.enable_x64(True):
        layer = KAF(num_attention_layers=2, dtype=jnp.float64)
        x, *points = kaf_inputs(64, seed=0)
        variables = jax.jit(lambda: layer.init(jax.random.key(0), x, *points, train=False))()

        def loss(params: Any, x: Any, keypoints: Any, mask: Any) -> Any:
            (y, features), updated = layer.apply(
                {**variables, "params": params},
                *(x, keypoints, mask),
                train=True,
                mutable=["batch_stats"],
            )
            return jnp.sum(y * weights), (y, features, updated["batch_stats"])

        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        for seed in (1, 2):
            inputs = kaf_inputs(64, seed=seed)
            (value, (y, features, after)), gradients = run(variables["params"], *inputs)
            runs.append((value, y, features[inputs[2]], after, gradients))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(runs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-8, atol=1e-8), *runs)
    np.testing.assert_array_equal(runs[0][1][..., :4], x)
