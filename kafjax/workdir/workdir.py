"""The folder of a run: every file in it, and who may write there.

    config.json                 the run's config, with a checksum
    split.json                  the volumes it trains and validates on (`kafjax.workdir.split`)
    preparation.json            how its dataset was prepared (`kafjax.workdir.preparation`)
    environment.json            what its last start ran on (`kafjax.workdir.environment`)
    metrics.jsonl, tensorboard/ its numbers and pictures (`kafjax.workdir.metrics`)
    checkpoints/<step>/         its states (`kafjax.checkpoint`); damaged/ has those moved aside
    evaluation*.json, .csv      its scores, and volumes*.csv in mm^3 (`kafjax.inference.evaluation`)
    postprocessing.json         what clears up its predictions (`kafjax.inference.postprocessing`)
    lock                        the process that trains in the folder (`kafjax.workdir.lock`)

No other module spells these names.
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
from kafjax.paths import expand
from kafjax.workdir.lock import locked

# How long, how often, where and what follows: a run may be resumed with other values of these.
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
# Filled in from the dataset and the task where a config leaves them out.
FROM_DATASET = (
    "data.max_keypoints",
    "data.patch_keypoints",
    "data.radius",
    "model.num_classes",
    "model.head",
)

# Checkpoints by name.
CHOICES = ("best", "last")


class Workdir:
    """The folder of one run; making one reads and writes nothing.

    Args:
      path: of the folder, which need not exist; `~` stands for the home folder.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = expand(path)

    def __str__(self) -> str:
        return str(self.path)

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def config_file(self) -> Path:
        """The run's config."""
        return self.path / "config.json"

    @property
    def split_file(self) -> Path:
        """The volumes it trains and validates on."""
        return self.path / "split.json"

    @property
    def preparation_file(self) -> Path:
        """How its dataset was prepared."""
        return self.path / "preparation.json"

    @property
    def environment_file(self) -> Path:
        """What its last start ran on."""
        return self.path / "environment.json"

    @property
    def metrics_file(self) -> Path:
        """Its numbers, a JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def postprocessing_file(self) -> Path:
        """See the module."""
        return self.path / "postprocessing.json"

    @property
    def tensorboard(self) -> Path:
        """The folder of its scalars and pictures."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """The folder of its states."""
        return self.path / "checkpoints"

    def read_config(self, *, task: str | None = None) -> dict[str, Any]:
        """The fields of the run's config.

        Args:
          task: what `config.task` must be, if it matters.

        Raises:
          ValueError: the folder holds no run, one of another task, or a config that was changed.
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

        Fields are named by dotted paths. Those in `may_change` may differ, and those that the
        dataset fills in may be missing from `config`.
        """
        try:
            there = flatten(read_checked(self.config_file))
        except FileNotFoundError:
            return
        except ValueError as error:
            raise UserError(
                f"{self.config_file}: not a run's config ({error}); without the file the config "
                "that is given holds"
            ) from None
        here = flatten(json.loads(json.dumps(config)))
        filled = {name for name in FROM_DATASET if here.get(name) is None}
        differing = differences(there, here, ignore={*may_change, *filled})
        if differing:
            raise UserError(
                f"{self} holds a run of another config; give another workdir or the same config:\n"
                + "\n".join(differing)
            )

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Stores the run's config; makes the folder."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_checked(self.config_file, config)

    def best_step(self) -> int | None:
        """The saved step with the best mean Dice of validation, the later of equals, if any."""
        scores = {
            step: metrics.get("validation_dice", math.nan)
            for step, metrics in saved_metrics(self.path).items()
        }
        scored = [(score, step) for step, score in scores.items() if not math.isnan(score)]
        return max(scored)[1] if scored else None

    def select_step(self, choice: str | int | None = None) -> tuple[int | None, str]:
        """The checkpoint to evaluate or predict with, and how it was chosen, in words.

        Args:
          choice: 'best' by validation, 'last', a step, or None for what the config's
            `checkpoint.select` says. Without validation the last is taken for the best.

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
        """The newest checkpoint whose description is good, if any."""
        return max(saved_metrics(self.path), default=None)

    def scores_file(self, split: str, step: int | None = None) -> Path:
        """The JSON file of the scores on a split, of the selected checkpoint or of a step."""
        parts = ["evaluation", *([split] if split != "validation" else [])]
        return self.path / f"{'_'.join(parts + ([] if step is None else [f'step{step}']))}.json"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder for this process; `ValueError` names the process that holds it."""
        self.path.mkdir(parents=True, exist_ok=True)
        with locked(self.path / "lock"):
            yield


def name_runs(workdirs: Sequence[str | os.PathLike[str]]) -> list[str]:
    """A short name for each workdir: as much of the end of its path as tells it from the others."""
    parts = [Path(os.path.abspath(workdir)).parts for workdir in workdirs]
    for count in range(1, max(map(len, parts), default=1)):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [str(Path(*p)) for p in parts]
