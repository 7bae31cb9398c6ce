"""Whole slices from tiles: a pixel-wise network must give the same result without tiles."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from kafjax.checkpoint.checkpointer import Checkpointer
from kafjax.configs import phantom_finetune
from kafjax.inference import predictor as inference
from kafjax.inference.predictor import Predictor, load_predictor
from kafjax.models import build_model
from kafjax.tasks.segmentation import Segmentation
from kafjax.workdir.workdir import Workdir

SIZES = [(16, 16), (9, 20), (40, 33), (16, 17), (3, 3)]


def tiny_config(**overrides: Any) -> Any:
    config = phantom_finetune.get_config()
    tiny = {"model.name": "unet", "model.filters": 4, "model.num_classes": 8}
    tiny |= {"data.patch_size": (16, 16), "batch_size": 4}
    config.update_from_flattened_dict({**tiny, **overrides})
    return config


def random_view(size: tuple[int, int], *, seed: int) -> inference.View:
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((*size, 1)).astype(np.float32)
    return image, rng.integers(0, size, (6, 2)).astype(np.int32), rng.random(6) < 0.7


def pixelwise(batch: dict[str, np.ndarray]) -> np.ndarray:
    image = batch["image"]
    return np.concatenate([image, image**2, 1 - image - image**2], axis=-1)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_tiles_in_any_batches_make_the_slices(
    monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    sizes = []

    def predict(batch: dict[str, np.ndarray]) -> np.ndarray:
        sizes.append(batch["image"].shape)
        return pixelwise(batch)

    monkeypatch.setattr(inference, "make_predict", lambda task, variables: predict)
    predictor = Predictor(tiny_config(), {}, batch_size=batch_size)
    views = [random_view(size, seed=i) for i, size in enumerate(SIZES)]
    found = list(predictor.probabilities(views))
    assert [p.shape[:2] for p in found] == SIZES
    for probabilities, (image, _, _) in zip(found, views, strict=True):
        np.testing.assert_allclose(probabilities, pixelwise({"image": image}), rtol=1e-4, atol=1e-5)
    assert set(sizes) == {(batch_size, 16, 16, 1)}


def test_keypoints_go_with_their_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = []

    def predict(batch: dict[str, np.ndarray]) -> np.ndarray:
        for image, keypoints, mask in zip(
            batch["image"], batch["keypoints"], batch["keypoint_mask"], strict=True
        ):
            tiles.extend(image[tuple(place)][0] for place in keypoints[mask])
        return pixelwise(batch)

    monkeypatch.setattr(inference, "make_predict", lambda task, variables: predict)
    image, keypoints, mask = random_view((16, 40), seed=0)
    list(Predictor(tiny_config(), {}, batch_size=1).probabilities([(image, keypoints, mask)]))
    real = [image[tuple(place)][0] for place in keypoints[mask]]
    assert set(tiles) == set(real)
    assert len(tiles) > len(real)  # tiles overlap


def test_tiles_have_no_more_places_than_their_keypoints_need(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inference, "_PLACES_STEP", 4)
    shapes = []

    def predict(batch: dict[str, np.ndarray]) -> np.ndarray:
        shapes.append(batch["keypoint_mask"].shape[1])
        return pixelwise(batch)

    monkeypatch.setattr(inference, "make_predict", lambda task, variables: predict)
    image, keypoints, mask = np.zeros((16, 40, 1), np.float32), np.zeros((30, 2), int), np.ones(30)
    keypoints[:, 1] = np.arange(30)  # 16 in the first tile, 14 in the second, 6 in the last
    predictor = Predictor(tiny_config(), {}, batch_size=1)
    list(predictor.probabilities([(image, keypoints, mask.astype(bool))]))
    assert set(shapes) == {16}
    whole = image[:, :16], np.minimum(keypoints, 15), mask.astype(bool)
    list(predictor.probabilities([whole]))
    assert shapes[-1] == 30


def test_probabilities_are_the_networks_softmax() -> None:
    config = tiny_config()
    variables = Segmentation(config).init()
    views = [random_view((16, 16), seed=i) for i in range(3)]
    found = np.stack(list(Predictor(config, variables, batch_size=2).probabilities(views)))
    inputs = [np.stack(field) for field in zip(*views, strict=True)]
    logits = build_model(config.model, head="segmentation").apply(variables, *inputs, train=False)
    np.testing.assert_allclose(found, jax.nn.softmax(logits), rtol=1e-4, atol=1e-6)


def test_batches_that_devices_do_not_divide_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "local_device_count", lambda: 3)
    with pytest.raises(ValueError, match="batch_size is 4, expected a positive multiple of the 3"):
        Predictor(tiny_config(), {}, batch_size=4)


def save(workdir: Path, config: Any, scores: dict[int, float], variables: Any) -> None:
    Workdir(workdir).write_config(config.to_dict())
    with Checkpointer(
        workdir, keep_newest=len(scores), best_metric="validation_dice"
    ) as checkpointer:
        for step, score in scores.items():
            metrics = {"validation_dice": score}
            checkpointer.save(step, variables(step), metrics=metrics, data={})


def test_best_step_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {2: 0.5, 4: float("nan"), 6: 0.75, 8: 0.75, 9: 0.6}
    save(tmp_path, tiny_config(), scores, lambda step: {"params": {"a": np.float32([step])}})
    loaded = []
    monkeypatch.setattr(inference, "make_predict", lambda task, variables: loaded.append(variables))
    load_predictor(tmp_path)
    load_predictor(tmp_path, step=4)
    assert [variables["params"]["a"].item() for variables in loaded] == [8, 4]


def test_newest_step_is_loaded_where_nothing_was_validated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {0: float("nan"), 3: float("nan")}
    save(tmp_path, tiny_config(), scores, lambda step: {"params": {"a": np.float32([step])}})
    loaded = []
    monkeypatch.setattr(inference, "make_predict", lambda task, variables: loaded.append(variables))
    load_predictor(tmp_path)
    assert loaded[0]["params"]["a"].item() == 3
