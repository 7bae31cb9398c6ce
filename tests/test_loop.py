"""The loop, with a step that costs nothing: cadence, retention, failures and signals."""

import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import pytest

from kafjax.checkpoint.checkpointer import load_variables, saved_steps
from kafjax.checkpoint.files import read_meta, read_state
from kafjax.configs import phantom_scratch
from kafjax.data.batches import BatchOptions, evaluation_batches
from kafjax.losses import collapsed_loss
from kafjax.tasks.segmentation import Segmentation
from kafjax.training import loop as train_module
from kafjax.training import plateau
from kafjax.training.loop import train
from kafjax.training.preflight import open_run_dataset, split_run
from kafjax.training.step import init_state, make_optimizer
from kafjax.workdir.metrics import read_metrics
from kafjax.workdir.workdir import Workdir
from tests import runs


def tiny_config(dataset: Path, **overrides: Any) -> ml_collections.ConfigDict:
    return runs.tiny_config(dataset, **{"every.picture": 0, **overrides})


def steps_of(
    loss: Callable[[int], float], others: Mapping[str, Callable[[int], float]] | None = None
) -> Callable[..., Any]:
    """A stand-in for `make_update` whose step only counts, with a chosen loss and metrics."""

    def make_update(task: Any, optimizer: Any, *, average_decay: float) -> Callable[..., Any]:
        del task, optimizer, average_decay

        def update(state: Any, batch: Any, learning_rate: jax.Array, stop: jax.Array) -> Any:
            del batch, learning_rate
            step = int(state.step) + 1
            values = {"loss": loss, **(others or {})}
            metrics = {name: np.float32(value(step)) for name, value in values.items()}
            return state.replace(step=np.int32(step)), {**metrics, "stop": stop[0]}

        return update

    return make_update


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "make_update", steps_of(lambda step: 100.0 / step))


@pytest.mark.usefixtures("cheap")
def test_logs_means_and_keeps_newest_and_best(phantom_dataset: Path, tmp_path: Path) -> None:
    overrides = {"every.log": 3, "every.checkpoint": 2, "checkpoint.keep_newest": 2}
    config = tiny_config(phantom_dataset, num_steps=7, **overrides)
    assert train(config, tmp_path) is None
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [3, 6, 7]
    assert rows[0]["loss"] == pytest.approx(np.mean([100.0, 50.0, 100 / 3]))
    assert rows[1]["epoch"] == 1.0
    steps = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert steps == [6, 7]


@pytest.mark.usefixtures("cheap")
def test_a_kill_at_any_moment_loses_no_more_than_an_interval(
    phantom_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of a millisecond overtake a save, which takes fifty."""
    lost = []
    write = train_module.MetricWriter.write

    def look(writer: Any, step: int, *values: Any) -> None:
        write(writer, step, *values)
        lost.append(step - max(saved_steps(tmp_path), default=0))

    monkeypatch.setattr(train_module.MetricWriter, "write", look)
    for num_steps in (7, 14):  # from scratch and resumed
        train(
            tiny_config(phantom_dataset, num_steps=num_steps, **{"every.checkpoint": 3}), tmp_path
        )
    assert len(lost) == 14
    assert max(lost) == 3


@pytest.mark.usefixtures("cheap")
def test_means_continue_over_a_resume(phantom_dataset: Path, tmp_path: Path) -> None:
    for num_steps in (4, 6):
        config = tiny_config(phantom_dataset, num_steps=num_steps, **{"every.log": 5})
        assert train(config, tmp_path) is None
    # Step 4 ended the first run, which logs its last step.
    assert [row["step"] for row in read_metrics(tmp_path)] == [4, 5, 6]


def test_a_run_on_the_plateau_says_so_once_and_at_its_end(
    phantom_dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    level = collapsed_loss(8, 0.1)
    monkeypatch.setattr(plateau, "PLATEAU_STEPS", 3)
    losses = steps_of(lambda step: 1.0, {"loss_cnn": lambda step: level if step != 5 else 1.0})
    monkeypatch.setattr(train_module, "make_update", losses)
    for num_steps in (7, 9):  # resumed in between
        train(tiny_config(phantom_dataset, num_steps=num_steps, **{"every.log": 1}), tmp_path)
    printed = capsys.readouterr().out.splitlines()
    told = [line.split(": within")[0] for line in printed if "all embeddings are equal" in line]
    assert told[:2] == ["step 3", "step 8"]
    assert told[2].startswith("within 1 %")
    assert len(told) == 3


def test_loss_that_is_not_finite_stops_with_step_and_slices(
    phantom_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = steps_of(lambda step: float("nan") if step == 3 else 1.0)
    monkeypatch.setattr(train_module, "make_update", losses)
    with pytest.raises(FloatingPointError, match=r"nan at step 3; .*ct_100\d slice \d"):
        train(tiny_config(phantom_dataset, num_steps=9), tmp_path)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_stops(
    phantom_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def loss(step: int) -> float:
        if step == 3:
            os.kill(os.getpid(), number)
        return 1.0

    before = signal.getsignal(number)
    monkeypatch.setattr(train_module, "make_update", steps_of(loss))
    assert train(tiny_config(phantom_dataset, num_steps=50), tmp_path) == number
    assert signal.getsignal(number) is before
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert 4 <= int(saved.name) <= 6
    assert read_metrics(tmp_path)[-1]["step"] == int(saved.name)


def test_batch_that_devices_do_not_divide_is_refused(
    phantom_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "device_count", lambda: 3)
    with pytest.raises(ValueError, match="batch_size is 8, expected a multiple of the 3 devices"):
        train(tiny_config(phantom_dataset), tmp_path)
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    with pytest.raises(ValueError, match="of the 4 devices times num_microbatches 4"):
        train(tiny_config(phantom_dataset, num_microbatches=4), tmp_path)


@pytest.mark.usefixtures("cheap")
def test_workdir_of_another_config_is_refused(phantom_dataset: Path, tmp_path: Path) -> None:
    train(tiny_config(phantom_dataset, num_steps=1), tmp_path)
    other = tiny_config(phantom_dataset, num_steps=1, **{"seed": 1, "model.filters": 8})
    with pytest.raises(ValueError, match=r"(?s)model.filters: 4 there, 8 here.*seed: 0 there"):
        train(other, tmp_path)


def recipe_config(dataset: Path, **overrides: Any) -> ml_collections.ConfigDict:
    """A tiny fine-tuning run with every piece of the recipe for own data switched on."""
    config = phantom_scratch.get_config()
    config.update_from_flattened_dict(
        {
            **{name: runs.OVERRIDES[name] for name in ("data.patch_size", "model.filters")},
            "data.dir": str(dataset.parents[1]),
            "data.num_folds": 2,
            "data.num_labeled": 1,
            "data.foreground_share": 0.3,
            "model.name": "unet",
            "model.norm": "instance",
            "model.num_classes": 8,
            "batch_size": 4,
            "loss.weights.dice": 1.0,
            "loss.class_weights": (1.0, *[2.0] * 7),
            "augment.intensity.probability": 1.0,
            "augment.transform.spatial_probability": 0.5,
            "optimizer.warmup": 0.1,
            "optimizer.average_decay": 0.9,
            "every.log": 1,
            "every.picture": 0,
            "every.validation_epochs": 1,
            **overrides,
        }
    )
    return config


def test_a_run_with_averaged_weights_resumes_bit_for_bit_and_validates_by_them(
    phantom_dataset: Path, tmp_path: Path
) -> None:
    resumed, undisturbed = tmp_path / "resumed", tmp_path / "undisturbed"
    for num_steps in (4, 6):
        assert train(recipe_config(phantom_dataset, num_steps=num_steps), resumed) is None
    config = recipe_config(phantom_dataset, num_steps=6)
    assert train(config, undisturbed) is None
    places = [workdir / "checkpoints" / "6" for workdir in (resumed, undisturbed)]
    first, second = (read_meta(place)["hashes"] for place in places)
    assert first == second
    first, second = (
        [{**row, "time": 0} for row in read_metrics(workdir) if row["step"] > 4]
        for workdir in (resumed, undisturbed)
    )
    assert first == second
    assert {"loss_cross_entropy", "loss_dice"} < first[0].keys()

    task = Segmentation(config)
    template = init_state(task, make_optimizer(config.optimizer), averages=True)
    state, meta = read_state(places[0], template)
    jax.tree.map(np.testing.assert_array_equal, load_variables(resumed), state.average)
    kernels = [
        x["decoder"]["head"]["conv"]["kernel"] for x in (state.params, state.average["params"])
    ]
    assert 0 < np.abs(kernels[0] - kernels[1]).max() < 0.1
    # By hand, the whole volumes that the run validated.
    dataset = open_run_dataset(config)
    counts = [
        jax.jit(task.count)(load_variables(resumed), batch)[0].sum(axis=0)
        for batch in evaluation_batches(
            dataset,
            BatchOptions(batch_size=4, patch_size=(32, 32), seed=0),
            volumes=split_run(config, dataset).validation,
        )
    ]
    expected = task.scores(np.sum(counts, axis=0))["validation_dice"]
    assert meta["metrics"]["validation_dice"] == pytest.approx(expected, abs=1e-4)


def test_a_run_without_metrics_ends_without_a_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = phantom_scratch.get_config().to_dict()
    for text in (None, "", '{"step": 3, "validation_dice": 0.5}\n'):
        if text is not None:
            Workdir(tmp_path).metrics_file.write_text(text)
        train_module._summarize(Workdir(tmp_path), "loss", config)
        assert ("TensorBoard:" in capsys.readouterr().out) == bool(text)
