"""Tiny pretraining runs for tests: a config, batches, and the command in a process of its own."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from data_prep.readers import READERS
from kafjax.checkpoint.checkpointer import Checkpointer
from kafjax.configs import phantom_pretrain
from kafjax.data.dataset import SliceDataset
from kafjax.training.preflight import complete_config, split_run
from kafjax.workdir.metrics import read_metrics
from kafjax.workdir.split import describe_split, write_split
from kafjax.workdir.workdir import Workdir

# Set for every test by conftest.py.
XLA_FLAGS = os.environ["XLA_FLAGS"]

ROOT = Path(__file__).parents[1]
OVERRIDES = {
    "batch_size": 8,
    "data.patch_size": (32, 32),
    "model.filters": 4,
    "model.num_attention_layers": 2,
    "model.num_matcher_layers": 2,
    "model.num_sinkhorn_iterations": 10,
    "model.embedding": 16,
    "optimizer.name": "sgd",
    # At a larger rate float32 rounding grows a hundredfold a step.
    "optimizer.learning_rate": 1e-4,
    "every.log": 1,
    "every.checkpoint": 100,
}
# Of a run without a dataset, with the names of volumes and patients that must not leave it.
PREPARATION = {
    "kind": "chd",
    "classes": list(READERS["chd"].classes),
    "max_keypoints": 8,
    "keypoint_selection": "random",
    "seed": 3,
    "subjects": {"ct_1": "Zaphod"},
    "equal_images": [["ct_1", "ct_2"]],
}
# The network that compiles soonest has no keypoint losses.
PLAIN = {"model.name": "unet", "loss.weights.kaf": 0.0, "loss.weights.matching": 0.0}


def tiny_config(dataset: Path, **overrides: Any) -> ml_collections.ConfigDict:
    """The phantom run shrunk to seconds, on the dataset at DATA/phantom/VERSION."""
    config = phantom_pretrain.get_config()
    config.update_from_flattened_dict({**OVERRIDES, "data.dir": str(dataset.parents[1])})
    config.update_from_flattened_dict(overrides)
    return config


def command_environment(folder: Path) -> dict[str, str]:
    """An environment in which `kafjax` and `python` are this clone's; `folder` is made for it."""
    folder.mkdir(exist_ok=True)
    command = folder.absolute() / "kafjax"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m kafjax "$@"\n')
    command.chmod(0o755)
    places = (str(command.parent), str(Path(sys.executable).parent), os.environ["PATH"])
    paths = {"PYTHONPATH": str(ROOT), "PATH": os.pathsep.join(places)}
    return {**os.environ, **paths, "KAFJAX_PROGRAMS": "1"}


def random_batch(batch_size: int, num_keypoints: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """A pretraining batch of noise, 32 x 32, with about 70 % real keypoints."""
    rng = np.random.default_rng(seed)
    b, k = batch_size, num_keypoints
    matched = rng.random((b, k)) < 0.5
    return {
        "image": rng.standard_normal((b, 2, 32, 32, 1)).astype(np.float32),
        "keypoints": rng.integers(0, 32, (b, 2, k, 2)).astype(np.int32),
        "keypoint_mask": rng.random((b, 2, k)) < 0.7,
        "correspondence": np.where(matched, np.arange(k), -1).astype(np.int32),
        "position": np.stack([rng.integers(1, 101, b), np.full(b, 100)], 1).astype(np.int32),
        "record": rng.integers(0, 9, (b, 2)).astype(np.int32),
        "sample": np.arange(b, dtype=np.uint32) + seed * b,
        "seed": np.zeros(b, np.uint32),
    }


def write_run(
    workdir: Path,
    config: Any,
    variables: Any,
    *,
    step: int = 0,
    dataset: SliceDataset | None = None,
) -> None:
    """A workdir as a run leaves it: its config, a checkpoint, and its split of a dataset if any."""
    folder = Workdir(workdir)
    if dataset is not None:
        config = complete_config(config, dataset)
    folder.write_config(config.to_dict())
    if dataset is not None:
        write_split(folder, describe_split(split_run(config, dataset), dataset))
    with Checkpointer(workdir, keep_newest=1, best_metric=None) as checkpointer:
        checkpointer.save(step, variables, metrics={}, data={})


def free_address() -> str:
    """HOST:PORT for processes of this machine to meet at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{s.getsockname()[1]}"


def start_command(
    dataset: Path,
    workdir: Path | str,
    *extra: str,
    devices: int = 1,
    prefix: Sequence[str] = (),
    **environment: str,
) -> subprocess.Popen[str]:
    """Starts `python -m kafjax.main` on the tiny run, behind a prefix; stderr goes to stdout."""
    fields = {**OVERRIDES, "data.dir": str(dataset.parents[1])}
    return subprocess.Popen(
        [
            *(*prefix, sys.executable, "-m", "kafjax.main"),
            *("--config", "configs/phantom_pretrain.py"),
            *(f"--config.{name}={value}" for name, value in fields.items()),
            *("--workdir", str(workdir)),
            *extra,
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "XLA_FLAGS": f"{XLA_FLAGS} --xla_force_host_platform_device_count={devices}",
            "KAFJAX_PROGRAMS": "1",
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_command(
    dataset: Path, workdir: Path | str, *extra: str, devices: int = 1, **environment: str
) -> tuple[int, str]:
    """Runs the command to its end: exit status and output."""
    process = start_command(dataset, workdir, *extra, devices=devices, **environment)
    output, _ = process.communicate(timeout=600)
    return process.returncode, output


def without_time(workdir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics, without what differs from run to run."""
    return [{k: v for k, v in row.items() if k != "time"} for row in read_metrics(workdir)]
