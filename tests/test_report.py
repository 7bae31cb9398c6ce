"""The report's page: its content, well-formed and escaped, loading nothing."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jax
import numpy as np
import pytest

from kafjax.configs import phantom_finetune, phantom_pretrain, phantom_scratch
from kafjax.data.dataset import Slice, open_dataset
from kafjax.inference.results import summarize, write_results
from kafjax.report import pictures, report
from kafjax.report.charts import Curve, chart, draw, thin
from kafjax.report.html import element, page, table
from kafjax.report.pictures import choose_volumes, predict_slices
from kafjax.report.runs import expand, read_runs
from kafjax.segmentation_metrics import ClassMetrics
from kafjax.workdir.metrics import MetricWriter
from kafjax.workdir.preparation import write_preparation
from kafjax.workdir.scores import describe_run
from kafjax.workdir.workdir import Workdir

ROOT = Path(__file__).parents[1]
VOID = {"meta", "img", "br"}
HOSTILE = "<script>alert(1)</script>&\"'"


class Page(HTMLParser):
    """Checks that tags close in order, and collects texts, attributes and table rows."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def write_run(workdir: Path, config: Any, **changes: Any) -> Path:
    """A workdir as a run leaves it, without checkpoints."""
    workdir.mkdir(parents=True)
    config.update_from_flattened_dict(changes)
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    with MetricWriter(workdir, start_step=0, num_steps=4) as writer:
        for step in (2, 4):
            metrics = {"loss": 4.0 / step, "keypoints": 30.0 + step, "epoch": step / 4}
            writer.write(step, metrics, {"seconds_per_step": 50.0})
            if config.task == "segment":
                scores = {"validation_dice": 0.1 * step, "validation_dice_1": float("nan")}
                writer.write(step, scores, {"validation_seconds": 1.0})
        writer.picture(2, "old", np.zeros((4, 4, 3), np.uint8))
        writer.picture(2, "pair", np.zeros((4, 4, 3), np.uint8))
        writer.picture(4, "pair", np.full((4, 4, 3), 7, np.uint8))
    return workdir


def write_evaluation(workdir: Path, dice: dict[str, float], *, timed: bool = True) -> None:
    """An evaluation with the classes heart and lung, the latter in no volume."""
    nothing = ClassMetrics(float("nan"), float("nan"), float("nan"), empty=True, missed=False)
    metrics = {
        volume: {
            "heart": ClassMetrics(d, 10 * (1 - d), 1 - d, empty=False, missed=d == 0),
            "lung": nothing,
        }
        for volume, d in dice.items()
    }
    counts = np.array([[9, 9, 9], [3, 5, 7], [0, 0, 0]])
    found = summarize(counts, metrics, ("heart", "lung"))
    found["chance"] = 0.125
    if timed:
        seconds = {volume: 1.5 + i for i, volume in enumerate(dice)}
        found |= {"seconds": seconds, "environment": {"jax": "9.8.7"}}
    folder = Workdir(workdir)
    run = describe_run(folder, folder.read_config())
    found |= {"step": 4, "checkpoint": "last", "split": "validation", "run": run}
    write_results(found, workdir / "evaluation")


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """A pretraining run and two segmentations, one of them not evaluated, without their dataset."""
    nowhere = {"data.dir": str(tmp_path / "nowhere")}
    pre = write_run(tmp_path / "pre", phantom_pretrain.get_config(), **nowhere)
    config = phantom_finetune.get_config()
    fine = write_run(tmp_path / "fine", config, seed=3, init_from="elsewhere", **nowhere)
    bare = write_run(tmp_path / "bare", phantom_scratch.get_config(), seed=4, **nowhere)
    write_preparation(fine, {"classes": ["background", "heart", "lung"], "libraries": {"x": "1"}})
    write_evaluation(fine, {"ct_1": 0.75, "ct_2": 0.0})
    return [pre, fine, bare]


def make(tmp_path: Path, workdirs: list[Path], **options: Any) -> Page:
    report(workdirs, tmp_path / "report.html", **options)
    assert not (tmp_path / "report.html.partial").exists()
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_page_tells_what_the_workdirs_hold_and_what_they_lack(
    tmp_path: Path, runs: list[Path]
) -> None:
    found = make(tmp_path, runs)
    text = " ".join(found.texts)
    # Task, network, start, steps, epochs, time (4 steps of 50 s), loss, validation, evaluation.
    shown = [
        "segment",
        "kaf_unet",
        "elsewhere",
        "4",
        "1.0",
        "0:03:20",
        "1.0000",
        "0.4000 (step 4)",
    ]
    assert [row[1:10] for row in found.rows if row[0] == "fine"] == [[*shown, "0.5000"]]
    assert [row for row in found.rows if row[0] == "heart"] == [
        ["heart", "0.5000"],
        ["heart", "0.375 ± 0.375", "6.2 ± 3.8", "0.62 ± 0.38", "2", "0", "1"],
    ]
    assert ["class", "fine, step 4"] in found.rows
    assert ["by chance", "0.1250"] in found.rows
    assert [r[1:] for r in found.rows if r[0] == "seed"] == [["0"], ["3", "4"]]
    assert [r[1:] for r in found.rows if r[0] == "init_from"] == [["elsewhere", "-"]]
    assert [r[1:] for r in found.rows if r[0] == "loss.method"] == [["pcl"]]
    assert [r for r in found.rows if r[0] == "ct_2"][-2:] == [
        ["ct_2", "fine", "validation", "0.000", "heart (0.000)", "10.0", "heart"],
        ["ct_2", "fine", "validation", "2.50", "no"],
    ]
    assert "Not evaluated yet (kafjax evaluate): bare." in text
    assert "phantom: the dataset is not at hand" in text
    assert "Not noted: the environment of training of pre, preparation for pre, training of" in text
    (header,) = (row for row in found.rows if row[:2] == ["", "this page"])
    assert header[2:] == ["evaluation of fine (validation)", "preparation for fine"]
    assert ["jax", jax.__version__, "9.8.7", "-"] in found.rows
    assert ["x", "-", "-", "1"] in found.rows
    assert "fine: old, step 2" in text
    assert "fine: pair, step 4" in text
    assert "fine: pair, step 2" not in text


def test_a_run_on_the_plateau_is_named_on_the_page(tmp_path: Path) -> None:
    workdir = write_run(tmp_path / "pre", phantom_pretrain.get_config())
    row = {"step": 200, "loss": 9.0, "loss_cnn": 4.906}
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    page = make(tmp_path, [workdir])
    assert any("all embeddings are equal: loss_cnn (200 steps)" in text for text in page.texts)


def test_page_is_whole_accessible_and_loads_nothing(tmp_path: Path, runs: list[Path]) -> None:
    found = make(tmp_path, runs)
    first = (tmp_path / "report.html").read_bytes()
    make(tmp_path, runs)
    assert (tmp_path / "report.html").read_bytes() == first
    names = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(names) == len(set(names)) == 8
    assert [a["href"] for a in found.all("a")] == [f"#{name}" for name in names]
    kinds = "|".join(["png", r"svg\+xml"])
    assert all(re.match(f"data:image/({kinds});base64,", a["src"]) for a in found.all("img"))
    unnamed = [a["src"] for a in found.all("img") if not a["alt"]]
    assert len(unnamed) == 3  # of the legends, where each run's name stands next to its line
    assert sum("by step: " in a["alt"] for a in found.all("img")) >= 4
    assert all(a["scope"] in ("row", "col") for a in found.all("th"))
    assert len(found.all("caption")) == len(found.all("table")) >= 6
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in found.tags}
    assert b"url(" not in first
    assert b"http:" not in first
    assert b"https:" not in first
    (policy,) = (a["content"] for a in found.all("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none'")


def test_texts_of_files_are_escaped(tmp_path: Path) -> None:
    name = f"run{HOSTILE.replace('/', '')}"
    config = phantom_scratch.get_config()
    config.update_from_flattened_dict({"data.name": HOSTILE, "data.dir": str(tmp_path / "no")})
    workdir = write_run(tmp_path / name, config)
    write_evaluation(workdir, {HOSTILE: 0.5})
    found = make(tmp_path, [workdir])
    assert not found.all("script")
    assert any(HOSTILE in row[0] for row in found.rows)
    assert any(row[0] == name for row in found.rows)


def test_damaged_files_are_named_on_the_page(tmp_path: Path, runs: list[Path]) -> None:
    fine = runs[1]
    (fine / "evaluation.json").write_text('{"pooled_dice": {}}')
    (fine / "metrics.jsonl").write_text("{\n")
    (fine / "preparation.json").write_text("7")
    board = next((fine / "tensorboard").iterdir())
    board.write_bytes(bytes([2, *[0] * 11, 255, 255, *[0] * 4]))
    text = " ".join(make(tmp_path, runs).texts)
    assert "evaluation.json: damaged (no step, checkpoint, split, run, by_class, by_volume)" in text
    assert "metrics.jsonl: damaged (" in text
    assert "preparation.json: damaged (no fields)" in text
    assert f"{board.name}: damaged (" in text


def test_folders_without_a_run_are_one_line(tmp_path: Path, runs: list[Path]) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: has no config.json; .*; .*away: has no") as found:
        report([tmp_path / "empty", *runs, tmp_path / "away"], tmp_path / "report.html")
    assert "\n" not in str(found.value)
    with pytest.raises(ValueError, match="samples is -1, expected 0 or more"):
        report(runs, tmp_path / "report.html", num_samples=-1)
    for place in (tmp_path, tmp_path / "nowhere" / "report.html"):
        with pytest.raises(ValueError, match="expected a file in a folder that exists"):
            report(runs, place)
    assert not list(tmp_path.glob("*report*"))


def test_cross_validation_stands_for_its_runs(tmp_path: Path) -> None:
    for name in ("fold0_M10_seed0", "fold0_M2_seed0"):
        write_run(tmp_path / "cv" / name, phantom_scratch.get_config())
    rows = [{"num_labeled": 2, "folds": [0.25, None], "mean": None, "std": None}]
    document = {"folds": [0, 2], "rows": rows, "missing": ["fold2_M2_seed0"], "runs": []}
    (tmp_path / "cv" / "cross_validation.json").write_text(json.dumps(document))
    places, tables = expand([tmp_path / "cv", tmp_path / "cv" / "fold0_M2_seed0"])
    assert [place.name for place in places] == ["fold0_M2_seed0", "fold0_M10_seed0"]
    assert tables == [(tmp_path / "cv", document)]
    found = make(tmp_path, [tmp_path / "cv"], num_samples=0)
    assert ["labelled volumes M", "fold 1", "fold 3", "mean", "standard deviation"] in found.rows
    assert ["2", "0.2500", "-", "-", "-"] in found.rows
    assert "missing: fold2_M2_seed0" in " ".join(found.texts)


def test_runs_have_the_shortest_names_that_differ(tmp_path: Path) -> None:
    for name in ("a/run", "b/run", "c"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    found = read_runs([tmp_path / name for name in ("a/run", "b/run")])
    assert [run.name for run in found] == ["a/run", "b/run"]
    assert [run.name for run in read_runs([tmp_path / "c", tmp_path / "a/run"])] == ["c", "run"]


def test_worst_volumes_of_all_runs_come_first() -> None:
    scores = [{"a": 0.9, "b": 0.2, "c": 0.5}, {"d": 0.1, "b": 0.3}, {}]
    assert choose_volumes(scores, most=9) == ["b", "d", "a"]
    assert choose_volumes(scores, most=2) == ["b", "d"]


def svg_of(chart_element: ElementTree.Element) -> str:
    """The SVG of a figure's picture."""
    picture = chart_element.find("img")
    assert picture is not None
    kind, data = picture.attrib["src"].split(",")
    assert kind == "data:image/svg+xml;base64"
    return base64.b64decode(data).decode()


def test_curves_leave_out_what_is_not_finite_and_say_where_they_end() -> None:
    nan = float("nan")
    curves = [
        Curve("one", 0, [0, 5, 10], [0.0, 1.0, 2.0]),
        Curve("two", 9, [0, 5, 10], [2.0, nan, 0.0]),
    ]
    one, two = draw([thin(curve) for curve in curves]).axes[0].lines
    assert one.get_xydata().tolist() == [[0, 0], [5, 1], [10, 2]]
    assert two.get_xydata().tolist() == [[0, 2], [10, 0]]
    assert one.get_color() != two.get_color()
    assert one.get_linestyle() != two.get_linestyle()
    made = chart("loss", curves)
    (alt,) = (picture.attrib["alt"] for picture in made.iter("img"))
    assert "two from 2 at step 0 to 0 at step 10" in alt
    assert chart("loss", [Curve("none", 0, [1], [nan])]).find("img") is None


def test_charts_are_svg_whose_colours_follow_the_page() -> None:
    text = svg_of(chart("rate", [Curve("one", 0, [0, 1], [0.00087, 0.00102])]))
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert not any(part.tag.endswith("script") for part in root.iter())
    rules = text[text.index("<style>") : text.index("</style>")]
    assert "@media(prefers-color-scheme:dark)" in rules
    rest = text.replace(rules, "")
    assert not re.findall("#[0-9a-f]{6}|black", rest)
    names = set(re.findall(r"var\((--c\d+)\)", rest))
    assert len(names) == 2 and all(rules.count(f"{name}:") == 2 for name in names)
    labels = [part.text for part in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"step", "0.00095"} <= set(labels)
    assert text == svg_of(chart("rate", [Curve("one", 0, [0, 1], [0.00087, 0.00102])]))


def test_long_curves_are_means_of_neighbours() -> None:
    values = np.random.default_rng(0).random(1200)
    curve = Curve("long", 0, list(range(1200)), values.tolist())
    assert thin(curve).values == pytest.approx(values.reshape(300, 4).mean(axis=1))
    (alt,) = (picture.attrib["alt"] for picture in chart("loss", [curve]).iter("img"))
    first, last = values[:4].mean(), values[-4:].mean()
    assert f"long from {first:.4g} at step 1.5 to {last:.4g} at step 1197.5" in alt


def test_samples_are_image_reference_and_predictions(
    phantom_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = phantom_scratch.get_config()
    workdir = write_run(
        tmp_path / "run", config, **{"data.dir": str(tmp_path / "gone"), "data.max_keypoints": 64}
    )
    dataset = open_dataset(phantom_dataset.parents[1], "phantom")
    worst, middle, best = list(dataset.volumes)[:3]
    write_evaluation(workdir, {worst: 0.1, middle: 0.5, best: 0.9})
    asked: list[Slice] = []

    def predict(_: Any, dataset: Any, records: list[int], *, step: int) -> Any:
        assert step == 4
        slices = [dataset.read(record, with_label=True) for record in records]
        asked.extend(slices)
        return [slices[0].label, np.roll(slices[1].label, 2, axis=1)]

    monkeypatch.setattr(pictures, "predict_slices", predict)
    found = make(tmp_path, [workdir], data_dir=phantom_dataset.parents[1])
    labels = [one.label for one in asked]
    moved = np.roll(labels[1], 2, axis=1)
    masks = [(moved == c, labels[1] == c) for c in range(1, 8) if c in labels[1]]
    dice = np.mean([2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in masks])
    assert 0 < dice < 1
    for volume, one, expected in zip((worst, best), asked, ("1.000", f"{dice:.3f}"), strict=True):
        records = dataset.volumes[volume]
        sizes = [np.sum(dataset.read(r, with_label=True).label != 0) for r in records]
        largest = int(np.argmax(sizes))
        np.testing.assert_array_equal(
            one.label, dataset.read(records[largest], with_label=True).label
        )
        kinds = ("image", "reference", f"prediction of run: Dice {expected}")
        place = f"{volume} slice {largest}"
        sources = [
            a["src"] for kind in kinds for a in found.all("img") if a["alt"] == f"{place}: {kind}"
        ]
        assert len(sources) == 3
        assert sources[0] != sources[1]
        assert (sources[1] == sources[2]) == (volume == worst)


def test_slices_are_predicted_by_the_evaluated_checkpoint(
    phantom_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(phantom_dataset.parents[1], "phantom")
    records = (3, 15)
    slices = [dataset.read(record, with_label=True) for record in records]

    class Fixed:
        def views(self, of: Any, numbers: Any) -> Any:
            assert (of, numbers) == (dataset, records)
            return [s.image for s in slices]

        def probabilities(self, views: Any) -> Any:
            assert all(v is s.image for v, s in zip(views, slices, strict=True))
            return (np.eye(8)[s.label] for s in slices)

    def load(workdir: str, step: int) -> Fixed:
        assert (workdir, step) == ("run", 4)
        return Fixed()

    monkeypatch.setattr(pictures, "load_predictor", load)
    for label, one in zip(predict_slices("run", dataset, records, step=4), slices, strict=True):
        np.testing.assert_array_equal(label, one.label)


def test_page_elements_keep_the_order_of_texts() -> None:
    made = page(element("p", "a", element("b", "c"), "d", "e"), table("x", ["h"], [[None]]))
    assert re.search(r"<p>a<b>c</b>de</p>", made)
    assert '<th scope="row">-</th>' in made


def run_command(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "kafjax.report", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout


def test_command_takes_several_workdirs_and_a_mistake_is_one_line(
    tmp_path: Path, runs: list[Path]
) -> None:
    pre, fine, bare = map(str, runs)
    output = tmp_path / "out.html"
    status, text = run_command("--workdir", pre, fine, bare, "--output", str(output))
    assert status == 0, text
    assert f"{output}: 3 runs" in text
    assert {"pre", "fine", "bare"} <= {row[0] for row in Page(output.read_text()).rows}
    status, text = run_command("--workdir", str(tmp_path))
    assert status == 2
    assert text.splitlines()[-1].startswith(f"error: {tmp_path}: has no config.json")
    assert "Traceback" not in text


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_browser_shows_the_page_without_a_word_in_its_console(
    tmp_path: Path, runs: list[Path]
) -> None:
    make(tmp_path, runs)
    done = subprocess.run(
        [
            *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--v=0"),
            *("--enable-logging=stderr", "--window-size=390,2000", "--virtual-time-budget=1000"),
            *(f"--user-data-dir={tmp_path / 'browser'}", f"--screenshot={tmp_path / 'page.png'}"),
            (tmp_path / "report.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in done.stderr
    assert os.path.getsize(tmp_path / "page.png") > 10_000
