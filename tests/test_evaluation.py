"""Evaluation of whole volumes: every pixel once, tables, and the command on a run of its own."""

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import ml_collections
import numpy as np
import pytest

from data_prep.builder import Options
from data_prep.phantom.subjects import write_subjects
from data_prep.prepare import prepare_dataset
from data_prep.readers import READERS
from kafjax.checkpoint.checkpointer import load_variables, saved_metrics
from kafjax.configs import phantom_finetune, phantom_pretrain
from kafjax.data.dataset import SliceDataset, open_dataset
from kafjax.files import read_checked, write_checked
from kafjax.inference.evaluation import evaluate, evaluate_run
from kafjax.inference.results import format_table, summarize, write_results
from kafjax.segmentation_metrics import ClassMetrics, volume_metrics
from kafjax.tasks.pretraining import Pretraining
from kafjax.training.loop import train
from kafjax.workdir.metrics import read_metrics
from kafjax.workdir.scores import read_scores
from kafjax.workdir.split import read_split
from kafjax.workdir.workdir import Workdir
from tests.runs import write_run

ROOT = Path(__file__).parents[1]
TINY = {"model.name": "unet", "model.filters": 4, "seed": 3}


class Shifted:
    """Predicts each slice's label, moved by a pixel, by the slice's image."""

    context = 0

    def __init__(self, dataset: SliceDataset):
        self._labels = {}
        for record in range(len(dataset.reader)):
            labelled = dataset.read(record, with_label=True)
            assert labelled.label is not None
            self._labels[labelled.image.tobytes()] = np.roll(labelled.label, 1, axis=0)

    def probabilities(self, views: Sequence[Any]) -> Iterator[np.ndarray]:
        for image, _, _ in views:
            yield np.eye(8)[self._labels[image.tobytes()]]


def test_volumes_are_compared_whole_in_mm(phantom_dataset: Path) -> None:
    dataset = open_dataset(phantom_dataset.parents[1], "phantom")
    names = tuple(dataset.volumes)[2:]
    counts, metrics, mm3, seconds = evaluate(Shifted(dataset), dataset, names)
    assert list(seconds) == list(names)
    assert all(found > 0 for found in seconds.values())
    both = np.zeros(8)
    for name in names:
        slices = [dataset.read(record, with_label=True) for record in dataset.volumes[name]]
        label = np.stack([s.label for s in slices])
        prediction = np.roll(label, 1, axis=1)
        row, col, between = slices[0].spacing
        expected = volume_metrics(prediction, label, num_classes=8, spacing=(between, row, col))
        assert list(metrics[name]) == list(dataset.classes[1:])
        sizes = [(prediction == i).sum() * row * col * between for i in range(1, 8)]
        assert [found for found, _ in mm3[name].values()] == pytest.approx(sizes)
        for found, wanted in zip(metrics[name].values(), expected, strict=True):
            assert found == pytest.approx(wanted, nan_ok=True)
        both += [np.sum((prediction == i) & (label == i)) for i in range(8)]
    np.testing.assert_array_equal(counts[:, 0], both)
    assert counts[:, 1].sum() == counts[:, 2].sum() == 2 * 12 * 64 * 64


NAN = float("nan")
METRICS = {
    "ct_1": {
        "heart": ClassMetrics(0.5, 4.0, 2.0, empty=False, missed=False),
        "lung": ClassMetrics(NAN, NAN, NAN, empty=True, missed=False),
    },
    "ct_2": {
        "heart": ClassMetrics(0.0, 8.0, 8.0, empty=False, missed=True),
        "lung": ClassMetrics(NAN, NAN, NAN, empty=True, missed=False),
    },
}
COUNTS = np.array([[90, 95, 95], [3, 5, 7], [0, 0, 0]])


def test_summary_leaves_out_and_counts_what_is_empty_or_missed() -> None:
    results = summarize(COUNTS, METRICS, ("heart", "lung"))
    assert results["pooled_dice"] == {"mean": 0.5, "heart": 0.5, "lung": None}
    assert results["chance"] == 7 / 102  # lungs are in no label
    heart = results["by_class"]["heart"]
    assert (heart["volumes"], heart["empty"], heart["missed"]) == (2, 0, 1)
    assert heart["hd95"] == {"mean": 6.0, "std": 2.0}
    lung = results["by_class"]["lung"]
    assert (lung["volumes"], lung["empty"], lung["missed"]) == (0, 2, 0)
    assert lung["dice"] == {"mean": None, "std": None}


def test_results_are_written_as_json_and_csv_and_a_table(tmp_path: Path) -> None:
    results = summarize(COUNTS, METRICS, ("heart", "lung"))
    write_results(results, tmp_path / "evaluation")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evaluation.csv", "evaluation.json"]
    assert read_checked(tmp_path / "evaluation.json") == results
    rows = list(csv.DictReader((tmp_path / "evaluation.csv").open()))
    assert [(row["volume"], row["class"], row["dice"]) for row in rows] == [
        ("pooled", "mean", "0.5"),
        ("pooled", "heart", "0.5"),
        ("pooled", "lung", ""),
        ("ct_1", "heart", "0.5"),
        ("ct_1", "lung", ""),
        ("ct_2", "heart", "0.0"),
        ("ct_2", "lung", ""),
    ]
    assert (rows[5]["hd95"], rows[5]["missed"], rows[6]["empty"]) == ("8.0", "1", "1")
    header, *lines = format_table(results).splitlines()
    assert len(header) == len(lines[0]) == len(lines[1])
    lines = [" ".join(line.split()) for line in lines]
    assert lines == [
        "heart 0.5000 0.250 ± 0.250 6.0 ± 2.0 5.00 ± 3.00 2 0 1",
        "lung - - ± - - ± - - ± - 0 2 0",
        "mean 0.5000",
        "chance 0.0686",
    ]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir as a pretraining run or an import leaves it."""
    workdir = tmp_path_factory.mktemp("pretrained")
    config = phantom_pretrain.get_config()
    config.update_from_flattened_dict({**TINY, "seed": 1})
    write_run(workdir, config, Pretraining(config).init())
    return workdir


def finetune_config(dataset: Path, pretrained: Path, **overrides: Any) -> ml_collections.ConfigDict:
    """One labelled volume, 3 steps an epoch, validated at each epoch's end."""
    config = phantom_finetune.get_config()
    config.update_from_flattened_dict(
        {
            **TINY,
            "init_from": str(pretrained),
            "batch_size": 4,
            "data.dir": str(dataset.parents[1]),
            "data.num_folds": 2,
            "data.num_labeled": 1,
            "every.log": 1,
            "every.validation_epochs": 1,
            "every.picture": 0,
            "checkpoint.keep_newest": 2,
            "num_steps": 6,
            **overrides,
        }
    )
    return config


@pytest.fixture(scope="module")
def finetuned(
    phantom_dataset: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    workdir = tmp_path_factory.mktemp("finetuned")
    assert train(finetune_config(phantom_dataset, pretrained), workdir) is None
    return workdir


def without_time(workdir: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "time"} for row in read_metrics(workdir)]


def test_finetuning_resumes_bit_for_bit(
    phantom_dataset: Path,
    pretrained: Path,
    finetuned: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for num_steps in (3, 6):
        train(finetune_config(phantom_dataset, pretrained, num_steps=num_steps), tmp_path)
    output = capsys.readouterr().out
    assert output.count(f"Starting from {pretrained}:") == 1
    assert "loaded:        encoder (" in output
    assert "starts fresh:  decoder (" in output
    assert f"Resuming {tmp_path} from step 3." in output
    assert without_time(tmp_path) == without_time(finetuned)
    validated = [row["step"] for row in read_metrics(tmp_path) if "validation_dice" in row]
    assert validated == [3, 6]
    expected, found = (
        flax.traverse_util.flatten_dict(load_variables(w, step=6), sep="/")
        for w in (finetuned, tmp_path)
    )
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert value.tobytes() == found[name].tobytes(), name


def test_evaluation_is_the_same_for_any_batches_and_agrees_with_validation(finetuned: Path) -> None:
    found = [evaluate_run(finetuned, batch_size=size) for size in (1, 7)]
    stored = read_checked(finetuned / "evaluation.json")
    assert stored == found[1]
    assert stored["step"] == Workdir(finetuned).best_step()
    assert len(stored["by_volume"]) == 2
    assert stored["seconds"].keys() == stored["by_volume"].keys()
    assert stored["environment"]["jax"] == jax.__version__
    assert found[0]["pooled_dice"] == pytest.approx(found[1]["pooled_dice"], abs=1e-4)
    # Slices fill the patch, so that validation sees what evaluation sees.
    score = saved_metrics(finetuned)[stored["step"]]["validation_dice"]
    assert stored["pooled_dice"]["mean"] == pytest.approx(score, abs=1e-5)


def test_scores_of_another_checkpoint_never_take_the_place_of_the_selected_ones(
    finetuned: Path,
) -> None:
    workdir = Workdir(finetuned)
    evaluate_run(finetuned, batch_size=1)
    selected = read_scores(workdir)
    assert selected is not None
    assert selected["checkpoint"] == "best on the validation volumes"
    (other,) = set(saved_metrics(finetuned)) - {selected["step"]}
    found = evaluate_run(finetuned, step=other, batch_size=1)
    assert (found["step"], found["checkpoint"]) == (other, f"step {other}")
    assert read_scores(workdir) == selected
    assert read_checked(workdir.scores_file("validation", other)) == found
    again = evaluate_run(finetuned, step=selected["step"], batch_size=1)
    assert again["checkpoint"] == "best on the validation volumes"


def test_scores_of_another_run_or_split_are_refused(finetuned: Path, tmp_path: Path) -> None:
    evaluate_run(finetuned, batch_size=1)
    workdir = Workdir(shutil.copytree(finetuned, tmp_path / "copy"))
    assert read_scores(workdir) is not None
    fields = read_checked(workdir.scores_file("validation"))
    write_checked(workdir.scores_file("train"), fields)
    with pytest.raises(ValueError, match=r"another run.*\n  side: 'validation' there"):
        read_scores(workdir, "train")
    changed = {**fields, "run": {**fields["run"], "fold": 4, "seed": 9}}
    write_checked(workdir.scores_file("validation"), changed)
    with pytest.raises(ValueError, match=r"(?s)fold: 4 there, 0 here.*seed: 9 there"):
        read_scores(workdir)
    # A run that was trained further has not been evaluated.
    write_checked(workdir.scores_file("validation"), {**fields, "step": 1})
    assert read_scores(workdir) is None


def test_a_run_keeps_its_split_when_volumes_come_and_is_refused_others(
    finetuned: Path,
    phantom_raw: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = evaluate_run(finetuned, batch_size=1)
    raw = Path(shutil.copytree(phantom_raw, tmp_path / "raw"))
    write_subjects(tmp_path / "more", 2, size=(64, 64, 12), seed=5)
    for kind in ("image", "label"):
        shutil.copy(tmp_path / "more" / f"ct_1001_{kind}.nii.gz", raw / f"ct_1999_{kind}.nii.gz")
    prepare(raw, tmp_path / "grown")
    capsys.readouterr()
    after = evaluate_run(finetuned, data_dir=tmp_path / "grown", batch_size=1)
    assert after["by_volume"] == before["by_volume"]
    assert (
        "volumes added after the run started, which are not part of it: ct_1999"
        in capsys.readouterr().out
    )

    split = read_split(Workdir(finetuned))
    assert split is not None
    validated, trained = next(iter(split.validation)), next(iter(split.train))
    for kind in ("image", "label"):
        shutil.copy(
            tmp_path / "more" / f"ct_1002_{kind}.nii.gz", raw / f"{validated}_{kind}.nii.gz"
        )
        (raw / f"{trained}_{kind}.nii.gz").unlink()
    prepare(raw, tmp_path / "changed")
    with pytest.raises(ValueError, match="is not the dataset that the run") as error:
        evaluate_run(finetuned, data_dir=tmp_path / "changed", batch_size=1)
    assert str(error.value).splitlines()[1:] == [
        f"  {trained} (train): missing",
        f"  {validated} (validation): other content",
    ]


def test_a_run_of_version_0_1_records_its_split_when_asked(finetuned: Path, tmp_path: Path) -> None:
    workdir = Workdir(shutil.copytree(finetuned, tmp_path / "old"))
    workdir.split_file.unlink()
    with pytest.raises(ValueError, match="record its split with kafjax evaluate --record_split"):
        evaluate_run(workdir, batch_size=1)
    found = evaluate_run(workdir, batch_size=1, record_split=True)
    assert found["by_volume"] == evaluate_run(finetuned, batch_size=1)["by_volume"]
    assert read_split(workdir) == read_split(Workdir(finetuned))


def prepare(raw: Path, data_dir: Path) -> None:
    """Prepares a folder of phantoms as `phantom_dataset` is."""
    options = Options(max_keypoints=64)
    reader = READERS["chd"]
    prepare_dataset(reader, raw, data_dir, name="phantom", options=options, num_workers=0)


def run_command(module: str, *arguments: str, devices: int = 1) -> tuple[int, str]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    return done.returncode, done.stdout


def test_command_evaluates_training_volumes_on_two_devices(finetuned: Path) -> None:
    status, output = run_command(
        "kafjax.evaluate", "--workdir", str(finetuned), "--split", "train", devices=2
    )
    assert status == 0, output
    expected = evaluate_run(finetuned, split="train", batch_size=1)
    assert "fold 0, train: 1 volumes" in output
    assert f"mean              {expected['pooled_dice']['mean']:11.4f}" in output


def test_mistakes_are_one_clear_line_and_status_2(pretrained: Path) -> None:
    status, output = run_command("kafjax.evaluate", "--workdir", str(pretrained))
    assert status == 2
    assert f"error: {pretrained}: a run of task 'pretrain'; expected 'segment'" in output
    assert "Traceback" not in output
    status, output = run_command("kafjax.evaluate", "--workdir", "x", "--split", "test")
    assert status == 2
    assert "Traceback" not in output
