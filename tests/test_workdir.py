"""A run's folder: its config, and its best checkpoint."""

import json
from pathlib import Path

import numpy as np
import pytest

from kafjax.checkpoint.checkpointer import Checkpointer
from kafjax.workdir.workdir import Workdir


def save(workdir: Path, scores: dict[int, float]) -> None:
    Workdir(workdir).write_config({"task": "segment"})
    with Checkpointer(
        workdir, keep_newest=len(scores), best_metric="validation_dice"
    ) as checkpointer:
        for step, score in scores.items():
            state = {"params": {"a": np.float32([step])}}
            checkpointer.save(step, state, metrics={"validation_dice": score}, data={})


def test_best_step_is_the_later_of_the_highest(tmp_path: Path) -> None:
    save(tmp_path, {2: 0.5, 4: float("nan"), 6: 0.75, 8: 0.75, 9: 0.6})
    assert Workdir(tmp_path).best_step() == 8


def test_there_is_no_best_where_nothing_was_validated(tmp_path: Path) -> None:
    assert Workdir(tmp_path).best_step() is None
    save(tmp_path, {0: float("nan"), 3: float("nan")})
    assert Workdir(tmp_path).best_step() is None


def test_config_is_read(tmp_path: Path) -> None:
    save(tmp_path, {0: 1.0})
    assert (
        Workdir(tmp_path).read_config()
        == Workdir(tmp_path).read_config(task="segment")
        == {"task": "segment"}
    )


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
        Workdir(tmp_path).read_config(task="segment")


CONFIG = {"model": {"filters": 4, "levels": (1, 2)}, "num_steps": 10}


def test_another_config_is_refused_with_all_differences(tmp_path: Path) -> None:
    workdir = Workdir(tmp_path)
    workdir.check_config(CONFIG)  # nothing is stored yet
    workdir.write_config(CONFIG)
    other = {"model": {"filters": 8}, "num_steps": 20, "seed": 1}
    with pytest.raises(ValueError) as error:
        workdir.check_config(other)
    assert str(error.value).splitlines()[1:] == [
        "  model.filters: 4 there, 8 here",
        "  model.levels: [1, 2] there, 'absent' here",
        "  seed: 'absent' there, 1 here",
    ]


def test_a_config_may_change_in_length_and_leave_out_what_the_dataset_tells(tmp_path: Path) -> None:
    workdir = Workdir(tmp_path)
    workdir.write_config({**CONFIG, "data": {"max_keypoints": 64}})
    longer = {"model": {"filters": 4, "levels": [1, 2]}, "num_steps": 20}
    workdir.check_config(longer)
    with pytest.raises(ValueError, match="num_steps: 10 there, 20 here"):
        workdir.check_config(longer, may_change=())
    with pytest.raises(ValueError, match=r"data\.max_keypoints: 64 there, 32 here"):
        workdir.check_config({**longer, "data": {"max_keypoints": 32}})


def test_a_stored_config_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not a run's config"):
        Workdir(tmp_path).check_config(CONFIG)


def test_checkpoints_are_selected_by_name_number_and_config(tmp_path: Path) -> None:
    save(tmp_path, {2: 0.75, 4: 0.5})
    workdir = Workdir(tmp_path)
    assert workdir.select_step() == (2, "best on the validation volumes")
    assert workdir.select_step("last") == (None, "last")
    assert workdir.select_step("4") == workdir.select_step(4) == (4, "step 4")
    workdir.write_config({"task": "segment", "checkpoint": {"select": "last"}})
    assert workdir.select_step() == (None, "last")
    assert workdir.newest_step() == 4
    with pytest.raises(ValueError, match="step is 'worst', expected best or last or a number"):
        workdir.select_step("worst")
