"""Validation counts every pixel of every slice once, and the loop keeps the best by its score."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import jax
import ml_collections
import numpy as np
import pytest

from kafjax.checkpoint import checkpointer as checkpoint
from kafjax.configs import phantom_scratch
from kafjax.data.batches import BatchOptions
from kafjax.data.dataset import labelled_volumes, open_dataset
from kafjax.data.splits import split_volumes
from kafjax.drawing import segmentations as drawing
from kafjax.segmentation_metrics import count_pixels
from kafjax.training import loop as train_module
from kafjax.training.loop import train
from kafjax.training.step import TrainState, replicate
from kafjax.training.validation import Validation
from kafjax.workdir.metrics import read_metrics

NUM_CLASSES = 8


def tiny_config(dataset: Path, **overrides: Any) -> ml_collections.ConfigDict:
    """Two folds of the four phantoms, a plain UNet, three steps an epoch."""
    config = phantom_scratch.get_config()
    config.update_from_flattened_dict(
        {
            "batch_size": 8,
            "data.dir": str(dataset.parents[1]),
            "data.patch_size": (32, 32),
            "data.num_folds": 2,
            "model.name": "unet",
            "model.filters": 4,
            "model.num_classes": 8,
            "every.log": 100,
            "every.picture": 0,
            "every.checkpoint": 100,
            **overrides,
        }
    )
    return config


class Labels:
    """A task that predicts every slice's label, except one class that it never finds."""

    facts = None

    def count(self, variables: Any, batch: Any) -> Any:
        del variables
        found = jax.numpy.where(batch["label"] == 3, 0, batch["label"])
        counts = [
            count_pixels(found[i], batch["label"][i], NUM_CLASSES, valid=batch["valid"][i])
            for i in range(len(found))
        ]
        return jax.numpy.stack(counts), found.astype(np.uint8)

    def scores(self, counts: np.ndarray) -> dict[str, Any]:
        return {"counts": counts}


@pytest.mark.parametrize("batch_size", [1, 5, 8, 40])
def test_every_pixel_counts_once_in_any_batches(phantom_dataset: Path, batch_size: int) -> None:
    dataset = open_dataset(phantom_dataset.parents[1], "phantom")
    names = list(dataset.volumes)[1:3]
    options = BatchOptions(batch_size=batch_size, patch_size=(64, 80), seed=0, num_threads=2)
    state = replicate(TrainState(np.int32(0), {}, {}, {}))
    found = Validation(Labels(), dataset, options, names).scores(state)["counts"]
    records = [record for name in names for record in dataset.volumes[name]]
    labels = np.stack([dataset.read(record, with_label=True).label for record in records])
    expected = np.bincount(labels.ravel(), minlength=NUM_CLASSES)
    padding = len(labels) * 64 * 16
    np.testing.assert_array_equal(found[1:, 2], expected[1:])
    assert found[0, 2] == expected[0] + padding
    assert found[3].tolist() == [0, 0, expected[3]]
    np.testing.assert_array_equal(found[4:, 0], expected[4:])


@pytest.mark.parametrize("batch_size", [2, 8])
def test_pictures_show_the_worst_and_best_slices(
    phantom_dataset: Path, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(phantom_dataset.parents[1], "phantom")
    names = list(dataset.volumes)[1:3]
    options = BatchOptions(batch_size=batch_size, patch_size=(64, 64), seed=0, num_threads=2)
    state = replicate(TrainState(np.int32(0), {}, {}, {}))
    drawn: list[Any] = []
    draw = drawing.draw_segmentations
    monkeypatch.setattr(
        drawing, "draw_segmentations", lambda rows, *names: drawn.append(rows) or draw(rows, *names)
    )
    slices = Validation(Labels(), dataset, options, names)
    slices.scores(state)
    pictures = slices.pictures(state)
    assert list(pictures) == ["validation_worst", "validation_best"]
    assert all(p.dtype == np.uint8 and p.ndim == 3 for p in pictures.values())
    # Without class 3 the Dice of a slice that has it is a mean over one class more, with 0.
    expected = {}
    for name in names:
        for i, record in enumerate(dataset.volumes[name]):
            found = set(np.unique(dataset.read(record, with_label=True).label)) - {0}
            if found:
                expected[f"{name} slice {i}"] = len(found - {3}) / len(found)
    assert min(expected.values()) < max(expected.values()) == 1
    order = sorted(expected.values())
    for rows, wanted in zip(drawn, (order[:3], order[::-1][:3]), strict=True):
        assert [expected[row.title] for row in rows] == pytest.approx(wanted)
        for row in rows:
            assert row.panels()[2][1] == f"Dice {expected[row.title]:.3f}"
            label, (prediction,) = row.reference, row.predictions
            np.testing.assert_array_equal(prediction, np.where(label == 3, 0, label))
            assert label.any()


def test_labelled_volumes_are_those_with_labels(phantom_dataset: Path) -> None:
    dataset = open_dataset(phantom_dataset.parents[1], "phantom")
    names = list(dataset.volumes)
    dataset.metadata["volumes"][names[2]] = {"labelled": False}
    assert labelled_volumes(dataset) == (*names[:2], names[3])


def steps_that_only_count(task: Any, optimizer: Any, *, average_decay: float) -> Callable[..., Any]:
    del task, optimizer, average_decay

    def update(state: Any, batch: Any, learning_rate: Any, stop: jax.Array) -> Any:
        del batch, learning_rate
        metrics = {"loss": np.float32(1), "stop": stop[0]}
        return state.replace(step=state.step + 1), metrics

    return update


class Scores:
    """Stands in for `Validation`: a score by step, its volumes, and the steps of its pictures."""

    volumes: tuple[str, ...] = ()
    drawn: ClassVar[list[int]] = []

    def __init__(self, task: Any, dataset: Any, options: Any, volumes: tuple[str, ...]):
        del task, dataset, options
        Scores.volumes = volumes

    def scores(self, state: TrainState) -> dict[str, float]:
        return {"validation_dice": {6: 0.3, 12: 0.7, 18: 0.5, 20: 0.4}[int(state.step)]}

    def pictures(self, state: TrainState) -> dict[str, np.ndarray]:
        Scores.drawn.append(int(state.step))
        return {"validation_worst": np.zeros((8, 8, 3), np.uint8)}


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "make_update", steps_that_only_count)
    monkeypatch.setattr(train_module, "Validation", Scores)


def test_ten_steps_make_no_implicit_transfer(phantom_dataset: Path, tmp_path: Path) -> None:
    """Real steps with their logs, pictures, validation and checkpoints."""
    every = {
        "every.log": 1,
        "every.picture": 3,
        "every.checkpoint": 4,
        "every.validation_epochs": 1,
    }
    with jax.transfer_guard("disallow"):
        with pytest.raises(RuntimeError, match="Disallowed host-to-device transfer"):
            jax.jit(lambda x: x)(np.ones(2))
        assert train(tiny_config(phantom_dataset, num_steps=10, **every), tmp_path) is None
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 11))
    assert [row["step"] for row in rows if "validation_dice" in row] == [3, 6, 9, 10]


@pytest.mark.usefixtures("cheap")
def test_best_by_dice_and_newest_are_kept(phantom_dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(
        phantom_dataset, num_steps=20, **{"every.validation_epochs": 2, "every.checkpoint": 7}
    )
    assert train(config, tmp_path) is None
    rows = [row for row in read_metrics(tmp_path) if "validation_dice" in row]
    assert [row["step"] for row in rows] == [6, 12, 18, 20]
    kept = checkpoint.saved_metrics(tmp_path)
    assert sorted(kept) == [12, 20]
    assert kept[12]["validation_dice"] == 0.7


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize(("every", "expected"), [(0, []), (13, [6, 18, 20]), (1, [6, 12, 18, 20])])
def test_slices_are_drawn_first_last_and_every_so_many_steps(
    phantom_dataset: Path, tmp_path: Path, every: int, expected: list[int]
) -> None:
    Scores.drawn = []
    settings = {"every.validation_epochs": 2, "every.picture": every}
    train(tiny_config(phantom_dataset, num_steps=20, **settings), tmp_path)
    assert Scores.drawn == expected


@pytest.mark.usefixtures("cheap")
def test_best_is_kept_over_a_resume(phantom_dataset: Path, tmp_path: Path) -> None:
    for num_steps in (12, 20):
        settings = {"every.validation_epochs": 2}
        assert (
            train(tiny_config(phantom_dataset, num_steps=num_steps, **settings), tmp_path) is None
        )
    assert sorted(checkpoint.saved_metrics(tmp_path)) == [12, 20]


@pytest.mark.usefixtures("cheap")
def test_a_fold_is_validated_on_its_own_volumes(phantom_dataset: Path, tmp_path: Path) -> None:
    settings = {"every.validation_epochs": 0, "data.fold": 1, "data.num_labeled": 1}
    config = tiny_config(phantom_dataset, num_epochs=20, **settings)
    assert train(config, tmp_path) is None
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [20, 20]  # one step an epoch
    names = [f"ct_{1001 + i}" for i in range(4)]
    assert Scores.volumes == split_volumes(names, fold=1, num_labeled=1, num_folds=2).validation


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"data.fold": 2}, "fold is 2, expected a number below config.data.num_folds"),
        ({"data.num_labeled": 3}, "num_labeled is 3; expected 1 to 2"),
        ({"model.num_classes": 5}, "num_classes is 5, expected 8: .* has background, "),
        (
            {"task": "classify"},
            "task is 'classify', expected one of pretrain, local_contrast, segment",
        ),
    ],
)
def test_mistakes_leave_no_workdir(
    phantom_dataset: Path, tmp_path: Path, overrides: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        train(tiny_config(phantom_dataset, **overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()
