"""The pretraining network: heads against numpy, the matcher's symmetry, invisible padding."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kafjax.assignment import matching_loss
from kafjax.losses import positive_pairs, supervised_contrastive_loss
from kafjax.models import build_model, example_inputs, init_variables
from kafjax.models.pretraining import CNNHead, KAFHead, Matcher
from tests.small_models import model_config, spread_keypoints

SIZE = (16, 32)


def draw(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def dense(params: Any, x: np.ndarray) -> np.ndarray:
    return x @ np.asarray(params["dense"]["kernel"]) + np.asarray(params["dense"]["bias"])


def test_the_cnn_head_is_an_mlp_of_the_global_mean() -> None:
    center = draw(3, 2, 5, 6)
    head = CNNHead(4)
    variables = head.init(jax.random.key(0), center)
    params = variables["params"]
    assert params["linear_1"]["dense"]["kernel"].shape == (6, 3)
    hidden = np.maximum(dense(params["linear_1"], center.mean(axis=(1, 2))), 0)
    expected = dense(params["linear_2"], hidden)
    found: Any = head.apply(variables, center)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_kaf_head_is_an_mlp_of_the_mean_over_real_keypoints() -> None:
    points, mask = draw(3, 7, 256), np.random.default_rng(1).random((3, 7)) < 0.5
    mask[0] = False
    head = KAFHead(4)
    variables = head.init(jax.random.key(0), points, mask, train=True)
    found, _ = head.apply(variables, points, mask, train=True, mutable=["batch_stats"])
    mean = np.stack([points[b][mask[b]].sum(axis=0) / max(mask[b].sum(), 1) for b in range(3)])
    params = variables["params"]
    x = dense(params["linear_1"], mean)
    x = (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-5)
    expected = dense(params["linear_2"], np.maximum(x, 0))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_the_matcher_treats_both_slices_alike() -> None:
    keypoints, mask, _ = spread_keypoints([9, 4], 12, SIZE, seed=0)
    others, other_mask, _ = spread_keypoints([3, 7], 12, SIZE, seed=1)
    points, other_points = draw(2, 12, 256), draw(2, 12, 256, seed=1)
    matcher = Matcher(num_iterations=100)
    inputs = ((points, other_points), (keypoints, others), (mask, other_mask))
    variables = jax.jit(lambda: matcher.init(jax.random.key(0), *inputs, SIZE, train=False))()
    match = jax.jit(lambda *sides: matcher.apply(variables, *sides, SIZE, train=False))
    forward, backward = match(*inputs), match(*((b, a) for a, b in inputs))
    real = np.append(mask, [[True]] * 2, axis=1)[:, :, None]
    real = real & np.append(other_mask, [[True]] * 2, axis=1)[:, None, :]
    # Sinkhorn starts with the rows, so the two agree as far as it has converged.
    np.testing.assert_allclose(forward[real], np.swapaxes(backward, 1, 2)[real], atol=1e-2)


def test_an_encoder_without_kaf_has_the_cnn_head_alone() -> None:
    model = build_model(model_config("unet", "pretraining"))
    inputs = example_inputs("pretraining")
    variables = init_variables(model, 0, *inputs)
    output = jax.eval_shape(lambda v, *x: model.apply(v, *x, train=False), variables, *inputs)
    assert [embedding.shape for embedding in output.cnn] == [(1, 8)] * 2
    assert output.kaf is None
    assert output.log_assignment is None
    assert variables["params"].keys() == {"encoder", "cnn_head"}


COUNTS = ([48, 1, 0, 48], [48, 1, 5, 0])


def pairs_of(places: list[list[Any]], num_places: int) -> Any:
    """Every other keypoint i of the first slice with keypoint i of the second."""
    correspondence = np.full((4, num_places), -1)
    for b, (first, second) in enumerate(zip(*places, strict=True)):
        both = min(len(first), len(second))
        correspondence[b, first[:both:2]] = second[:both:2]
    return correspondence


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    """A training step with 48, few and no keypoints, and the same amid other padding."""
    image = np.random.default_rng(0).standard_normal((4, 2, *SIZE, 1))
    position = jnp.array([(10, 100), (15, 100), (80, 100), (100, 100)])
    with jax.enable_x64(True):
        model = build_model(model_config("kaf_unet", "pretraining", dtype="float64"))
        variables = init_variables(model, 0, *example_inputs("pretraining"))
        positives = positive_pairs("pcl", position)

        def loss(params: Any, keypoints: Any, mask: Any, correspondence: Any) -> Any:
            output, updated = model.apply(
                {**variables, "params": params},
                *(image, keypoints, mask),
                train=True,
                mutable=["batch_stats"],
            )
            matching = matching_loss(output.log_assignment, correspondence, mask[:, 0], mask[:, 1])
            terms = (
                supervised_contrastive_loss(output.cnn, positives),
                supervised_contrastive_loss(output.kaf, positives),
                jnp.mean(matching),
            )
            return sum(terms), (output.cnn, output.kaf, terms, updated["batch_stats"])

        step = jax.jit(jax.value_and_grad(loss, has_aux=True))
        runs = []
        for seeds in ((0, 1), (2, 3)):
            sides = [
                spread_keypoints(counts, 64, SIZE, seed=seed)
                for counts, seed in zip(COUNTS, seeds, strict=True)
            ]
            keypoints, mask = (np.stack([side[i] for side in sides], axis=1) for i in range(2))
            matches = pairs_of([side[2] for side in sides], 64)
            runs.append(jax.device_get(step(variables["params"], keypoints, mask, matches)))
    return {"runs": runs, "image": image, "variables": variables}


def test_slices_with_one_keypoint_or_none_pretrain(trained: dict[str, Any]) -> None:
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trained["runs"]))


def test_padding_changes_neither_losses_nor_gradients_nor_statistics(
    trained: dict[str, Any],
) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-7, atol=1e-8), *trained["runs"]
    )


def test_running_statistics_take_the_first_view_then_the_second(trained: dict[str, Any]) -> None:
    after = trained["runs"][0][0][1][3]["encoder"]["level_0"]["block"]["norm_1"]
    conv = trained["variables"]["params"]["encoder"]["level_0"]["block"]["conv_1"]["conv"]
    mean, var = np.zeros(4), np.ones(4)
    for view in range(2):
        x = np.pad(trained["image"][:, view, ..., 0], ((0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
        y = np.tensordot(windows, conv["kernel"][:, :, 0], axes=2) + conv["bias"]
        mean = 0.9 * mean + 0.1 * y.mean(axis=(0, 1, 2))
        var = 0.9 * var + 0.1 * y.reshape(-1, 4).var(axis=0, ddof=1)
    np.testing.assert_allclose(after["mean"], mean, rtol=1e-10)
    np.testing.assert_allclose(after["var"], var, rtol=1e-10)
