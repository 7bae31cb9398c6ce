"""The scores of a run, with a check of their origin.

    WORKDIR/evaluation.json             of the selected checkpoint on the validation volumes
    WORKDIR/evaluation_train.json       of the same checkpoint on the training volumes
    WORKDIR/evaluation_test.json        of the same checkpoint on the dataset's test set
    WORKDIR/evaluation[_train|_test]_stepN.json    of another checkpoint

Scores record their checkpoint, split and run, so they cannot be mistaken for another's.
"""

from collections.abc import Mapping
from typing import Any

from kafjax.errors import UserError
from kafjax.files import differences, read_checked
from kafjax.workdir.split import read_split
from kafjax.workdir.workdir import Workdir

SPLITS = ("validation", "train", "test")
_NEEDED = ("step", "checkpoint", "split", "run", "pooled_dice", "by_class", "by_volume")

Scores = dict[str, Any]


def describe_run(workdir: Workdir, config: Mapping[str, Any]) -> dict[str, Any]:
    """Identifies the run of scores: dataset, fold, M, seed and recorded split."""
    split = read_split(workdir)
    data = config["data"]
    return {
        "dataset": data["name"],
        "fold": data.get("fold"),
        "num_labeled": data.get("num_labeled"),
        "seed": config["seed"],
        "split": None if split is None else split.digest,
    }


def read_scores(workdir: Workdir, split: str = "validation") -> Scores | None:
    """The scores of a run's selected checkpoint.

    Args:
      workdir: of the run.
      split: 'validation', 'train' or 'test'.

    Returns:
      The evaluation's results; None if that checkpoint has not been evaluated, or only by kafjax
      0.1, whose scores do not record their origin.

    Raises:
      ValueError: the file is damaged, or holds another run's scores; every difference is listed.
    """
    path = workdir.scores_file(split)
    again = "evaluate the run again"
    try:
        found = read_checked(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); remove it and {again}") from None
    if "run" not in found and "fold" in found:
        return None  # of kafjax 0.1, whose scores do not record their origin
    if missing := [name for name in _NEEDED if name not in found]:
        raise UserError(f"{path}: damaged (no {', '.join(missing)}); remove it and {again}")
    there = {**found["run"], "side": found["split"]}
    here = {**describe_run(workdir, workdir.read_config()), "side": split}
    if differing := differences(there, here):
        raise UserError(
            f"{path}: the scores of another run; remove it and {again}:\n" + "\n".join(differing)
        )
    selected, _ = workdir.select_step()
    current = workdir.newest_step() if selected is None else selected
    # A folder copied without its checkpoints keeps its scores.
    return found if current in (None, found["step"]) else None
