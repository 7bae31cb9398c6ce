"""Attention layers against numpy, padding invisible, and one compiled layer for any depth."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from kafjax.models.attention import (
    FEWEST_KEYPOINTS,
    KEYPOINT_FEATURES,
    AttentionLayer,
    KeypointMLP,
    PositionalEncoder,
    SelfAttention,
    blocked_attention,
    masked_attention,
    normalize_keypoints,
)

C = 8  # channels; the networks' 256 change nothing


def draw(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def random_mask(b: int, k: int, seed: int = 0) -> Any:
    """Half of the places, and at least one of each row."""
    mask = np.random.default_rng(seed).random((b, k)) < 0.5
    mask[:, 0] = True
    return mask


def redrawn(variables: Any) -> Any:
    """Variables of the same shapes without zeros and ones, so that no part goes unnoticed."""
    leaves, structure = jax.tree.flatten(variables)
    drawn = [0.5 * draw(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, drawn)


def dense(params: Any, x: np.ndarray) -> np.ndarray:
    return x @ params["dense"]["kernel"] + params["dense"]["bias"]


def expected_mlp(params: Any, x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    num_hidden = sum(name.startswith("norm") for name in params)
    for i in range(1, num_hidden + 1):
        x = dense(params[f"linear_{i}"], x)
        norm = params[f"norm_{i}"]
        x = (x - x[mask].mean(axis=0)) / np.sqrt(x[mask].var(axis=0) + 1e-5)
        x = np.maximum(x * norm["scale"] + norm["bias"], 0)
    return dense(params[f"linear_{num_hidden + 1}"], x)


def expected_layer(
    params: Any, x: np.ndarray, mask: np.ndarray, source: np.ndarray, source_mask: np.ndarray
) -> np.ndarray:
    """One layer by a loop over slices and heads: four heads, each of neighbouring channels."""
    query, key, value = (
        dense(params[name], a) for name, a in (("query", x), ("key", source), ("value", source))
    )
    message = np.zeros_like(x)
    for b in range(len(x)):
        real = source_mask[b]
        for head in range(4):
            part = slice(head * C // 4, (head + 1) * C // 4)
            scores = query[b][:, part] @ key[b][real][:, part].T / np.sqrt(C // 4)
            message[b][:, part] = softmax(scores, axis=1) @ value[b][real][:, part]
    joined = np.concatenate([x, dense(params["merge"], message)], axis=-1)
    return x + expected_mlp(params["mlp"], joined, mask)


def test_positions_are_normalised_by_centre_and_longer_side() -> None:
    keypoints = jnp.array([[[0, 0], [30, 100], [60, 200]]])
    found = normalize_keypoints(keypoints, (60, 200), jnp.float32)
    expected = np.array([[[-30, -100], [0, 0], [30, 100]]]) / (0.7 * 200)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_masked_attention_equals_a_loop() -> None:
    query, key, value = draw(2, 5, 2, 3), draw(2, 7, 2, 3, seed=1), draw(2, 7, 2, 3, seed=2)
    mask = random_mask(2, 7)
    found = jax.jit(masked_attention)(query, key, value, mask)
    for b in range(2):
        for h in range(2):
            scores = query[b, :, h] @ key[b, mask[b], h].T / np.sqrt(3)
            expected = softmax(scores, axis=1) @ value[b, mask[b], h]
            np.testing.assert_allclose(found[b, :, h], expected, rtol=1e-4, atol=1e-6)


def test_blocked_attention_is_masked_attention() -> None:
    with jax.enable_x64(True):
        inputs = [draw(3, k, 2, 4, seed=i).astype(np.float64) for i, k in enumerate((11, 7, 7))]
        mask = random_mask(3, 7)
        mask[0] = False

        def summed(attention: Any, *inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
            found = attention(*inputs, mask)
            return jnp.sum(jnp.sin(found)), found

        def run(attention: Any) -> Any:
            value = jax.value_and_grad(summed, argnums=(1, 2, 3), has_aux=True)
            return jax.jit(value, static_argnums=0)(attention, *inputs)

        plain, blocked = run(masked_attention), run(partial(blocked_attention, block=4))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-14), blocked, plain)
        assert np.all(blocked[0][1][0] == 0)


def test_memory_of_attention_grows_as_its_keypoints() -> None:
    def temporaries(k: int) -> int:
        shape = jax.ShapeDtypeStruct((1, k, 4, 8), jnp.float32)
        mask = jax.ShapeDtypeStruct((1, k), bool)
        gradient = jax.grad(lambda x, mask: jnp.sum(blocked_attention(x, x, x, mask)))
        compiled = jax.jit(gradient).lower(shape, mask).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(4096) < 2.2 * temporaries(2048)


def test_attention_to_padding_alone_is_zero() -> None:
    x, mask = draw(1, 4, 2, 3), jnp.zeros((1, 4), bool)

    @jax.jit
    @jax.value_and_grad
    def loss(x: Any) -> jax.Array:
        return jnp.sum(1 + masked_attention(x, x, x, mask))

    value, gradient = loss(x)
    assert value == x.size
    np.testing.assert_array_equal(gradient, 0)


def test_keypoint_mlp_equals_numpy() -> None:
    mlp, x, mask = KeypointMLP((5, 6), 3), draw(2, 27, 4), random_mask(2, 27)
    assert mask.sum() >= FEWEST_KEYPOINTS
    variables = redrawn(mlp.init(jax.random.key(0), x, mask, train=True))
    found: Any = mlp.apply(variables, x, mask, train=True, mutable=["batch_stats"])[0]
    expected = expected_mlp(variables["params"], x, mask)
    np.testing.assert_allclose(found[mask], expected[mask], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("real", [0, 1, FEWEST_KEYPOINTS - 1])
def test_few_keypoints_are_normalised_by_the_running_statistics(real: int) -> None:
    mlp, x, mask = KeypointMLP((5, 6), 3), draw(2, 9, 4), np.arange(18).reshape(2, 9) < real
    variables = jax.tree.map(np.abs, redrawn(mlp.init(jax.random.key(0), x, mask, train=True)))
    found, after = mlp.apply(variables, x, mask, train=True, mutable=["batch_stats"])
    np.testing.assert_array_equal(found, mlp.apply(variables, x, mask, train=False))
    jax.tree.map(np.testing.assert_array_equal, after["batch_stats"], variables["batch_stats"])


def test_the_positional_code_is_an_mlp_of_normalised_positions() -> None:
    keypoints = np.random.default_rng(0).integers(0, 40, (2, 25, 2))
    mask = random_mask(2, 25)
    encoder = PositionalEncoder()
    init = encoder.init(jax.random.key(0), keypoints, mask, (40, 56), train=True)
    hidden = [init["params"]["mlp"][f"linear_{i}"]["dense"]["kernel"].shape for i in range(1, 6)]
    assert hidden == [(2, 32), (32, 64), (64, 128), (128, 256), (256, 256)]
    found: Any = encoder.apply(
        init, keypoints, mask, (40, 56), train=True, mutable=["batch_stats"]
    )[0]
    positions = (keypoints - np.array([20, 28])) / (0.7 * 56)
    params = jax.device_get(init["params"]["mlp"])
    expected = expected_mlp(params, positions.astype(np.float32), mask)
    np.testing.assert_allclose(found[mask], expected[mask], rtol=1e-3, atol=1e-4)


def test_the_positional_code_tells_pixels_apart_in_bfloat16() -> None:
    keypoints = jnp.array([[[500, 500], [501, 500], [10, 10]]])
    mask = jnp.ones((1, 3), bool)
    codes: list[Any] = []
    for dtype in (jnp.float32, jnp.bfloat16):
        encoder = PositionalEncoder(dtype=dtype)
        variables = encoder.init(jax.random.key(0), keypoints, mask, (512, 512), train=False)
        codes.append(encoder.apply(variables, keypoints, mask, (512, 512), train=False))
    np.testing.assert_array_equal(codes[0], codes[1])


@pytest.mark.parametrize("cross", [False, True])
def test_an_attention_layer_equals_numpy(cross: bool) -> None:
    x, mask = draw(2, 25, C), random_mask(2, 25)
    source, source_mask = (draw(2, 9, C, seed=1), random_mask(2, 9, 1)) if cross else (x, mask)
    layer = AttentionLayer(train=True)
    variables = redrawn(layer.init(jax.random.key(0), x, mask, source, source_mask))
    found: Any = layer.apply(variables, x, mask, source, source_mask, mutable=["batch_stats"])[0]
    expected = expected_layer(variables["params"], x, mask, source, source_mask)
    np.testing.assert_allclose(found[mask], expected[mask], rtol=1e-3, atol=1e-3)


def test_a_stack_is_its_layers_one_after_the_other() -> None:
    x, mask = draw(2, 25, C), random_mask(2, 25)
    stack = SelfAttention(3)
    variables = redrawn(stack.init(jax.random.key(0), x, mask, train=True))
    found, updated = jax.jit(
        lambda v: stack.apply(v, x, mask, train=True, mutable=["batch_stats"])
    )(variables)
    layers = variables["params"]["layers"]["layer"]
    expected = x
    for i in range(3):
        params = jax.tree.map(lambda leaf, i=i: leaf[i], layers)
        expected = expected_layer(params, expected, mask, expected, mask)
    np.testing.assert_allclose(found[mask], expected[mask], rtol=1e-2, atol=1e-2)
    shapes = [jax.tree.map(np.shape, tree["batch_stats"]) for tree in (updated, variables)]
    assert shapes[0] == shapes[1]


def test_layers_of_a_stack_start_different() -> None:
    stack = SelfAttention(2)
    variables = stack.init(jax.random.key(0), draw(1, 3, C), random_mask(1, 3), train=False)
    kernel = variables["params"]["layers"]["layer"]["query"]["dense"]["kernel"]
    assert kernel.shape == (2, C, C)
    assert abs(np.corrcoef(kernel[0].ravel(), kernel[1].ravel())[0, 1]) < 0.5


def test_a_stack_of_any_depth_is_one_compiled_layer() -> None:
    x, mask = draw(1, 3, C), random_mask(1, 3)

    def program(num_layers: int) -> str:
        stack = SelfAttention(num_layers)
        variables = jax.eval_shape(
            lambda: stack.init(jax.random.key(0), jnp.asarray(x), mask, train=False)
        )

        def loss(params: Any, rest: Any) -> Any:
            y, _ = stack.apply(
                {**rest, "params": params}, x, mask, train=True, mutable=["batch_stats"]
            )
            return jnp.sum(y)

        params = variables.pop("params")
        return jax.jit(jax.grad(loss)).lower(params, variables).as_text()

    lines = [len(program(depth).splitlines()) for depth in (2, 16)]
    assert lines[0] == lines[1]


def test_padding_changes_neither_outputs_nor_gradients_nor_statistics() -> None:
    k, num_places = 9, 16
    places = np.sort(np.random.default_rng(0).permutation(num_places)[:k])
    few, mask = draw(2, k, C), np.ones((2, k), bool)
    many, many_mask = draw(2, num_places, C, seed=1), np.zeros((2, num_places), bool)
    many[:, places], many_mask[:, places] = few, True
    stack = SelfAttention(2)
    variables = stack.init(jax.random.key(0), few, mask, train=False)

    def loss(x: Any, mask: Any) -> Any:
        y, updated = stack.apply(variables, x, mask, train=True, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(y), where=mask[..., None]), (y, updated["batch_stats"])

    run = jax.jit(jax.grad(loss, has_aux=True))
    gradient, (y, after) = run(jnp.asarray(few), jnp.asarray(mask))
    many_gradient, (many_y, many_after) = run(jnp.asarray(many), jnp.asarray(many_mask))
    np.testing.assert_allclose(many_y[:, places], y, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(many_gradient[:, places], gradient, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(many_gradient[~many_mask], 0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-4), after, many_after)


def test_keypoints_at_one_pixel_have_no_gradient_but_rounding() -> None:
    keypoints, mask = np.full((3, 6, 2), 7, np.int32), np.ones((3, 6), bool)
    encoder = PositionalEncoder()
    variables = encoder.init(jax.random.key(0), keypoints, mask, (32, 32), train=False)
    weights = draw(3, 6, KEYPOINT_FEATURES)

    def loss(params: Any) -> jax.Array:
        y, _ = encoder.apply(
            {**variables, "params": params},
            *(keypoints, mask, (32, 32)),
            train=True,
            mutable=["batch_stats"],
        )
        return jnp.sum(y * weights)

    mlp = jax.grad(loss)(variables["params"])["mlp"]
    for i in range(1, 5):  # those before a norm, which takes away what all entries share
        assert np.abs(mlp[f"linear_{i}"]["dense"]["kernel"]).max() < 1e-3
    assert np.abs(mlp["linear_5"]["dense"]["bias"]).max() > 1
