"""The parts of the benchmark against nnU-Net that need neither it nor training."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import nnunet
from benchmarks.curves import collect, summarize
from benchmarks.nnunet_files import Case, find_sources, link_case
from benchmarks.nnunet_ours import report_of, set_length
from benchmarks.suggest import make_table
from data_prep.builder import Options
from data_prep.nifti import read_nifti
from data_prep.nnunet import open_nnunet
from data_prep.prepare import prepare_dataset
from kafjax.config_files import load_config
from kafjax.data.dataset import open_dataset
from kafjax.data.splits import Split
from kafjax.errors import UserError
from kafjax.workdir.workdir import Workdir
from tests.raw_layouts import write_nnunet


def arguments(**changes: Any) -> argparse.Namespace:
    given = ["--output", "x", "--data_dir", "d", "--name", "n", "--raw_dir", "r", "--nnunet"]
    parsed = nnunet._parse(given)
    vars(parsed).update(changes)
    return parsed


def test_both_sides_get_the_same_files(tmp_path: Path) -> None:
    write_nnunet(tmp_path / "raw", channels=("CT",))
    reader = open_nnunet(tmp_path / "raw")
    options = Options(max_keypoints=4)
    prepare_dataset(
        reader, tmp_path / "raw", tmp_path / "data", name="own", options=options, num_workers=0
    )
    dataset = open_dataset(tmp_path / "data", "own")
    sources = find_sources(dataset, tmp_path / "raw")
    labelled = [name for name in dataset.volumes if sources[name].label is not None]
    case = Case(Split((labelled[0],), (labelled[1],)), tmp_path / "case")
    link_case(case, sources, dataset)
    description = json.loads((case.raw / "dataset.json").read_text())
    assert description["channel_names"] == {"0": "CT"}
    assert list(description["labels"]) == list(dataset.classes)
    assert description["numTraining"] == 1
    assert sorted(p.parent.name for p in case.raw.rglob("*.nii*")) == [
        "imagesTr",
        "imagesTs",
        "labelsTr",
    ]
    for folder, name in (("imagesTr", labelled[0]), ("imagesTs", labelled[1])):
        (path,) = (case.raw / folder).iterdir()
        assert path.resolve() == sources[name].image.resolve()
        assert path.name.startswith(f"{name}_0000.nii")
    (image,), (label,) = case.images.iterdir(), case.labels.iterdir()
    assert (image.resolve(), label.resolve()) == (
        sources[labelled[1]].image.resolve(),
        sources[labelled[1]].label.resolve(),  # type: ignore[union-attr]
    )
    assert read_nifti(label).array.shape == read_nifti(image).array.shape
    with pytest.raises(UserError, match="has no file of "):
        find_sources(dataset, tmp_path)


@pytest.mark.parametrize(("steps", "epochs", "cut"), [(300, 50, None), (4, 1, 4), (None, 4, 20)])
def test_a_run_and_its_schedule_end_with_the_time(
    steps: int | None, epochs: int, cut: int | None
) -> None:
    config = load_config("own_finetune:scratch")
    set_length(config, steps, epoch=6)
    assert (config.num_epochs, config.num_steps) == (epochs, cut)
    assert config.every.validation_epochs == 0
    assert config.checkpoint.select == "last"


def test_the_pace_leaves_out_what_waits_for_compilation() -> None:
    found = report_of([30.0, 45.0, 46.0, 48.0, 49.0], 60.0)
    np.testing.assert_allclose(found["step_seconds"], 4 / 3)
    assert (found["steps"], found["first_step_seconds"], found["seconds"]) == (5, 30, 60)
    assert report_of([30.0], 31.0)["step_seconds"] is None


def test_runs_are_planned_short_ones_first() -> None:
    given = arguments(
        minutes="30,10", folds=(3, 4), kafjax=[["own", "own_finetune:scratch --config.seed=1"]]
    )
    runs = nnunet.plan(given)
    assert [run.name for run in runs[:4]] == [
        "fold3_M2_nnunet_10min_seed0",
        "fold3_M2_own_10min_seed0",
        "fold4_M2_nnunet_10min_seed0",
        "fold4_M2_own_10min_seed0",
    ]
    assert len(runs) == 8
    assert runs[1].config == ("own_finetune:scratch", "--config.seed=1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": None}, "expected --name, or --collect"),
        ({"nnunet": False}, "no side: expected --nnunet"),
        ({"minutes": "ten"}, "--minutes is 'ten', expected numbers"),
        ({"kafjax": [["nnunet", "x"]]}, "names are nnunet, expected others"),
        ({"clock": "cpu", "device": "cuda"}, "--clock cpu on .* expected one core"),
    ],
)
def test_mistakes_are_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as found:
        nnunet.plan(arguments(**changes))
    assert "\n" not in str(found.value)


def result(side: str, minutes: float, dice: float, **more: Any) -> dict[str, Any]:
    return {
        "side": side,
        "num_labeled": 2,
        "minutes": minutes,
        "fold": 0,
        "seed": 0,
        "dice": dice,
        "volume_dice": dice / 2,
        "seconds": 60 * minutes,
        "steps": 7,
        "first_step_seconds": 3.0,
        "date": "2026-11-26",
        "asked": {"clock": "cpu"},
        "machine": {"cores": 1, "processor": "p", "memory_gb": 1, "python": "3", "versions": {}},
        **more,
    }


def test_curves_have_means_and_standard_errors(tmp_path: Path) -> None:
    results = [
        result("a", 10, 0.2, fold=0),
        result("a", 10, 0.5, fold=1, pretraining_minutes=4.0),
        result("b", 10, 0.7),
        result("a", 2, 0.1),
    ]
    points = summarize(results)
    assert [(p["side"], p["minutes"], p["n"]) for p in points] == [
        ("a", 2, 1),
        ("a", 10, 2),
        ("b", 10, 1),
    ]
    np.testing.assert_allclose(points[1]["dice"], 0.35)
    np.testing.assert_allclose(points[1]["dice_error"], np.std([0.2, 0.5], ddof=1) / np.sqrt(2))
    assert points[1]["pretraining_minutes"] == 2
    assert points[0]["dice_error"] is None
    with pytest.raises(UserError, match="no run is finished"):
        collect(tmp_path)
    for i, one in enumerate(results):
        folder = tmp_path / "runs" / str(i)
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(one))
    table = collect(tmp_path)
    assert "| a | 2 | 10 | 0.350 ± 0.150 | 0.175 ± 0.075 | 2 | 10.0 |" in table
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 5
    assert (tmp_path / "results.svg").stat().st_size > 1000


def test_minutes_of_pretraining_are_those_of_all_runs_before(tmp_path: Path) -> None:
    rows = [
        {"step": 10, "time": {"seconds_per_step": 3.0}},
        {"step": 12, "time": {"seconds_per_step": 0.5}},
        {"step": 12, "time": {"validation_seconds": 9.0}},
    ]
    for name, start in (("first", None), ("second", "first"), ("third", "second")):
        folder = Workdir(tmp_path / name)
        own = {} if start is None else {"init_from": str(tmp_path / start)}
        folder.path.mkdir()
        folder.write_config({"task": "pretrain", **own})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        folder.metrics_file.write_text(text)
    assert nnunet.pretraining_seconds(Workdir(tmp_path / "third")) == 2 * 31
    assert nnunet.pretraining_seconds(Workdir(tmp_path / "first")) == 0


def test_a_finished_run_is_not_repeated_and_another_config_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [["own", "own_finetune:scratch"]]
    (run,) = nnunet.plan(arguments(nnunet=False, kafjax=own, minutes="1"))
    folder = tmp_path / "runs" / run.name
    folder.mkdir(parents=True)
    asked = {"config": ["own_finetune:scratch"], "clock": "wall"}
    (folder / "result.json").write_text(json.dumps({"asked": asked}))
    benchmark = SimpleNamespace(output=tmp_path, _asked=lambda _: asked)
    nnunet.Benchmark.make(benchmark, run)  # type: ignore[arg-type]
    assert capsys.readouterr().out == f"{run.name}: finished\n"
    benchmark._asked = lambda _: {**asked, "clock": "cpu"}
    with pytest.raises(UserError, match="rename the side"):
        nnunet.Benchmark.make(benchmark, run)  # type: ignore[arg-type]


def test_a_failed_command_shows_its_last_lines(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"ended with 3:\nout\nbad"):
        nnunet.call(["sh", "-c", "echo out; echo bad >&2; exit 3"], tmp_path / "log.txt")


def test_a_suggestion_is_compared_with_the_draws() -> None:
    sets = {"suggested": ("a", "b"), "draw 0": ("c", "d"), "draw 1": ("a", "d")}
    table = make_table(sets, {"suggested": [0.5, 0.7], "draw 0": [0.4, 0.4], "draw 1": [0.8, 0.6]})
    assert table.rows[0] == ["suggested", "a, b", "0.500", "0.700", "0.600"]
    assert table.notes == [
        "Draws: 0.550 ± 0.212 (standard deviation). Suggested: +0.050, better than 1 of 2."
    ]


def test_a_run_that_took_too_long_is_made_again_with_fewer_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten seconds and 0.5 s a step in the timing, 0.8 s a step afterwards."""
    own = [["own", "own_finetune:scratch"]]
    (run,) = nnunet.plan(arguments(nnunet=False, kafjax=own, minutes="1"))
    benchmark = object.__new__(nnunet.Benchmark)
    benchmark.output, benchmark.arguments = tmp_path, arguments()
    asked: list[int | None] = []

    def train(run: Any, workdir: Path, folder: Path, steps: int | None = None) -> dict[str, Any]:
        asked.append(steps)
        pace = 0.5 if steps is None else 0.8
        n = steps or 20
        return {"steps": n, "step_seconds": pace, "seconds": 10 + n * pace}

    class StopHereError(Exception):
        pass

    def stop(_: Any) -> None:
        raise StopHereError

    monkeypatch.setattr(benchmark, "_train", train)
    monkeypatch.setattr(nnunet, "read_split", stop)
    with pytest.raises(StopHereError):
        benchmark.train_ours(run, Case(Split((), ()), tmp_path), tmp_path / "run")
    assert asked == [None, 100, 62]
    assert benchmark.fitting_steps(run) == 62  # the next run needs no timing
    run = nnunet.plan(arguments(nnunet=False, kafjax=own, minutes="0.1"))[0]
    with pytest.raises(UserError, match=r"a step takes 0\.8 s and all else 10 s"):
        benchmark.fitting_steps(run)
