"""The folder of a run: every file in it, and its lock.

    config.json                 the run's config, with a checksum
    split.json                  the volumes it trains and validates on (`kafjax.workdir.split`)
    preparation.json            how its dataset was prepared (`kafjax.workdir.preparation`)
    environment.json            the environment of its last start (`kafjax.workdir.environment`)
    metrics.jsonl, tensorboard/ its numbers and pictures (`kafjax.workdir.metrics`)
    checkpoints/<step>/         its states (`kafjax.checkpoint`); damaged/ holds those moved aside
    evaluation*.json, .csv      its scores, and volumes*.csv in mm^3 (`kafjax.inference.evaluation`)
    postprocessing.json         how predictions are cleaned (`kafjax.inference.postprocessing`)
    lock, lock.<n>              the process that trains in the folder (`kafjax.workdir.lock`)

These file names appear in no other module.
"""

import contextlib
import json
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kafjax.checkpoint.checkpointer import saved_metrics
from kafjax.errors import UserError
from kafjax.files import differences, flatten, read_checked, write_checked
from kafjax.paths import expand, show
from kafjax.workdir.bucket import kept
from kafjax.workdir.lock import locked

# Fields that may change when a run is resumed: length, intervals, paths and what follows.
MAY_CHANGE = (
    "num_steps",
    "every.log",
    "every.checkpoint",
    "every.picture",
    "checkpoint.keep_newest",
    "checkpoint.keep_best",
    "checkpoint.select",
    "data.dir",
    "data.num_threads",
    "postprocess",
)
# Filled in from the dataset and the task if the config omits them.
FROM_DATASET = (
    "data.max_keypoints",
    "data.patch_keypoints",
    "data.radius",
    "data.sparse_labels",
    "data.regions",
    "data.regions_class_order",
    "model.num_channels",
    "model.num_regions",
    "model.num_classes",
    "model.head",
)

# Fields that runs of older versions lack, and runs of one channel the second, and what they mean.
OLDER = {"model.norm": "batch", "model.num_channels": 1, "data.context": 0}

# Checkpoints by name.
CHOICES = ("best", "last")


class Workdir:
    """The folder of one run; the constructor reads and writes nothing of this machine's.

    Args:
      path: of the folder, which need not exist; `~` is the home folder. A bucket's URL stands for
        its copy on this machine, which is brought up to date.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = expand(path)

    def __str__(self) -> str:
        return show(self.path)

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def config_file(self) -> Path:
        """The run's config."""
        return self.path / "config.json"

    @property
    def split_file(self) -> Path:
        """The run's training and validation volumes."""
        return self.path / "split.json"

    @property
    def preparation_file(self) -> Path:
        """The preparation of the run's dataset."""
        return self.path / "preparation.json"

    @property
    def environment_file(self) -> Path:
        """The environment of the run's last start."""
        return self.path / "environment.json"

    @property
    def metrics_file(self) -> Path:
        """The run's metrics, one JSON object per line."""
        return self.path / "metrics.jsonl"

    @property
    def postprocessing_file(self) -> Path:
        """See the module."""
        return self.path / "postprocessing.json"

    @property
    def tensorboard(self) -> Path:
        """The folder of the run's scalars and pictures."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.path / "checkpoints"

    def read_config(self, *, task: str | None = None) -> dict[str, Any]:
        """The fields of the run's config.

        Args:
          task: the required `config.task`, if any.

        Raises:
          ValueError: the folder holds no run, a run of another task, or a changed config.
        """
        try:
            config = read_checked(self.config_file)
        except FileNotFoundError:
            raise UserError(f"{self}: has no config.json; expected the workdir of a run") from None
        except ValueError as error:
            raise UserError(f"{self.config_file}: not a run's config ({error})") from None
        if task is not None and config.get("task") != task:
            raise UserError(f"{self}: a run of task {config.get('task')!r}; expected {task!r}")
        return config

    def check_config(
        self, config: Mapping[str, Any], *, may_change: Collection[str] = MAY_CHANGE
    ) -> None:
        """Raises `ValueError` listing each field that differs from the stored config, if any.

        Fields have dotted paths. Those in `may_change` may differ, and those that the dataset fills
        in may be missing from `config`.
        """
        try:
            there = OLDER | flatten(read_checked(self.config_file))
        except FileNotFoundError:
            return
        except ValueError as error:
            raise UserError(
                f"{self.config_file}: not a run's config ({error}); without the file the config "
                "that is given is used"
            ) from None
        here = OLDER | flatten(json.loads(json.dumps(config)))
        filled = {name for name in FROM_DATASET if here.get(name) is None}
        differing = differences(there, here, ignore={*may_change, *filled})
        if differing:
            raise UserError(
                f"{self} holds a run of another config; give another workdir or the same config:\n"
                + "\n".join(differing)
            )

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Stores the run's config; creates the folder."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_checked(self.config_file, config)

    def best_step(self) -> int | None:
        """The saved step with the best mean validation Dice, the later of equals; None if none."""
        scores = {
            step: metrics.get("validation_dice", math.nan)
            for step, metrics in saved_metrics(self.path).items()
        }
        scored = [(score, step) for step, score in scores.items() if not math.isnan(score)]
        return max(scored)[1] if scored else None

    def select_step(self, choice: str | int | None = None) -> tuple[int | None, str]:
        """The checkpoint for evaluation or prediction, and how it was chosen, in words.

        Args:
          choice: 'best' by validation, 'last', a step, or None for the config's
            `checkpoint.select`. Without validation 'best' is the last.

        Returns:
          The step and the words; the step is None for the newest good one.

        Raises:
          ValueError: another choice.
        """
        if choice is None:
            choice = self.read_config().get("checkpoint", {}).get("select", "best")
        if str(choice).isdecimal():
            return int(choice), f"step {int(choice)}"
        if choice not in CHOICES:
            raise UserError(f"step is {choice!r}, expected {' or '.join(CHOICES)} or a number")
        best = self.best_step() if choice == "best" else None
        return (None, "last") if best is None else (best, "best on the validation volumes")

    def newest_step(self) -> int | None:
        """The newest checkpoint with a good `meta`, if any."""
        return max(saved_metrics(self.path), default=None)

    def scores_file(self, split: str, step: int | None = None) -> Path:
        """The JSON file of scores on a split, for the selected checkpoint or a step."""
        parts = ["evaluation", *([split] if split != "validation" else [])]
        return self.path / f"{'_'.join(parts + ([] if step is None else [f'step{step}']))}.json"

    def owner(self) -> str:
        """What the process that holds the folder's lock wrote there; empty without one."""
        lock = self.path / "lock"
        return lock.read_text(encoding="utf-8") if lock.exists() else ""

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Locks the folder for this process; `ValueError` names another process that holds it.

        A run in a bucket is locked there too, and its files are sent (`kafjax.workdir.bucket`).
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with locked(self.path / "lock"), kept(self.path, self.checkpoints):
            yield


def name_runs(workdirs: Sequence[str | os.PathLike[str]]) -> list[str]:
    """A short name for each workdir: the shortest end of its path that is unique."""
    parts = [Path(os.path.abspath(workdir)).parts for workdir in workdirs]
    for count in range(1, max(map(len, parts), default=1)):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [str(Path(*p)) for p in parts]
