"""`kafjax auto` on six scans, two of them labelled: stopped twice, continued, and refused."""

import os
import signal
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from data_prep.check import survey_dataset
from data_prep.faults import DatasetError
from data_prep.phantom.subjects import render
from kafjax.auto import plan as planning
from kafjax.auto import sizes, walk
from kafjax.auto.plan_file import read_plan
from kafjax.auto.progress import Progress
from kafjax.auto.request import Request
from kafjax.auto.walk import run_auto
from kafjax.checkpoint.checkpointer import saved_steps
from kafjax.training.timing import Timing, format_seconds
from kafjax.workdir.metrics import read_metrics
from kafjax.workdir.scores import read_scores
from kafjax.workdir.split import read_split
from kafjax.workdir.workdir import Workdir
from tests.raw_layouts import save

SHIPPED = sizes.NETWORKS
# The first compiles soonest.
PLAIN = sizes.Network(4, 0, 16, 0, edge=32, batch=4)
TINY = sizes.Network(4, 1, 16, 2, edge=32, batch=4)
SCANS = [f"scan_{number}" for number in range(6)]


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """One network that compiles soon, and few steps."""
    monkeypatch.setattr(sizes, "NETWORKS", (PLAIN,))
    monkeypatch.setattr(sizes, "PRETRAINING_STEPS", (8, 4, 2))
    monkeypatch.setattr(sizes, "FINE_TUNING_STEPS", (6, 4, 2))
    monkeypatch.setattr(sizes, "SEMI_SUPERVISED_STEPS", 3)


def write_scans(folder: Path, labelled: int = 2, count: int = 6, *, scale: int = 1) -> Request:
    """Scans of two sizes, the first ones with labels 5 and 9."""
    for name in ("scans", "labels"):
        (folder / name).mkdir()
    for number, scan in enumerate(SCANS[:count]):
        image, label = render((scale * 32, scale * (24 + 8 * (number % 2)), 6), number=number)
        save(folder / "scans" / f"{scan}.nii.gz", image)
        if number < labelled:
            classes = np.array([0, 5, 5, 0, 0, 9, 0, 0], np.uint8)[label]
            save(folder / "labels" / f"{scan}.nii.gz", classes)
    return Request.of(str(folder / "scans"), str(folder / "labels"))


class Killed(BaseException):
    """As if the process had been killed."""


def test_a_folder_of_scans_ends_in_labels_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    request, out = write_scans(tmp_path), tmp_path / "out"
    assert run_auto(request, out, dry_run=True) is None
    planned = capsys.readouterr().out
    assert "6 scans, 2 with labels, 36 axial slices of 2 sizes, 24 x 32 to 32 x 32" in planned
    assert "score: none, as all labels are trained on; --estimate" in planned
    assert "half of each batch from the scans without labels, by copy-paste" in planned
    assert sorted(path.name for path in out.iterdir()) == ["plan.py"]

    # The plan is a file to edit.
    text = (out / "plan.py").read_text()
    assert "'every.checkpoint': 20" in text
    (out / "plan.py").write_text(text.replace("'every.checkpoint': 20", "'every.checkpoint': 1"))

    # A signal in pretraining saves a checkpoint.
    sent: list[float] = []

    def interrupt(_: Progress, share: float) -> None:
        if not sent:
            sent.append(share)
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "update", interrupt)
        assert run_auto(request, out) == signal.SIGTERM
    first = saved_steps(out / "pretrain")[-1]
    assert first < 8
    assert "Continuing the plan" in capsys.readouterr().out

    # Killed in the third prediction.
    predicted: list[str] = []
    predict_file = walk.predict_file

    def die(job: Any, predictor: Any) -> None:
        if len(predicted) == 2:
            raise Killed
        predict_file(job, predictor)
        predicted.append(job.labels.name)

    with monkeypatch.context() as patch:
        patch.setattr(walk, "predict_file", die)
        with pytest.raises(Killed):
            run_auto(request, out)
    assert f"Resuming {out / 'pretrain'} from step {first}." in (out / "log.txt").read_text()
    assert saved_steps(out / "pretrain")[-1] == 8
    trained = {name: read_metrics(out / name) for name in ("pretrain", "finetune")}
    times = {path.name: path.stat().st_mtime_ns for path in (out / "predictions").iterdir()}
    assert sorted(times) == sorted(predicted)

    capsys.readouterr()
    assert run_auto(request, out) is None
    said = capsys.readouterr().out
    assert f"predictions: 6 label files in {out / 'predictions'}" in said
    assert "score:       none" in said
    assert {name: read_metrics(out / name) for name in trained} == trained
    for scan in SCANS:
        path = out / "predictions" / f"{scan}.nii.gz"
        found, source = (nib.load(p) for p in (path, tmp_path / "scans" / path.name))
        assert found.shape == source.shape
        np.testing.assert_array_equal(found.affine, source.affine)
        assert set(np.unique(found.dataobj)) <= {0, 5, 9}
        assert path.stat().st_mtime_ns == times.get(path.name, path.stat().st_mtime_ns)
    split = read_split(Workdir(out / "finetune"))
    assert split is not None
    assert (list(split.train), split.validation) == (SCANS[:2], {})
    assert list(split.unlabelled) == SCANS[2:]
    rows = (out / "predictions" / "volumes.csv").read_text().splitlines()
    assert len(rows) == 1 + 6 * 2
    assert rows[1].startswith("scan_0,class_5,")
    assert "<html" in (out / "report.html").read_text()

    # Other arguments, other scans, and a plan that was edited too late.
    other = request._replace(minutes=3.0)
    with pytest.raises(ValueError, match=r"another request.*\n  minutes: None there, 3.0 here"):
        run_auto(other, out)
    edited = (out / "plan.py").read_text().replace("'model.filters': 4", "'model.filters': 8")
    (out / "plan.py").write_text(edited)
    with pytest.raises(ValueError, match=r"another config.*\n.*model.filters: 4 there, 8 here"):
        run_auto(request, out)
    (out / "plan.py").write_text(edited.replace("'model.filters': 8", "'model.filters': 4"))
    (tmp_path / "scans" / "scan_5.nii.gz").unlink()
    with pytest.raises(ValueError, match=r"another --output:\n  scan_5: its files are missing"):
        run_auto(request, out)
    with pytest.raises(ValueError, match=r"plan\.py, line 1: "):
        (out / "plan.py").write_text("REQUEST =")
        run_auto(request, out)


@pytest.mark.slow
def test_one_of_four_labelled_scans_is_kept_for_the_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a KAF-UNet, and slices of twice the longest patch, on a coarser grid."""
    monkeypatch.setattr(sizes, "NETWORKS", (TINY,))
    request, out = write_scans(tmp_path, labelled=4, count=4, scale=2), tmp_path / "out"
    assert run_auto(request, out) is None
    said = capsys.readouterr().out
    assert "patch 32 x 32, on a grid of 3.4 mm" in said
    plan = read_plan(out / "plan.py", request)
    assert plan is not None
    assert (plan.preparation["pixel_spacing"], plan.preparation["radius"]) == (3.4, 9)
    for path in sorted((tmp_path / "scans").iterdir()):
        found, source = (nib.load(p) for p in (out / "predictions" / path.name, path))
        assert found.shape == source.shape
        np.testing.assert_array_equal(found.affine, source.affine)
    assert "score: of scan_3, which is not trained on" in said
    scores = read_scores(Workdir(out / "finetune"))
    assert scores is not None
    assert list(scores["by_volume"]) == ["scan_3"]
    assert "on scan_3 (validation)" in said


@pytest.mark.slow
def test_an_estimate_leaves_each_labelled_scan_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sizes, "NETWORKS", (TINY,))
    request, out = write_scans(tmp_path, count=3)._replace(estimate=True), tmp_path / "out"
    assert run_auto(request, out) is None
    assert "over 2 folds" in capsys.readouterr().out
    left_out = []
    for fold in range(2):
        split = read_split(Workdir(out / "estimate" / f"fold{fold}"))
        assert split is not None
        assert len(split.train) == len(split.validation) == 1
        left_out += split.validation
    assert sorted(left_out) == SCANS[:2]
    last = read_split(Workdir(out / "finetune"))
    assert last is not None
    assert list(last.train) == SCANS[:2]


def test_labelled_subjects_are_kept_or_left_out_by_their_number(tmp_path: Path) -> None:
    request = write_scans(tmp_path, labelled=4)
    reader = request.open_reader()
    survey, _ = survey_dataset(reader, Path(request.images), num_workers=0)
    kept = planning._count_slices(survey, request)
    assert kept == (36, 36, 3 * 6, 2 * 6, "scan_3", 0)
    left_out = planning._count_slices(survey, request._replace(estimate=True))
    assert left_out == (36, 36, 4 * 6, 2 * 6, None, 4)
    (tmp_path / "labels" / "scan_3.nii.gz").unlink()
    fewer, _ = survey_dataset(request.open_reader(), Path(request.images), num_workers=0)
    assert planning._count_slices(fewer, request) == (36, 36, 3 * 6, 3 * 6, None, 0)


def test_a_table_of_subjects_keeps_the_scans_of_one_together(tmp_path: Path) -> None:
    write_scans(tmp_path, labelled=5)
    table = tmp_path / "subjects.csv"
    table.write_text("volume,subject\nscan_3,zoe\nscan_4,zoe\n")
    folders = (str(tmp_path / name) for name in ("scans", "labels", "subjects.csv"))
    request = Request.of(*folders)
    survey, faults = survey_dataset(
        request.open_reader(),
        Path(request.images),
        num_workers=0,
        subjects=request.read_subjects(),
    )
    assert faults == []
    assert planning._count_slices(survey, request) == (36, 36, 3 * 6, 6, "zoe", 0)
    table.write_text("volume,subject\nscan_9,zoe\n")
    with pytest.raises(DatasetError, match="holds no volume 'scan_9'"):
        run_auto(request, tmp_path / "out")
    table.write_text("volume,subject\nscan_3,\n")
    with pytest.raises(ValueError, match=r"(?s)--minutes is 0.*line 2: expected a volume"):
        run_auto(request._replace(minutes=0.0), tmp_path / "out")
    table.unlink()
    with pytest.raises(ValueError, match=r"--subjects is .*No such file"):
        run_auto(request, tmp_path / "out")


# What is refused before any work.


def test_all_bad_input_is_named_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request, out = write_scans(tmp_path), tmp_path / "out"
    save(tmp_path / "scans" / "scan_0.nii", render((32, 24, 6))[0])
    save(tmp_path / "labels" / "zoe.nii.gz", render((32, 24, 6))[1])
    save(tmp_path / "labels" / "scan_1.nii.gz", render((32, 24, 7))[1])
    (tmp_path / "scans" / "notes.txt").write_text("a finding, which stops nothing")
    with pytest.raises(DatasetError) as error:
        run_auto(request, out)
    assert "notes.txt: is not used" in capsys.readouterr().out
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    for part in ("has the name of scan_0.nii", "has no scan of its name", "shape (32, 24, 7)"):
        assert any(part in line for line in lines)
    assert not out.exists()


def test_requests_that_cannot_be_are_refused(tmp_path: Path) -> None:
    request = write_scans(tmp_path, labelled=1, count=2)
    same = request._replace(labels=request.images)
    with pytest.raises(DatasetError, match="is the folder of the scans too"):
        run_auto(same, tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"(?s)--minutes is -1.*--output is the folder of --images"
    ):
        run_auto(request._replace(minutes=-1.0), Path(request.images))
    with pytest.raises(ValueError, match="found 1; expected at least 2"):
        run_auto(request._replace(estimate=True), tmp_path / "out")
    (tmp_path / "raw" / "imagesTr").mkdir(parents=True)
    layout = Request.of(str(tmp_path / "raw"), str(tmp_path / "labels"))
    with pytest.raises(ValueError, match="has nnU-Net's layout, with labels in labelsTr"):
        run_auto(layout, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "plan.py").write_text("def get_config(stage): return 1\n")
    with pytest.raises(ValueError, match="expected a ConfigDict"):
        read_plan(tmp_path / "out" / "plan.py", request)


# Sizes.


class Clock:
    """A probe of a device on which a step takes a second for each unit of work."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self.timed: list[Any] = []

    def memory(self, config: Any) -> int:
        return 10**6

    def time(self, config: Any) -> Timing:
        self.timed.append(config)
        return Timing(10.0, self._seconds * config.work * config.filters**1.5)


class Config:
    """What the choice reads of a config."""

    def __init__(self, network: sizes.Network, work: float = 1.0):
        self.filters, self.batch_size, self.work = network.filters, 8, work


def make(network: sizes.Network, unlabelled: bool, limit: int) -> tuple[Config, Config]:
    return Config(network), Config(network, 3.0 if unlabelled else 1.0)


NETWORKS = tuple(sizes.Network(f, 0, 16, 0, edge=64, batch=8) for f in (32, 16, 8))
WORK = sizes.Work(3600.0, 64, 64, fixed=100.0, predicted=0, keypoint_seconds=0.0, fine_tunings=1)


@pytest.mark.parametrize(("seconds", "filters"), [(0.001, 32), (0.02, 16), (0.08, 8)])
def test_the_largest_network_that_can_be_trained_well_is_chosen(
    seconds: float, filters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "NETWORKS", NETWORKS)
    monkeypatch.setattr(sizes, "PRETRAINING_STEPS", (20_000, 1000, 100))
    monkeypatch.setattr(sizes, "FINE_TUNING_STEPS", (5000, 1000, 300))
    probe: Any = Clock(seconds)
    choice = sizes.choose(probe, make, lambda: 3600.0, WORK)
    assert choice.network.filters == filters
    step = seconds * filters**1.5
    # A tenth of the time is kept in reserve.
    used, available = step * sum(choice.steps), 0.9 * (3600.0 - choice.overhead)
    assert used <= available
    assert used > available - 2 * step or choice.steps == (20_000, 5000)


@pytest.mark.parametrize(
    ("seconds", "filters", "unlabelled"),
    [(0.001, 32, True), (0.006, 16, True), (0.045, 8, True), (0.08, 8, False)],
)
def test_unlabelled_scans_come_before_a_larger_network(
    seconds: float, filters: int, unlabelled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "NETWORKS", NETWORKS)
    monkeypatch.setattr(sizes, "PRETRAINING_STEPS", (20_000, 1000, 100))
    monkeypatch.setattr(sizes, "FINE_TUNING_STEPS", (5000, 1000, 300))
    monkeypatch.setattr(sizes, "SEMI_SUPERVISED_STEPS", 600)
    probe: Any = Clock(seconds)
    choice = sizes.choose(probe, make, lambda: 3600.0, WORK._replace(unlabelled=True))
    assert (choice.network.filters, choice.unlabelled) == (filters, unlabelled)
    assert choice.steps[1] >= (600 if unlabelled else 300)
    assert sum(config.work > 1 for config in probe.timed) == unlabelled  # none in vain


def test_too_little_time_says_how_much_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "NETWORKS", NETWORKS)
    monkeypatch.setattr(sizes, "PRETRAINING_STEPS", (20_000, 1000, 100))
    monkeypatch.setattr(sizes, "FINE_TUNING_STEPS", (5000, 1000, 300))
    probe: Any = Clock(1.0)  # 22.6 s a step: 400 of them, and reserves
    with pytest.raises(ValueError, match=r"shortest training takes 2 h 31 min.*--minutes 187"):
        sizes.choose(probe, make, lambda: 3600.0, WORK)


def test_work_grows_as_measured_on_cpu() -> None:
    kaf, large, small = SHIPPED[-3:]
    # Steps of 8 at 64 px with 64 keypoints: 1.86 s, 0.23 s and 0.61 s (pretraining + fine-tuning).
    per_sample = [n.work(64, 64) / n.batch for n in (kaf, small, large)]
    assert per_sample[0] / per_sample[1] == pytest.approx(1.86 / 0.23, rel=0.2)
    assert per_sample[2] / per_sample[1] == pytest.approx(0.61 / 0.23, rel=0.2)
    # Patches stop growing at the network's edge; their keypoints are a part of the slice's.
    assert small.work(256, 1024) == small.work(128, 256)
    assert kaf.work(256, 1024) == kaf.work(128, 256)


def test_slices_longer_than_the_patch_get_a_grid_that_shows_them_whole() -> None:
    sizes_of, mm = [(256, 216)] * 3 + [(256, 256)] + [(400, 500)], [(1.5, 1.5)] * 5
    # Four of five are at most 384 mm long.
    assert planning.coarser_spacing(sizes_of, mm, 128) == 3.0
    assert planning.coarser_spacing(sizes_of, mm, 192) == 2.0
    assert planning.coarser_spacing([(64, 64)] * 2, [(np.float32(1.7),) * 2] * 2, 32) == 3.4
    assert planning.coarser_spacing(sizes_of, mm, 250) is None  # nearly as they are
    assert planning.coarser_spacing(sizes_of[:4], mm[:4], 256) is None
    odd = [(1.5, 1.5)] * 4 + [(0.1, 0.1)]
    assert planning.coarser_spacing(sizes_of, odd, 128) is None
    assert planning.coarser_spacing(sizes_of, [(100.0, 100.0)] * 5, 128) is None


def test_seconds_left_are_of_the_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now = 100.0
    monkeypatch.setattr("kafjax.auto.progress.time.perf_counter", lambda: now)
    with (tmp_path / "log").open("w") as stream:
        progress = Progress({"a": 10.0, "b": 60.0, "c": 5.0}, stream)
        progress.start("b")
        assert progress.seconds_left(0.0) == 65.0
        progress.update(0.5)  # after a stop half of it was there
        now += 10
        assert progress.seconds_left(0.75) == pytest.approx(10 + 5)
    assert (tmp_path / "log").read_text().startswith("[2/3] b: 0%, 1 min left")
    assert [format_seconds(s) for s in (9.4, 150, 7260)] == ["9 s", "2 min", "2 h 1 min"]
