"""What a run's folder tells about the run: its config, and which of its checkpoints is the best."""

import math
import os
from pathlib import Path
from typing import Any

from kafjax.checkpoint.checkpointer import saved_metrics
from kafjax.errors import UserError
from kafjax.files import read_checked


def read_config(workdir: str | os.PathLike[str], *, task: str | None = None) -> dict[str, Any]:
    """The fields of the config of the run in `workdir`.

    Args:
      workdir: of a run or an import.
      task: what `config.task` must be, if it matters.

    Raises:
      ValueError: the folder holds no run, one of another task, or a config that was changed.
    """
    path = Path(workdir) / "config.json"
    try:
        config = read_checked(path)
    except FileNotFoundError:
        raise UserError(f"{workdir}: has no config.json; expected the workdir of a run") from None
    except ValueError as error:
        raise UserError(f"{path}: not a run's config ({error})") from None
    if task is not None and config.get("task") != task:
        raise UserError(f"{workdir}: a run of task {config.get('task')!r}; expected {task!r}")
    return config


def best_step(workdir: str | os.PathLike[str]) -> int | None:
    """The saved step with the best mean Dice of validation, the later of equals; None without."""
    scores = {
        step: metrics.get("validation_dice", math.nan)
        for step, metrics in saved_metrics(workdir).items()
    }
    scored = [(score, step) for step, score in scores.items() if not math.isnan(score)]
    return max(scored)[1] if scored else None
