"""The time of a run: steps are timed by the loop itself, and validation counts."""

from pathlib import Path
from typing import Any

import pytest

from kafjax.configs import own_finetune, phantom_finetune
from kafjax.training import timing
from kafjax.training.preflight import complete_config, open_run_dataset
from kafjax.training.timing import Timing, estimate_seconds, format_seconds, time_steps
from kafjax.workdir.workdir import Workdir
from tests.runs import run_command, tiny_config


class Trainer:
    """Stands in for `train`: steps that end at given seconds, and what it was called with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ends: list[float]):
        self._ends, self._clock = ends, 0.0
        self.config: Any = None
        self.workdir = Path()
        monkeypatch.setattr(timing, "train", self)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self._clock)

    def __call__(self, config: Any, workdir: str, *, on_step: Any) -> int | None:
        self.config, self.workdir = config, Path(workdir)
        for step, end in enumerate(self._ends[: config.num_steps], start=1):
            self._clock = end
            on_step(step, config.num_steps)
        return None


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([30.0, 31.0, 33.0, 35.0, 37.0, 39.0], Timing(28.0, 2.0)),  # the second is faster
        ([100.0, 200.0, 300.0, 400.0, 500.0], Timing(0.0, 100.0)),  # slow: three are enough
        ([7.0], Timing(0.0, 7.0)),
    ],
)
def test_a_step_is_the_median_of_those_after_the_first_two(
    ends: list[float],
    expected: Timing,
    monkeypatch: pytest.MonkeyPatch,
    phantom_dataset: Path,
) -> None:
    trainer = Trainer(monkeypatch, ends)
    config = tiny_config(phantom_dataset)
    assert time_steps(config) == expected
    assert trainer.config.num_steps == 5
    assert config.num_steps is None
    assert not trainer.workdir.exists()


def test_a_signal_stops_timing(monkeypatch: pytest.MonkeyPatch, phantom_dataset: Path) -> None:
    monkeypatch.setattr(timing, "train", lambda *_, **__: 15)
    with pytest.raises(timing.Stopped) as stopped:
        time_steps(tiny_config(phantom_dataset))
    assert stopped.value.number == 15


def test_a_run_takes_its_steps_and_its_validations(phantom_dataset: Path, tmp_path: Path) -> None:
    config = phantom_finetune.get_config("scratch")
    config.data.dir = str(phantom_dataset.parents[1])
    config.data.num_folds = 4
    config.update({"batch_size": 6, "num_epochs": 10})
    config.every.validation_epochs = 2
    dataset = open_run_dataset(config)
    # 3 volumes of 12 slices to train on, one to validate on: 6 steps an epoch, 5 validations.
    found = estimate_seconds(
        complete_config(config, dataset), Workdir(tmp_path), dataset, Timing(30.0, 2.0)
    )
    assert found == pytest.approx(30 + 60 * 2.0 + 5 * 12 / 6 * 0.4 * 2.0)


def test_an_epoch_with_unlabelled_slices_is_a_pass_over_the_labelled_ones(
    phantom_dataset: Path, tmp_path: Path
) -> None:
    config = own_finetune.get_config("scratch,copy_paste")
    config.data.update({"dir": str(phantom_dataset.parents[1]), "name": "phantom"})
    config.data.update({"fold": 0, "num_folds": 4, "num_labeled": 1})
    config.update({"batch_size": 12, "num_epochs": 10})
    config.every.validation_epochs = 0
    dataset = open_run_dataset(config)
    # 12 labelled slices, 6 to a batch.
    completed = complete_config(config, dataset)
    found = estimate_seconds(completed, Workdir(tmp_path), dataset, Timing(30.0, 2.0))
    assert found == pytest.approx(30 + 10 * 2 * 2.0 + 12 / 12 * 0.4 * 2.0)


def test_lengths_of_time_have_two_units() -> None:
    seconds = (9.4, 150, 7260, 2 * 86400 + 7200)
    assert [format_seconds(s) for s in seconds] == ["9 s", "2 min", "2 h 1 min", "2 days 2 h"]


@pytest.mark.slow
def test_check_reports_the_time_of_a_run(phantom_dataset: Path, tmp_path: Path) -> None:
    status, output = run_command(phantom_dataset, tmp_path / "run", "--check")
    assert status == 0, output
    lines = output.splitlines()
    assert lines[-1].startswith("ok    time       about ")
    assert not (tmp_path / "run").exists()
    assert lines[0].startswith("kafjax ")
    assert all(line.startswith("ok    ") for line in lines[1:]), output
