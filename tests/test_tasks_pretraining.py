"""The pretraining task: augmentation of batches, weights of the losses, pictures."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from kafjax.augment import AugmentConfig, augment_pair
from kafjax.tasks.pretraining import Pretraining, skipped_shares
from tests.runs import PLAIN, random_batch, tiny_config

DATASET = Path("a/b/c")  # configs only name it


@pytest.fixture(scope="module")
def task() -> Pretraining:
    return Pretraining(tiny_config(DATASET))


def test_augmentation_is_that_of_each_sample_by_itself(task: Pretraining) -> None:
    batch = random_batch(3, 16)
    together = jax.jit(task.augment)(batch)
    root = jax.random.key(0)
    for i in (0, 2):
        views = [
            (batch["image"][i, v], batch["keypoints"][i, v], batch["keypoint_mask"][i, v])
            for v in range(2)
        ]
        key = jax.random.fold_in(root, batch["sample"][i])
        *alone, correspondence = augment_pair(
            key, *views, batch["correspondence"][i], config=AugmentConfig()
        )
        for v, (image, keypoints, mask) in enumerate(alone):
            np.testing.assert_allclose(together["image"][i, v], image, atol=1e-3)
            np.testing.assert_array_equal(together["keypoints"][i, v], keypoints)
            np.testing.assert_array_equal(together["keypoint_mask"][i, v], mask)
        np.testing.assert_array_equal(together["correspondence"][i], correspondence)
    assert np.any(together["keypoint_mask"] != batch["keypoint_mask"])


def test_sample_number_decides_the_augmentation(task: Pretraining) -> None:
    batch = random_batch(2, 16)
    batch["image"][1] = batch["image"][0]
    first = jax.jit(task.augment)(batch)
    again = jax.jit(task.augment)(batch)
    np.testing.assert_array_equal(first["image"], again["image"])
    assert np.abs(first["image"][0] - first["image"][1]).max() > 0.1


def metrics_of(batch: dict[str, np.ndarray], **overrides: Any) -> dict[str, Any]:
    """The names of a step's metrics and its total loss, without compiling it."""
    task = Pretraining(tiny_config(DATASET, **overrides))
    variables = task.init()
    _, (metrics, _) = jax.eval_shape(
        task.loss, variables["params"], variables["batch_stats"], batch
    )
    return metrics


def test_terms_follow_weights_and_heads() -> None:
    batch = random_batch(2, 16)
    assert {"loss_cnn", "loss_kaf", "loss_matching"} <= metrics_of(batch).keys()
    without = metrics_of(batch, **{"loss.weights.matching": 0.0})
    assert "loss_matching" not in without
    assert "loss_kaf" in without
    plain = metrics_of(batch, **PLAIN)
    assert "loss_cnn" in plain
    assert not {"loss_kaf", "loss_matching"} & plain.keys()


@pytest.mark.parametrize(
    ("weights", "heads"),
    [
        ((1.0, 1.0, 0.01), {"cnn_head", "kaf_head", "matcher", "fuse_levels"}),
        ((1.0, 1.0, 0.0), {"cnn_head", "kaf_head", "fuse_levels"}),
        ((0.0, 0.0, 1.0), {"matcher", "fuse_levels"}),
        ((1.0, 0.0, 0.0), {"cnn_head"}),
    ],
)
def test_a_weight_of_0_takes_its_head_away(weights: tuple[float, ...], heads: set[str]) -> None:
    names = ("cnn", "kaf", "matching")
    fields = {f"loss.weights.{name}": w for name, w in zip(names, weights, strict=True)}
    task = Pretraining(tiny_config(DATASET, **fields))
    variables = task.init()
    assert set(variables["params"]) == {"encoder", *heads}
    inputs = variables["params"], variables["batch_stats"], random_batch(2, 16)
    _, (metrics, statistics) = jax.eval_shape(task.loss, *inputs)
    weighted = {name for name, w in zip(names, weights, strict=True) if w}
    assert {name for name in names if f"loss_{name}" in metrics} == weighted
    assert set(statistics) <= {"encoder", *heads}


def test_what_losses_pass_over_is_counted() -> None:
    mask, correspondence = np.ones((4, 2, 3), bool), np.full((4, 3), -1)
    mask[0] = mask[2, 1] = False
    correspondence[1, 2] = 0
    positives = np.eye(4, dtype=bool)
    positives[0, 1] = positives[1, 0] = True
    assert skipped_shares(mask, correspondence, positives) == {
        "slices_without_keypoints": 3 / 8,
        "pairs_without_correspondence": 3 / 4,
        "samples_without_positive": 2 / 4,
    }


def test_picture_shows_the_first_pair(task: Pretraining) -> None:
    (name, image), *rest = task.picture(random_batch(2, 16)).items()
    assert (name, rest) == ("pair", [])
    assert image.dtype == np.uint8
    assert image.shape[1] > 64
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 20
