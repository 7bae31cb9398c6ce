"""UNets: shapes, widening, ignored keypoints, and training with padding or without keypoints."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kafjax.losses import cross_entropy
from kafjax.models import build_model, example_inputs, init_variables
from kafjax.models.unet import UNetEncoder
from tests.small_models import model_config, spread_keypoints

INPUTS = example_inputs("segmentation")


def model_and_variables(name: str, **fields: Any) -> tuple[nn.Module, dict[str, Any]]:
    model = build_model(model_config(name, **fields))
    return model, init_variables(model, 0, *INPUTS)


@pytest.mark.parametrize(("widening", "factor"), [("none", 1), ("copy", 2), ("kaf", 2)])
def test_an_encoding_has_four_levels_and_a_centre(widening: str, factor: int) -> None:
    encoder = UNetEncoder(4, widening, num_attention_layers=1)
    shapes = [(2, 32, 48, 1), (2, 5, 2), (2, 5)]
    inputs = [jax.ShapeDtypeStruct(s, t) for s, t in zip(shapes, ("f4", "i4", "?"), strict=True)]
    encoding, _ = jax.eval_shape(
        lambda *x: encoder.init_with_output(jax.random.key(0), *x, train=False), *inputs
    )
    levels = [(2, 32 >> i, 48 >> i, factor * 4 << i) for i in range(4)]
    assert [level.shape for level in encoding.levels] == levels
    assert encoding.center.shape == (2, 2, 3, factor * 64)
    num_kaf = 4 if widening == "kaf" else 0
    assert [points.shape for points in encoding.points] == [(2, 5, 256)] * num_kaf


def test_the_copy_of_c2_is_a_copy() -> None:
    encoder = UNetEncoder(4, "copy")
    image = np.random.default_rng(0).standard_normal((1, 16, 32, 1))
    inputs = (image, jnp.zeros((1, 1, 2), jnp.int32), jnp.zeros((1, 1), bool))
    encoding: Any = jax.jit(
        lambda: encoder.init_with_output(jax.random.key(0), *inputs, train=False)[0]
    )()
    for level in encoding.levels:
        first, second = np.split(np.asarray(level), 2, axis=-1)
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("name", ["unet", "unet_c2", "fcn"])
def test_networks_without_kaf_ignore_keypoints(name: str) -> None:
    model, variables = model_and_variables(name)
    image = np.random.default_rng(0).standard_normal((1, 32, 16, 1))
    apply = jax.jit(lambda *points: model.apply(variables, image, *points, train=False))
    logits = [apply(*spread_keypoints([count], 7, (32, 16), seed=count)[:2]) for count in (7, 2)]
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("name", ["kaf_unet", "kaf_fcn"])
@pytest.mark.parametrize("size", [(40, 32), (32, 24)])
def test_a_size_that_16_does_not_divide_is_named(name: str, size: tuple[int, int]) -> None:
    model = build_model(model_config(name))
    image = jnp.zeros((1, *size, 1))
    with pytest.raises(ValueError, match=rf"{size[0]} x {size[1]} pixels.*divisible by 16"):
        model.init(
            jax.random.key(0),
            *(image, jnp.zeros((1, 1, 2), jnp.int32), jnp.ones((1, 1), bool)),
            train=False,
        )


SIZE = (16, 32)


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    """A step with 48, 1 and 0 keypoints, the same amid other padding, and one without any."""
    rng = np.random.default_rng(0)
    image = rng.standard_normal((3, *SIZE, 1))
    label = rng.integers(0, 3, (3, *SIZE))
    with jax.enable_x64(True):
        model, variables = model_and_variables("kaf_unet", dtype="float64")

        def loss(params: Any, keypoints: Any, mask: Any) -> Any:
            logits, updated = model.apply(
                {**variables, "params": params},
                *(image, keypoints, mask),
                train=True,
                mutable=["batch_stats"],
            )
            return cross_entropy(logits, jnp.asarray(label)), (logits, updated["batch_stats"])

        step = jax.jit(jax.value_and_grad(loss, has_aux=True))

        def run(counts: list[int], seed: int) -> Any:
            keypoints, mask, _ = spread_keypoints(counts, 64, SIZE, seed=seed)
            return jax.device_get(step(variables["params"], keypoints, mask))

        return {
            "mixed": run([48, 1, 0], seed=1),
            "other padding": run([48, 1, 0], seed=2),
            "no keypoint": run([0, 0, 0], seed=1),
            "statistics before": variables["batch_stats"],
        }


def test_slices_with_one_keypoint_or_none_train(trained: dict[str, Any]) -> None:
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trained))


def test_padding_changes_neither_logits_nor_gradients_nor_statistics(
    trained: dict[str, Any],
) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-8, atol=1e-8),
        trained["mixed"],
        trained["other padding"],
    )


def test_a_batch_without_any_keypoint_keeps_the_keypoints_statistics(
    trained: dict[str, Any],
) -> None:
    _, (_, after) = trained["no keypoint"][0]
    for level in range(4):
        before, now = (
            tree["encoder"][f"level_{level}"]["kaf"]
            for tree in (trained["statistics before"], after)
        )
        for part in ("position", "attention"):
            jax.tree.map(np.testing.assert_array_equal, now[part], before[part])


@pytest.mark.slow
def test_rematerialised_blocks_give_the_same_step() -> None:
    image = np.random.default_rng(0).standard_normal((2, 32, 32, 1)).astype(np.float32)
    keypoints, mask, _ = spread_keypoints([5, 3], 6, (32, 32), seed=0)
    variables = init_variables(UNetEncoder(4, "kaf", num_attention_layers=1), 0, *INPUTS)

    def lowered(remat: bool) -> Any:
        encoder = UNetEncoder(4, "kaf", num_attention_layers=1, remat=remat)

        def loss(variables: Any) -> Any:
            encoding, updated = encoder.apply(
                variables, image, keypoints, mask, train=True, mutable=["batch_stats"]
            )
            return jnp.mean(jnp.sin(encoding.center)), updated

        return jax.jit(jax.grad(loss, has_aux=True)).lower(variables)

    plain, remat = (lowered(flag) for flag in (False, True))
    # XLA's CPU compiler drops the barriers, so memory is no measure of remat here.
    barriers = [step.as_text().count("optimization_barrier") for step in (plain, remat)]
    assert barriers[1] > barriers[0]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-5),
        *(step.compile()(variables) for step in (plain, remat)),
    )
