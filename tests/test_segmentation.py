"""The segmentation task: its loss and Dice by counting, labels that move with slices, devices."""

from typing import Any

import jax
import numpy as np
import pytest

from kafjax import losses
from kafjax.configs import chd_pretrain, phantom_finetune
from kafjax.models import build_model
from kafjax.tasks.segmentation import Segmentation

NUM_CLASSES = 3
TINY = {
    "model.name": "unet",
    "model.filters": 4,
    "model.num_attention_layers": 2,
    "model.num_classes": NUM_CLASSES,
}


def tiny_task(*, axis_name: str | None = None, augment: bool = False, **overrides: Any):
    config = phantom_finetune.get_config()
    config.update_from_flattened_dict({**TINY, **overrides})
    if augment:
        config.augment = chd_pretrain.get_config().augment
    return Segmentation(config, axis_name=axis_name)


def random_batch(batch_size: int = 4, *, seed: int = 0) -> dict[str, Any]:
    """Slices of noise, 32 x 32, whose labels are lumps."""
    rng = np.random.default_rng(seed)
    rows, cols = np.indices((32, 32))
    centre = rng.uniform(8, 24, (batch_size, 2, 1, 1))
    distance = np.hypot(rows - centre[:, 0], cols - centre[:, 1])
    return {
        "image": rng.standard_normal((batch_size, 32, 32, 1)).astype(np.float32),
        "label": np.digitize(-distance, [-9, -5]).astype(np.int32),
        "keypoints": rng.integers(0, 32, (batch_size, 8, 2)).astype(np.int32),
        "keypoint_mask": rng.random((batch_size, 8)) < 0.7,
        "record": np.arange(batch_size, dtype=np.int32),
        "sample": np.arange(batch_size, dtype=np.uint32) + 100 * seed,
        "seed": np.zeros(batch_size, np.uint32),
    }


def dice_by_loops(prediction: np.ndarray, label: np.ndarray) -> list[float]:
    scores = []
    for number in range(1, NUM_CLASSES):
        a = {i for i, p in enumerate(prediction.flat) if p == number}
        b = {i for i, p in enumerate(label.flat) if p == number}
        scores.append(2 * len(a & b) / (len(a) + len(b)))
    return scores


@pytest.fixture(scope="module")
def task() -> Segmentation:
    return tiny_task()


@pytest.fixture(scope="module")
def variables(task: Segmentation) -> dict[str, Any]:
    return task.init()


def test_loss_is_cross_entropy_and_dice_of_the_batch_statistics(task, variables) -> None:
    batch = random_batch()
    total, (metrics, batch_stats) = jax.jit(task.loss)(
        variables["params"], variables["batch_stats"], batch
    )
    config = phantom_finetune.get_config()
    config.update_from_flattened_dict(TINY)
    inputs = (batch[field] for field in ("image", "keypoints", "keypoint_mask"))
    logits, updated = build_model(config.model, head="segmentation").apply(
        variables, *inputs, train=True, mutable=["batch_stats"]
    )
    logits = np.asarray(logits, np.float64)
    picked = np.take_along_axis(logits, batch["label"][..., None], axis=-1)[..., 0]
    entropy = np.log(np.exp(logits).sum(-1)) - picked
    np.testing.assert_allclose(total, entropy.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], entropy.mean(), rtol=1e-5)
    scores = dice_by_loops(logits.argmax(-1), batch["label"])
    np.testing.assert_allclose(metrics["dice"], np.mean(scores), rtol=1e-4)
    assert metrics["keypoints"] == batch["keypoint_mask"].sum(1).mean()
    for found, expected in zip(
        jax.tree.leaves(batch_stats), jax.tree.leaves(updated["batch_stats"]), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_batch_spread_over_devices_has_the_loss_and_dice_of_the_whole(task, variables) -> None:
    batch = random_batch()
    spread = tiny_task(axis_name="batch")
    halves = {field: values.reshape(2, 2, *values.shape[1:]) for field, values in batch.items()}

    def device(half: dict[str, jax.Array]) -> Any:
        _, (metrics, batch_stats) = spread.loss(variables["params"], variables["batch_stats"], half)
        return jax.lax.pmean((metrics, batch_stats), "batch")

    found = jax.jit(jax.vmap(device, axis_name="batch"))(halves)
    _, expected = jax.jit(task.loss)(variables["params"], variables["batch_stats"], batch)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a[0], b, rtol=1e-3, atol=1e-5)


def test_the_total_loss_is_the_weighted_sum_of_cross_entropy_and_dice(variables) -> None:
    weights = (1.0, 2.0, 4.0)
    both = tiny_task(
        **{
            "loss.weights.dice": 0.5,
            "loss.class_weights": weights,
            "loss.weights.cross_entropy": 2.0,
        }
    )
    batch = random_batch()
    total, (metrics, _) = jax.jit(both.loss)(variables["params"], variables["batch_stats"], batch)
    expected = 2 * metrics["loss_cross_entropy"] + 0.5 * metrics["loss_dice"]
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    inputs = (batch[field] for field in ("image", "keypoints", "keypoint_mask"))
    logits, _ = build_model(both._config.model, head="segmentation").apply(
        variables, *inputs, train=True, mutable=["batch_stats"]
    )
    for name, loss in (("cross_entropy", losses.cross_entropy), ("dice", losses.dice_loss)):
        found = loss(logits, batch["label"], class_weights=weights)
        np.testing.assert_allclose(metrics[f"loss_{name}"], found, rtol=1e-4)


def test_labels_and_keypoints_move_with_their_slice() -> None:
    augmenting = tiny_task(augment=True)
    batch = random_batch(8)
    batch["image"] = np.where(batch["label"] > 0, 1.0, 0.0).astype(np.float32)[..., None]
    inside = np.stack([np.argwhere(label > 0)[::20][:8] for label in batch["label"]])
    batch.update(keypoints=inside.astype(np.int32), keypoint_mask=np.ones(inside.shape[:2], bool))
    moved = jax.tree.map(np.asarray, jax.jit(augmenting.augment)(batch))
    assert moved["label"].dtype == np.int32
    agree = (moved["image"][..., 0] > 0.5) == (moved["label"] > 0)
    assert agree.mean() > 0.99
    assert np.mean(moved["label"] != batch["label"]) > 0.1
    b, k = np.nonzero(moved["keypoint_mask"])
    assert len(b) > 20
    assert np.mean(moved["label"][b, *moved["keypoints"][b, k].T] > 0) > 0.95


def test_augmentation_is_a_function_of_seed_and_sample() -> None:
    augment = jax.jit(tiny_task(augment=True).augment)
    batch = random_batch()
    once = augment(batch)
    part = augment({field: values[2:] for field, values in batch.items()})
    np.testing.assert_allclose(part["image"], once["image"][2:], atol=1e-5)
    other = augment({**batch, "sample": batch["sample"] + 1})
    assert np.abs(np.asarray(other["image"] - once["image"])).max() > 0.5


def test_without_augmentation_slices_stay_as_they_are(task) -> None:
    batch = random_batch()
    assert task.augment(batch) is batch


def test_counts_add_up_to_the_dice_of_the_valid_slices(task, variables) -> None:
    batch = random_batch(6)
    predict = jax.jit(task.predict)
    logits = np.asarray(predict(variables, batch))
    assert logits.shape == (6, 32, 32, NUM_CLASSES)
    counts, classes = jax.jit(task.count)(variables, {**batch, "valid": np.arange(6) < 5})
    assert counts.shape == (6, NUM_CLASSES, 3)
    np.testing.assert_array_equal(classes, logits.argmax(-1))
    assert not counts[5].any()
    for i in (0, 4):
        pixels = np.bincount(batch["label"][i].ravel(), minlength=NUM_CLASSES)
        np.testing.assert_array_equal(counts[i, :, 2], pixels)
    scores = task.scores(np.asarray(counts, np.int64).sum(axis=0))
    expected = dice_by_loops(logits[:5].argmax(-1), batch["label"][:5])
    assert scores["validation_dice"] == pytest.approx(np.mean(expected))
    assert scores["validation_dice_1"] == pytest.approx(expected[0])
    assert scores["validation_dice_2"] == pytest.approx(expected[1])


def test_classes_that_nobody_has_are_left_out_of_the_mean(task) -> None:
    assert task.scores(np.array([[9, 9, 9], [0, 0, 0], [1, 2, 2]])) == {
        "validation_dice": 0.5,
        "validation_dice_2": 0.5,
    }
    assert np.isnan(task.scores(np.zeros((3, 3), np.int64))["validation_dice"])


def test_initial_variables_follow_the_seed(task, variables) -> None:
    same, other = tiny_task().init(), tiny_task(seed=1).init()
    kernel = variables["params"]["decoder"]["head"]["conv"]["kernel"]
    np.testing.assert_array_equal(same["params"]["decoder"]["head"]["conv"]["kernel"], kernel)
    assert np.abs(other["params"]["decoder"]["head"]["conv"]["kernel"] - kernel).min() > 0


def test_picture_shows_the_slice_and_its_labels_in_colour(task) -> None:
    batch = random_batch()
    batch["keypoint_mask"][:] = False
    (picture,) = task.picture(batch).values()
    assert picture.dtype == np.uint8
    height, width, _ = picture.shape
    assert width == 2 * height
    zoom = height // 32
    left, right = picture[::zoom, : width // 2 : zoom], picture[::zoom, width // 2 :: zoom]
    assert (left == left[..., :1]).all()
    coloured = (right != right[..., :1]).any(-1)
    np.testing.assert_array_equal(coloured, batch["label"][0] > 0)
