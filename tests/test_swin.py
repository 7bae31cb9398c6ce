"""Swin-UNet: Swin-T's published size, windows against NumPy, and a network like every other."""

import functools
from collections.abc import Iterator
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from kafjax.losses import cross_entropy
from kafjax.models import build_model, example_inputs, init_variables
from kafjax.models.swin import (
    LayerNorm,
    PatchMerging,
    Stage,
    SwinEncoder,
    SwinTransformer,
    WindowAttention,
    cut_windows,
    join_windows,
    stage_depths,
    tile,
)
from kafjax.tasks.base import apply_training
from tests.small_models import model_config, spread_keypoints

WINDOW = 4


class Classifier(nn.Module):
    """The classifier that the paper's table 1 describes."""

    num_blocks: int

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        x = LayerNorm()(SwinTransformer(depths=stage_depths(self.num_blocks))(image)[-1])
        return nn.Dense(1000)(jnp.mean(x, axis=(1, 2)))


def products(jaxpr: Any) -> int:
    """Multiply-adds of all matrix products of a traced function, loops' bodies by their length."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            inner = np.prod([left[axis] for axis in contracted])
            total += int(np.prod(equation.outvars[0].aval.shape) * inner)
        total += equation.params.get("length", 1) * sum(map(products, nested(equation)))
    return total


def nested(equation: Any) -> Iterator[Any]:
    for value in equation.params.values():
        if hasattr(value, "jaxpr"):
            yield value.jaxpr


@pytest.mark.parametrize(
    ("num_blocks", "parameters", "giga_multiply_adds"),
    [(12, 28_288_354, 4.5), (24, 49_606_258, 8.7)],  # Swin-T, Swin-S
)
def test_classifiers_have_the_published_parameters_and_products(
    num_blocks: int, parameters: int, giga_multiply_adds: float
) -> None:
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    model = Classifier(num_blocks)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == parameters
    found = products(jax.make_jaxpr(model.apply)(variables, image).jaxpr)
    assert round(found / 1e9, 1) == giga_multiply_adds


def reference_attention(x: np.ndarray, params: Any, heads: int, *, shifted: bool) -> np.ndarray:
    """Each token attends to those of its own window: a loop over tokens, no rolling or padding.

    Shifted windows are cut at half a window and every window from there on; a side that one window
    covers is not cut.
    """
    h, w, c = x.shape
    d = c // heads
    flat = x.reshape(-1, c)
    places = np.array(list(np.ndindex(h, w)))
    shift = np.where(np.array([h, w]) > WINDOW, WINDOW // 2 if shifted else 0, 0)
    window = (places - shift) // WINDOW
    kernel, bias = (np.asarray(params["qkv"]["small"][name]) for name in ("kernel", "bias"))
    query, key, value = np.moveaxis((flat @ kernel + bias).reshape(-1, 3, heads, d), 1, 0)
    table = np.asarray(params["position_bias"]).reshape(2 * WINDOW - 1, 2 * WINDOW - 1, heads)
    message = np.empty((h * w, heads, d))
    for i, place in enumerate(places):
        seen = np.flatnonzero((window == window[i]).all(axis=-1))
        row, column = (place - places[seen]).T + WINDOW - 1
        for head in range(heads):
            logits = key[seen, head] @ query[i, head] / np.sqrt(d) + table[row, column, head]
            message[i, head] = special.softmax(logits) @ value[seen, head]
    project = params["project"]["small"]
    merged = message.reshape(-1, c) @ np.asarray(project["kernel"]) + np.asarray(project["bias"])
    return merged.reshape(h, w, c)


def randomised(shapes: Any, seed: int) -> Any:
    """Parameters of the given shapes, none of them zero and the attention far from uniform."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.7, leaf.shape), shapes)


@pytest.mark.parametrize("size", [(8, 12), (7, 10), (3, 9), (4, 3)])
@pytest.mark.parametrize("shifted", [False, True])
def test_window_attention_is_that_of_each_window_by_itself(
    size: tuple[int, int], shifted: bool
) -> None:
    x = np.random.default_rng(0).standard_normal((2, *size, 6))
    with jax.enable_x64(True):
        attention = WindowAttention(2, WINDOW, shifted, jnp.float64)
        variables = randomised(jax.eval_shape(attention.init, jax.random.key(0), x), 1)
        ours = jax.jit(attention.apply)(variables, x)
    for image, found in zip(x, ours, strict=True):
        expected = reference_attention(image, variables["params"], 2, shifted=shifted)
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


def normalise(x: np.ndarray, params: Any) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    y = centred / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
    return y * np.asarray(params["layer"]["scale"]) + np.asarray(params["layer"]["bias"])


def linear(x: np.ndarray, params: Any) -> np.ndarray:
    return x @ params["small"]["kernel"] + params["small"].get("bias", 0)


def test_a_stage_is_its_blocks_one_after_the_other() -> None:
    x = np.random.default_rng(0).standard_normal((1, 6, 5, 6))
    with jax.enable_x64(True):
        stage = Stage(4, 2, WINDOW, jnp.float64)
        variables = randomised(jax.eval_shape(stage.init, jax.random.key(0), x), 1)
        ours = jax.jit(stage.apply)(variables, x)
    y = x[0]
    for pair in range(2):
        for name, shifted in (("plain", False), ("shifted", True)):
            params = jax.tree.map(lambda leaf: leaf[pair], variables["params"]["pairs"][name])  # noqa: B023
            y = y + reference_attention(
                normalise(y, params["norm_1"]), params["attention"], 2, shifted=shifted
            )
            z = linear(normalise(y, params["norm_2"]), params["mlp_1"])
            z = z * (1 + special.erf(z / np.sqrt(2))) / 2  # GELU
            y = y + linear(z, params["mlp_2"])
    np.testing.assert_allclose(ours[0], y, rtol=1e-9, atol=1e-9)


def test_merging_joins_four_tokens_in_the_authors_order() -> None:
    x = np.random.default_rng(0).standard_normal((1, 3, 4, 5))
    with jax.enable_x64(True):
        merging = PatchMerging(jnp.float64)
        variables = randomised(jax.eval_shape(merging.init, jax.random.key(0), x), 1)
        ours = jax.jit(merging.apply)(variables, x)
    padded = np.zeros((4, 4, 5))
    padded[:3] = x[0]
    four = [padded[i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]
    params = variables["params"]
    expected = linear(normalise(np.concatenate(four, axis=-1), params["norm"]), params["reduce"])
    np.testing.assert_allclose(ours[0], expected, rtol=1e-10, atol=1e-10)


def test_the_first_tokens_are_a_strided_convolution() -> None:
    image = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 12, 3)), jnp.float32)
    model = SwinTransformer(6, (0, 0, 0, 0))
    variables = randomised(jax.eval_shape(model.init, jax.random.key(0), image), 1)
    tokens = jax.jit(model.apply)(variables, image)[0]
    dense = variables["params"]["embed"]["dense"]
    kernel = dense["kernel"].reshape(4, 4, 3, 6).astype(np.float32)
    convolved = jax.lax.conv_general_dilated(
        image, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    expected = normalise(np.asarray(convolved) + dense["bias"], variables["params"]["norm"])
    np.testing.assert_allclose(tokens, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lengths", [(8, 8), (9, 3), (5, 13)])
def test_windows_joined_again_are_the_map(lengths: tuple[int, int]) -> None:
    x = np.random.default_rng(0).standard_normal((2, *lengths, 3))
    for shifted in (False, True):
        rows, columns = (tile(length, WINDOW, shifted=shifted) for length in lengths)
        windows = cut_windows(jnp.asarray(x), rows, columns)
        np.testing.assert_array_equal(join_windows(windows, rows, columns, lengths), jnp.asarray(x))


@pytest.mark.parametrize(
    ("num_blocks", "depths"),
    [
        (12, (2, 2, 6, 2)),  # Swin-T
        (24, (2, 2, 18, 2)),  # Swin-S
        (100, (2, 2, 94, 2)),
        (8, (2, 2, 2, 2)),
        (6, (0, 2, 2, 2)),
        (4, (0, 0, 2, 2)),
        (2, (0, 0, 2, 0)),
    ],
)
def test_blocks_go_to_the_stages_as_in_swin_t(num_blocks: int, depths: tuple[int, ...]) -> None:
    assert stage_depths(num_blocks) == depths
    assert sum(depths) == num_blocks


@pytest.mark.parametrize("num_blocks", [0, 5, -2])
def test_blocks_that_do_not_pair_are_named(num_blocks: int) -> None:
    with pytest.raises(ValueError, match=f"num_attention_layers is {num_blocks}, expected an even"):
        stage_depths(num_blocks)


def test_an_encoding_has_the_image_three_stages_and_a_centre() -> None:
    shapes = [(2, 48, 80, 1), (2, 5, 2), (2, 5)]
    inputs = [jax.ShapeDtypeStruct(s, t) for s, t in zip(shapes, ("f4", "i4", "?"), strict=True)]
    encoding, _ = jax.eval_shape(
        functools.partial(SwinEncoder(4).init_with_output, train=False), jax.random.key(0), *inputs
    )
    expected = [(2, 48, 80, 1), (2, 12, 20, 12), (2, 6, 10, 24), (2, 3, 5, 48)]
    assert [level.shape for level in encoding.levels] == expected
    assert encoding.center.shape == (2, 2, 3, 96)
    assert encoding.points == ()


SIZE = (48, 80)


@pytest.fixture(scope="module")
def segmented() -> dict[str, Any]:
    """Logits, gradients and statistics of a training step, amid keypoints of two kinds."""
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.standard_normal((2, *SIZE, 1)), jnp.float32)
    label = jnp.asarray(rng.integers(0, 3, (2, *SIZE)))
    model = build_model(model_config("swin_unet"))
    variables = init_variables(model, 0, *example_inputs("segmentation"))

    @jax.jit
    def step(keypoints: Any, mask: Any) -> Any:
        def loss(params: Any) -> Any:
            inputs = (image, keypoints, mask)
            logits, stats = apply_training(model, params, variables["batch_stats"], inputs)
            return cross_entropy(logits, label), (logits, stats)

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    (_, (logits, _)), gradients = step(*spread_keypoints([7, 5], 7, SIZE, seed=0)[:2])
    (_, (again, _)), _ = step(*spread_keypoints([2, 0], 7, SIZE, seed=1)[:2])
    return {"logits": logits, "with other keypoints": again, "gradients": gradients}


def test_keypoints_are_ignored(segmented: dict[str, Any]) -> None:
    assert segmented["logits"].shape == (2, *SIZE, 3)
    np.testing.assert_array_equal(segmented["logits"], segmented["with other keypoints"])


def test_segmentation_trains_every_parameter(segmented: dict[str, Any]) -> None:
    assert untrained(segmented["gradients"]) == []


def untrained(gradients: Any) -> list[str]:
    """Parameters whose gradient is not finite, or is zero everywhere."""
    flat = flax.traverse_util.flatten_dict(jax.device_get(gradients), sep="/")
    return [name for name, g in flat.items() if not np.isfinite(g).all() or not g.any()]


def test_pretraining_has_one_head_and_no_batch_statistics() -> None:
    model = build_model(model_config("swin_unet", "pretraining"))
    variables = init_variables(model, 0, *example_inputs("pretraining"))
    assert variables["batch_stats"] == {}
    output, batch_stats = jax.eval_shape(
        lambda params, *inputs: apply_training(model, params, {}, inputs),
        variables["params"],
        *example_inputs("pretraining"),
    )
    assert batch_stats == {}
    assert [x.shape for x in output.cnn] == [(1, 8)] * 2
    assert output.kaf is None
    assert output.log_assignment is None


def test_bfloat16_computes_alike_from_the_same_parameters() -> None:
    x = np.random.default_rng(0).standard_normal((1, 6, 5, 6))
    shapes = jax.eval_shape(Stage(2, 2, WINDOW).init, jax.random.key(0), x)
    stage = Stage(2, 2, WINDOW, jnp.bfloat16)
    assert jax.eval_shape(stage.init, jax.random.key(0), x) == shapes  # float32 parameters
    variables = randomised(shapes, 1)
    exact, rounded = (
        jax.jit(Stage(2, 2, WINDOW, dtype).apply)(variables, jnp.asarray(x, dtype))
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert rounded.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(rounded, np.float32) - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.05


def test_initial_weights_are_the_papers() -> None:
    model = build_model(model_config("swin_unet", filters=16, num_attention_layers=8))
    variables = init_variables(model, 0, *example_inputs("segmentation"))
    drawn = flax.traverse_util.flatten_dict(variables["params"]["encoder"], sep="/")
    stage = "transformer/stage_2/pairs/shifted"
    small = ("attention/position_bias", "attention/qkv/small/kernel", "mlp_2/small/kernel")
    for name in (*(f"{stage}/{part}" for part in small), "transformer/merge_1/reduce/small/kernel"):
        assert stats.kstest(drawn[name].ravel(), stats.norm(scale=0.02).cdf).pvalue > 1e-3, name
    embedded = drawn["transformer/embed/dense/kernel"].ravel()
    assert stats.kstest(embedded, stats.uniform(-0.25, 0.5).cdf).pvalue > 1e-3
    constants = {"bias": 0, "scale": 1}
    for name, leaf in drawn.items():
        if name.endswith(("/bias", "/scale")) and "embed" not in name:
            np.testing.assert_array_equal(leaf, constants[name.split("/")[-1]], err_msg=name)
