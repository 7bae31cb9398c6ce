"""What campaigns damage: phantoms, a dataset prepared of them, and runs that were never trained."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from data_prep.builder import Options
from data_prep.phantom.subjects import write_subjects
from data_prep.prepare import prepare_dataset
from data_prep.readers import READERS
from kafjax.checkpoint.checkpointer import Checkpointer
from kafjax.configs import phantom_finetune
from kafjax.data.dataset import SliceDataset
from kafjax.tasks.segmentation import Segmentation
from kafjax.training.preflight import complete_config, split_run
from kafjax.training.step import TrainState
from kafjax.workdir.preparation import write_preparation
from kafjax.workdir.split import describe_split, write_split
from kafjax.workdir.workdir import Workdir
from tests.runs import OVERRIDES, tiny_config

SIZE = (48, 48, 10)


def make_phantoms(folder: Path, number: int = 3) -> Path:
    """Phantoms in the CHD layout."""
    write_subjects(folder, number, size=SIZE)
    return folder


def make_dataset(raw_dir: Path, data_dir: Path, *, seed: int = 0, max_keypoints: int = 32) -> Path:
    """Prepares phantoms as DATA/phantom/1.0.0."""
    return prepare_dataset(
        READERS["chd"],
        raw_dir,
        data_dir,
        name="phantom",
        options=Options(max_keypoints=max_keypoints, seed=seed),
        num_workers=0,
    ).directory


def segmentation_config(dataset: Path, **overrides: Any) -> ml_collections.ConfigDict:
    """A segmentation run of the plain UNet, which compiles soonest."""
    config = phantom_finetune.get_config()
    del config.init_from
    # The optimiser is the run's own: the tests' is pretraining's.
    ours = {n: v for n, v in OVERRIDES.items() if _has(config, n) and "optimizer" not in n}
    config.update_from_flattened_dict(
        {
            **ours,
            "data.dir": str(dataset.parents[1]),
            "data.max_keypoints": 32,
            "data.num_folds": 3,
            "batch_size": 4,
            "model.name": "unet",
            "model.num_classes": 8,
            **overrides,
        }
    )
    return config


def pretraining_config(dataset: Path, **overrides: Any) -> ml_collections.ConfigDict:
    """The tests' pretraining run on a dataset of ours."""
    return tiny_config(dataset, **{"data.max_keypoints": 32, "batch_size": 4, **overrides})


def make_run(workdir: Path, dataset: Path, **overrides: Any) -> ml_collections.ConfigDict:
    """A workdir with the checkpoint of fresh variables at step 0; its config."""
    config = segmentation_config(dataset, **overrides)
    state = TrainState(np.zeros((), np.int32), **Segmentation(config).init(), opt_state={})
    opened = SliceDataset(dataset)
    folder = Workdir(workdir)
    folder.write_config(complete_config(config, opened).to_dict())
    write_split(folder, describe_split(split_run(config, opened), opened))
    with Checkpointer(workdir, keep_newest=1, best_metric="validation_dice") as checkpointer:
        checkpointer.save(0, state, metrics={"validation_dice": 0.5}, data={"step": 0})
    write_preparation(workdir, opened.metadata)
    return config


def call_command(command: Callable[[list[str]], int], *arguments: object) -> tuple[int, str]:
    """Exit status and error output of a command that runs in this process."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        status = command(list(map(str, arguments)))
    return status, errors.getvalue()


def _has(config: ml_collections.ConfigDict, path: str) -> bool:
    *parents, last = path.split(".")
    for parent in parents:
        config = config.get(parent) or ml_collections.ConfigDict()
    return last in config
