"""The networks and losses against the values that the authors' release gave (docs/method.md 9).

Each case compiles once; the tests look at its parts. Padded cases move the keypoints to places
among padding, their order kept.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kafjax.assignment import matching_loss
from kafjax.losses import cross_entropy, positive_pairs, supervised_contrastive_loss
from kafjax.models import build_model
from kafjax.torch_import import import_state_dict
from tests.release_weights import (
    by_release_names,
    draw_state_dict,
    golden_model_config,
    load_golden,
    whole_positions,
)


class Case(NamedTuple):
    name: str
    dtype: str
    padded: bool = False

    def __str__(self) -> str:
        return f"{self.name}-{self.dtype}" + ("-padded" if self.padded else "")


def _slow(*case: Any) -> Any:
    """Compiles for half a minute and shows little that the others do not."""
    return pytest.param(Case(*case), marks=pytest.mark.slow)


SEGMENTATION: list[Any] = [
    Case("unet", "float64"),
    _slow("unet", "float32"),
    _slow("kaf_unet", "float64"),
    Case("kaf_unet", "float64", padded=True),
    _slow("kaf_unet", "float32"),
]
PRETRAINING: list[Any] = [
    _slow("pretrain", "float64"),
    Case("pretrain", "float64", padded=True),
    _slow("pretrain", "float32"),
]
segmentation_cases = pytest.mark.parametrize("case", SEGMENTATION, ids=str)
pretraining_cases = pytest.mark.parametrize("case", PRETRAINING, ids=str)
all_cases = pytest.mark.parametrize("case", SEGMENTATION + PRETRAINING, ids=str)


def _pad(
    keypoints: np.ndarray, rng: np.random.Generator, num_padding: int = 80, edge: int = 64
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Moves [b, k, 2] to places among random padding: keypoints, mask and the places [b, k]."""
    b, k, _ = keypoints.shape
    places = np.stack([np.sort(rng.permutation(k + num_padding)[:k]) for _ in range(b)])
    padded = rng.integers(0, edge, (b, k + num_padding, 2), dtype=np.int32)
    mask = np.zeros((b, k + num_padding), bool)
    np.put_along_axis(mask, places, True, axis=1)
    np.put_along_axis(padded, np.repeat(places[..., None], 2, axis=2), keypoints, axis=1)
    return padded, mask, places


def _nhwc(images: np.ndarray) -> np.ndarray:
    return np.moveaxis(images, 1, -1)


def _variables(facts: Any, config: Any) -> dict[str, Any]:
    return import_state_dict(draw_state_dict(facts["state_dict"], facts["config"]["salt"]), config)


def _segmentation(case: Case, facts: Any, golden: Any) -> dict[str, Any]:
    config = golden_model_config(facts, case.dtype)
    variables = _variables(facts, config)
    model = build_model(config)
    image, keypoints = _nhwc(golden["image"]), golden["keypoints"]
    mask = np.ones(keypoints.shape[:2], bool)
    if case.padded:
        keypoints, mask, _ = _pad(keypoints, np.random.default_rng(0))

    def loss(params: Any) -> Any:
        logits, updated = model.apply(
            {**variables, "params": params},
            *(image, keypoints, mask),
            train=True,
            mutable=["batch_stats"],
        )
        return cross_entropy(logits, golden["label"]), (logits, updated["batch_stats"])

    def run(params: Any) -> Any:
        evaluated = model.apply(
            {**variables, "params": params}, image, keypoints, mask, train=False
        )
        return evaluated, jax.value_and_grad(loss, has_aux=True)(params)

    evaluated, ((value, (logits, stats)), gradient) = jax.jit(run)(variables["params"])
    return {
        "logits_eval": np.moveaxis(np.asarray(evaluated), -1, 1),
        "logits_train": np.moveaxis(np.asarray(logits), -1, 1),
        "loss_train": value,
        "after": stats,
        "gradient": gradient,
    }


def _pretraining(case: Case, facts: Any, golden: Any) -> dict[str, Any]:
    config = golden_model_config(facts, case.dtype)
    variables = _variables(facts, config)
    model = build_model(config)
    image = np.stack([_nhwc(golden[f"image_{i}"]) for i in (1, 2)], axis=1)
    keypoints: list[Any] = [golden["keypoints_1"], golden["keypoints_2"]]
    mask: list[Any] = [np.ones(k.shape[:2], bool) for k in keypoints]
    correspondence = golden["correspondence"]
    if case.padded:
        rng = np.random.default_rng(1)
        padded = [_pad(k, rng) for k in keypoints]
        keypoints, mask = [p[0] for p in padded], [p[1] for p in padded]
        correspondence = _renumber(correspondence, padded[0][2], padded[1][2], mask[0].shape[1])
    pairs = facts["config"]["threshold"]
    position = whole_positions(golden["slice_position"])
    positives = positive_pairs("pcl", position, position_threshold=pairs)
    weights = facts["config"]["weights"]

    def loss(params: Any) -> Any:
        output, updated = model.apply(
            {**variables, "params": params},
            *(image, np.stack(keypoints, axis=1), np.stack(mask, axis=1)),
            train=True,
            mutable=["batch_stats"],
        )
        terms = (
            supervised_contrastive_loss(output.cnn, positives),
            supervised_contrastive_loss(output.kaf, positives),
            jnp.mean(matching_loss(output.log_assignment, correspondence, mask[0], mask[1])),
        )
        total = sum(w * term for w, term in zip(weights, terms, strict=True))
        return total, (output, terms, updated["batch_stats"])

    (total, (output, terms, stats)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        variables["params"]
    )
    names = ("loss_global_cnn", "loss_global_kaf", "loss_local")
    return {
        "cnn_1": output.cnn[0],
        "cnn_2": output.cnn[1],
        "kaf_1": output.kaf[0],
        "kaf_2": output.kaf[1],
        **dict(zip(names, terms, strict=True)),
        "loss_total": total,
        "after": stats,
        "gradient": gradient,
    }


def _renumber(
    correspondence: np.ndarray, places_1: np.ndarray, places_2: np.ndarray, num_places: int
) -> np.ndarray:
    moved = np.full((len(correspondence), num_places), -1, np.int32)
    for b, row in enumerate(correspondence):
        for i, j in enumerate(row):
            if j >= 0:
                moved[b, places_1[b, i]] = places_2[b, j]
    return moved


@functools.cache
def results(case: Case) -> dict[str, Any]:
    facts, golden = load_golden(case.name)
    run = _pretraining if case.name == "pretrain" else _segmentation
    with jax.enable_x64(case.dtype == "float64"):
        return jax.device_get(run(case, facts, golden))


@segmentation_cases
def test_logits_in_evaluation_are_the_releases(case: Case) -> None:
    _, golden = load_golden(case.name)
    tolerance = {"float64": 1e-7, "float32": 1e-5}[case.dtype]
    np.testing.assert_allclose(
        results(case)["logits_eval"], golden["logits_eval"], rtol=tolerance, atol=tolerance
    )


@segmentation_cases
def test_logits_in_training_are_the_releases(case: Case) -> None:
    _, golden = load_golden(case.name)
    tolerance = {"float64": 1e-7, "float32": 1e-3}[case.dtype]
    np.testing.assert_allclose(
        results(case)["logits_train"], golden["logits_train"], rtol=tolerance, atol=tolerance
    )


@segmentation_cases
def test_running_means_after_a_step_are_the_releases(case: Case) -> None:
    _, golden = load_golden(case.name)
    found = by_release_names(results(case)["after"])
    names = [name for name in golden if name.startswith("after/")]
    assert names
    # Means of thousands of features near 1; each library rounds the sum differently.
    tolerance = {"float64": 1e-7, "float32": 1e-6}[case.dtype]
    for name in names:
        np.testing.assert_allclose(
            found[name.removeprefix("after/")],
            golden[name],
            rtol=tolerance,
            atol=tolerance,
            err_msg=name,
        )


@pretraining_cases
def test_embeddings_are_the_releases(case: Case) -> None:
    _, golden = load_golden(case.name)
    tolerance = {"float64": 1e-7, "float32": 1e-3}[case.dtype]
    for name in ("cnn_1", "cnn_2", "kaf_1", "kaf_2"):
        np.testing.assert_allclose(
            results(case)[name], golden[name], rtol=tolerance, atol=tolerance, err_msg=name
        )


@all_cases
def test_losses_are_the_releases(case: Case) -> None:
    _, golden = load_golden(case.name)
    tolerance = {"float64": 1e-8, "float32": 1e-4}[case.dtype]
    names = [name for name in golden if name.startswith("loss_")]
    assert len(names) == (4 if case.name == "pretrain" else 1)
    for name in names:
        np.testing.assert_allclose(results(case)[name], golden[name], rtol=tolerance, err_msg=name)


@all_cases
def test_every_gradient_norm_is_the_releases(case: Case) -> None:
    facts, _ = load_golden(case.name)
    found = {n: np.linalg.norm(g) for n, g in by_release_names(results(case)["gradient"]).items()}
    expected = facts["grad_norm"]
    assert found.keys() == expected.keys()
    # Zero in exact arithmetic, such as of a bias before batch norm: rounding is all there is.
    zero = {name for name, norm in expected.items() if norm < 1e-8}
    if case.dtype == "float64":
        assert {name for name in zero if found[name] >= 1e-8} == set()
    tolerance = {"float64": 1e-8, "float32": 2e-2}[case.dtype]
    off = {n: (found[n], e) for n, e in expected.items() if abs(found[n] - e) > tolerance * e}
    assert {name: pair for name, pair in off.items() if name not in zero} == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kaf_unet", "pretrain"])
def test_48_keypoints_give_the_same_step_in_128_places(name: str) -> None:
    plain, padded = (results(Case(name, "float64", padded=p)) for p in (False, True))
    # Outputs, losses, running statistics, and each entry of each gradient.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-8, atol=1e-9), plain, padded)


@pytest.mark.parametrize("name", ["unet", "kaf_unet"])
def test_bfloat16_stays_near_float32(name: str) -> None:
    facts, golden = load_golden(name)
    config = golden_model_config(facts, "bfloat16")
    model, variables = build_model(config), _variables(facts, config)
    inputs = (
        _nhwc(golden["image"]),
        golden["keypoints"],
        np.ones(golden["keypoints"].shape[:2], bool),
    )

    def run(variables: Any) -> Any:
        evaluated = model.apply(variables, *inputs, train=False)
        trained, updated = model.apply(variables, *inputs, train=True, mutable=["batch_stats"])
        return evaluated, trained, updated

    evaluated, trained, updated = jax.jit(run)(variables)
    assert evaluated.dtype == trained.dtype == jnp.bfloat16
    kept = jax.tree.leaves((variables, updated))
    assert {leaf.dtype for leaf in kept} == {np.dtype("float32")}

    def off(logits: Any, expected: np.ndarray) -> float:
        return float(np.abs(np.moveaxis(np.asarray(logits, np.float32), -1, 1) - expected).max())

    assert off(evaluated, golden["logits_eval"]) < 5e-2
    # Batch statistics magnify even the rounding of the weights, so here 5e-2 of the largest logit.
    assert off(trained, golden["logits_train"]) < 5e-2 * np.abs(golden["logits_train"]).max()


def test_float64_does_not_outlive_its_cases() -> None:
    results(Case("unet", "float64"))
    assert jnp.zeros(1).dtype == jnp.float32
