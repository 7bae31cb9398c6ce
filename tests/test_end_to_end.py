"""Whole runs of the command on files of their own: resume bit for bit, signals, processes."""

import signal
from pathlib import Path

import flax
import numpy as np
import pytest

from kafjax.checkpoint import checkpointer as checkpoint
from kafjax.tasks.pretraining import Pretraining
from kafjax.training.step import init_state, make_optimizer
from kafjax.workdir.metrics import read_metrics
from tests.runs import (
    PLAIN,
    free_address,
    run_command,
    start_command,
    tiny_config,
    without_time,
)

# Steps of four pairs take half the time; the signal needs a run that does not end before it comes.
LONG = ("--config.batch_size=4", "--config.num_epochs=1000")


def state_of(dataset: Path, workdir: Path, step: int) -> dict[str, np.ndarray]:
    config = tiny_config(dataset, batch_size=4, num_epochs=1000)
    template = init_state(Pretraining(config), make_optimizer(config.optimizer))
    with checkpoint.Checkpointer(workdir, keep_newest=1, best_metric="loss") as checkpointer:
        restored = checkpointer.restore_latest(template)
    assert restored is not None
    assert restored[0].step == step
    tree = flax.serialization.to_state_dict(restored[0])
    return flax.traverse_util.flatten_dict(tree, sep="/")


def test_stopped_and_resumed_runs_end_with_the_same_bits(
    phantom_dataset: Path, tmp_path: Path
) -> None:
    resumed, undisturbed = tmp_path / "resumed", tmp_path / "undisturbed"
    process = start_command(phantom_dataset, resumed, *LONG)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGTERM)
            break
    rest, _ = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGTERM, "".join(lines) + rest
    assert "loss_matching" in lines[-1]

    stopped = read_metrics(resumed)[-1]["step"]
    last = stopped + 2
    for workdir in (resumed, undisturbed):
        steps = f"--config.num_steps={last}"
        status, output = run_command(phantom_dataset, workdir, *LONG, steps)
        assert status == 0, output
        assert str(workdir / "checkpoints") in output
        assert (f"from step {stopped}" in output) == (workdir == resumed)
    assert [row["step"] for row in read_metrics(undisturbed)] == list(range(1, last + 1))
    assert without_time(resumed) == without_time(undisturbed)
    expected, found = (state_of(phantom_dataset, w, last) for w in (undisturbed, resumed))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert value.tobytes() == found[name].tobytes(), name
    check_outputs(undisturbed)

    before = (undisturbed / "metrics.jsonl").read_bytes()
    status, output = run_command(phantom_dataset, undisturbed, *LONG, f"--config.num_steps={last}")
    assert status == 0
    assert f"is complete: {last} of {last} steps" in output
    assert (undisturbed / "metrics.jsonl").read_bytes() == before


def check_outputs(workdir: Path) -> None:
    row = read_metrics(workdir)[0]
    assert row["keypoints"] > 5
    assert row["correspondences"] > 1
    assert set(row["time"]) == {"seconds_per_step", "samples_per_second", "input_wait_share"}
    assert "encoder" in checkpoint.load_variables(workdir)["params"]
    assert (workdir / "preparation.json").exists()
    events = list((workdir / "tensorboard").glob("events*"))
    assert events
    data = b"".join(path.read_bytes() for path in events)
    assert b"loss_cnn" in data
    assert b"PNG" in data


def test_two_processes_train_as_one_of_two_devices(phantom_dataset: Path, tmp_path: Path) -> None:
    # In float64: an untrained network amplifies float32 rounding beyond any useful bound.
    exact = {"JAX_ENABLE_X64": "1"}
    # The plain UNet compiles in a third of the time and uses everything that processes share.
    extra = (
        "--config.model.dtype=float64",
        *(f"--config.{field}={value}" for field, value in PLAIN.items()),
        "--config.num_steps=2",
    )
    address = free_address()
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
        ("--config.data.name=chd", "kafjax prepare --dataset chd"),
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
