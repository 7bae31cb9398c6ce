"""Whole runs of the command on files of their own: resume bit for bit, signals, processes."""

import signal
import socket
from pathlib import Path
from typing import Any

import flax
import numpy as np
import pytest

from kafjax import checkpoint
from kafjax.metrics import read_metrics
from kafjax.step import TrainState, init_state, make_optimizer
from kafjax.pretrain import Pretraining
from tests.runs import run_command, start_command, tiny_config

NUM_STEPS = 8  # beyond the first epoch's 6


@pytest.fixture(scope="module")
def undisturbed(phantom_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("undisturbed")
    status, output = run_command(phantom_dataset, workdir, f"--config.num_steps={NUM_STEPS}")
    assert status == 0, output
    assert str(workdir / "checkpoints") in output
    assert "loss_matching" in output
    return workdir


def final_state(dataset: Path, workdir: Path) -> dict[str, np.ndarray]:
    config = tiny_config(dataset)
    state = init_state(Pretraining(config), make_optimizer(config.optimizer, 1))
    stored = config.to_dict() | {"num_steps": NUM_STEPS}
    with checkpoint.Checkpointer(
        workdir, keep_newest=1, best_metric="loss", config=stored
    ) as checkpointer:
        restored = checkpointer.restore_latest(state)
    assert restored is not None
    tree: TrainState = restored[0]
    assert tree.step == NUM_STEPS
    return flax.traverse_util.flatten_dict(flax.serialization.to_state_dict(tree), sep="/")


def without_time(workdir: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "time"} for row in read_metrics(workdir)]


def test_run_writes_checkpoint_metrics_and_pictures(undisturbed: Path) -> None:
    rows = read_metrics(undisturbed)
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert rows[0]["keypoints"] > 5
    assert rows[0]["correspondences"] > 1
    assert set(rows[0]["time"]) == {
        "seconds_per_step",
        "samples_per_second",
        "input_wait_share",
    }
    variables = checkpoint.load_variables(undisturbed)
    assert "encoder" in variables["params"]
    events = list((undisturbed / "tensorboard").glob("events*"))
    assert events
    data = b"".join(path.read_bytes() for path in events)
    assert b"loss_cnn" in data
    assert b"PNG" in data


def test_stopped_and_resumed_runs_end_with_the_same_bits(
    phantom_dataset: Path, undisturbed: Path, tmp_path: Path
) -> None:
    status, output = run_command(phantom_dataset, tmp_path, "--config.num_steps=3")
    assert status == 0, output
    steps = f"--config.num_steps={NUM_STEPS}"
    process = start_command(phantom_dataset, tmp_path, steps)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step 4/"):
            process.send_signal(signal.SIGTERM)
            break
    rest, _ = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGTERM, "".join(lines) + rest
    assert any("from step 3" in line for line in lines)
    stopped_at = read_metrics(tmp_path)[-1]["step"]
    assert 4 <= stopped_at < NUM_STEPS

    status, output = run_command(phantom_dataset, tmp_path, steps)
    assert status == 0, output
    assert f"from step {stopped_at}" in output
    assert without_time(tmp_path) == without_time(undisturbed)
    expected, found = (final_state(phantom_dataset, w) for w in (undisturbed, tmp_path))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert value.tobytes() == found[name].tobytes(), name


def test_complete_run_does_nothing_more(phantom_dataset: Path, undisturbed: Path) -> None:
    before = (undisturbed / "metrics.jsonl").read_bytes()
    status, output = run_command(phantom_dataset, undisturbed, f"--config.num_steps={NUM_STEPS}")
    assert status == 0
    assert f"is complete: {NUM_STEPS} of {NUM_STEPS} steps" in output
    assert (undisturbed / "metrics.jsonl").read_bytes() == before


def test_two_processes_train_as_one_of_two_devices(phantom_dataset: Path, tmp_path: Path) -> None:
    # In float64: an untrained network amplifies float32 rounding beyond any useful bound.
    exact = {"JAX_ENABLE_X64": "1"}
    extra = ("--config.model.dtype=float64", "--config.num_steps=2")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    together = [
        start_command(
            phantom_dataset,
            tmp_path / "two",
            *extra,
            *(f"--coordinator={address}", "--num_processes=2", f"--process_id={i}"),
            **exact,
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=600)[0] for process in together]
    finally:
        for process in together:
            process.kill()
    assert [process.returncode for process in together] == [0, 0], "\n".join(outputs)
    status, output = run_command(phantom_dataset, tmp_path / "one", *extra, devices=2, **exact)
    assert status == 0, output

    one, two = (
        flax.traverse_util.flatten_dict(checkpoint.load_variables(tmp_path / name), sep="/")
        for name in ("one", "two")
    )
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=1e-7, atol=1e-9, err_msg=name)
    for a, b in zip(without_time(tmp_path / "one"), without_time(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-6)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--config.batchsize=4", "batch_size"),
        ("--config.data.max_keypoints=99", "max_keypoints: the dataset has 64"),
        ("--config.data.name=chd", "python -m data_prep.main --dataset chd"),
        ("--config.model.name=vnet", "expected one of unet"),
    ],
)
def test_mistakes_are_one_clear_line_and_status_2(
    phantom_dataset: Path, tmp_path: Path, argument: str, expected: str
) -> None:
    status, output = run_command(phantom_dataset, tmp_path / "w", argument)
    assert status == 2
    assert expected in output
    assert "Traceback" not in output
