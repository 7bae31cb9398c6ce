"""A run's folder: its config, and its best checkpoint."""

import json
from pathlib import Path

import numpy as np
import pytest

from kafjax.checkpoint.checkpointer import Checkpointer
from kafjax.workdir.workdir import best_step, read_config


def save(workdir: Path, scores: dict[int, float]) -> None:
    with Checkpointer(
        workdir, keep_newest=len(scores), best_metric="validation_dice", config={"task": "segment"}
    ) as checkpointer:
        for step, score in scores.items():
            state = {"params": {"a": np.float32([step])}}
            checkpointer.save(step, state, metrics={"validation_dice": score}, data={})


def test_best_step_is_the_later_of_the_highest(tmp_path: Path) -> None:
    save(tmp_path, {2: 0.5, 4: float("nan"), 6: 0.75, 8: 0.75, 9: 0.6})
    assert best_step(tmp_path) == 8


def test_there_is_no_best_where_nothing_was_validated(tmp_path: Path) -> None:
    assert best_step(tmp_path) is None
    save(tmp_path, {0: float("nan"), 3: float("nan")})
    assert best_step(tmp_path) is None


def test_config_is_read(tmp_path: Path) -> None:
    save(tmp_path, {0: 1.0})
    assert read_config(tmp_path) == read_config(tmp_path, task="segment") == {"task": "segment"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "has no config.json; expected the workdir of a run"),
        ("{", "not a run's config"),
        ("7", r"not a run's config \(no fields\)"),
        ("{}", "a run of task None; expected 'segment'"),
        (json.dumps({"task": "pretrain"}), "a run of task 'pretrain'; expected 'segment'"),
    ],
)
def test_folders_that_hold_no_such_run_are_refused(
    tmp_path: Path, text: str | None, expected: str
) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=expected):
        read_config(tmp_path, task="segment")
