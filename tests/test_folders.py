"""Scores of anyone's predictions: those of a run's own, names of other tools, and bad folders."""

import csv
from pathlib import Path

import numpy as np
import pytest

from data_prep.builder import Options
from data_prep.chd import ChdReader
from data_prep.nnunet import open_nnunet
from data_prep.prepare import prepare_dataset
from kafjax.configs import own_finetune, phantom_finetune
from kafjax.data.dataset import open_dataset
from kafjax.inference.evaluation import evaluate_run
from kafjax.inference.folders import evaluate_folders, match_names
from kafjax.inference.postprocessing import read_rules
from kafjax.inference.prediction import predict_files
from kafjax.tasks.segmentation import Segmentation
from kafjax.training.preflight import complete_config
from kafjax.workdir.scores import read_scores
from kafjax.workdir.workdir import Workdir
from tests.raw_layouts import heart, save, write_nnunet
from tests.runs import write_run

CLASSES = ChdReader.classes[1:]


@pytest.fixture(scope="module")
def run(phantom_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of fresh variables that trains on two of four phantoms and validates on two."""
    config = phantom_finetune.get_config("scratch")
    config.data.update({"dir": str(phantom_dataset.parents[1]), "num_folds": 2})
    config.model.update({"name": "unet", "filters": 4})
    config.postprocess = True
    dataset = open_dataset(config.data.dir, "phantom")
    config = complete_config(config, dataset)
    workdir = tmp_path_factory.mktemp("run")
    variables = Segmentation(config).init()
    write_run(workdir, config, variables, dataset=dataset)
    return workdir


def test_predictions_of_a_run_have_its_scores(run: Path, phantom_raw: Path, tmp_path: Path) -> None:
    ours = evaluate_run(run)
    # Fresh variables predict specks; keeping the largest component is less bad.
    assert ours["postprocessing"]
    assert read_rules(Workdir(run), 0) == ours["postprocessing"]
    for name in ours["by_volume"]:
        predict_files([run], phantom_raw / f"{name}_image.nii.gz", tmp_path)
    theirs = evaluate_folders(tmp_path, phantom_raw, classes=CLASSES)
    assert theirs is not None
    assert theirs["pooled_dice"] == ours["pooled_dice"]
    assert sum(found["volumes"] for found in ours["by_class"].values()) > 7
    for name, classes in ours["by_volume"].items():
        for of_class, found in classes.items():
            other = theirs["by_volume"][f"{name}_image"][of_class]
            assert other == pytest.approx(found, rel=1e-5)
    rows = [list(csv.DictReader((d / "volumes.csv").open())) for d in (run, tmp_path)]
    assert len(rows[0]) == len(rows[1]) == 14
    for row, other in zip(*rows, strict=True):
        for side in ("prediction_mm3", "reference_mm3"):
            assert float(other[side]) == pytest.approx(float(row[side]), rel=1e-5)
    assert sum(float(row["reference_mm3"]) for row in rows[0]) > 1000


def test_the_test_set_is_evaluated_by_itself(tmp_path: Path) -> None:
    raw = write_nnunet(tmp_path / "raw", test=("t1", "t2"))
    (raw / "labelsTs").mkdir()
    save(raw / "labelsTs" / "t1.nii.gz", np.minimum(heart(9)[1], 2).astype(np.uint8))
    prepare_dataset(
        open_nnunet(raw),
        raw,
        tmp_path,
        name="own",
        options=Options(max_keypoints=16),
        num_workers=0,
    )
    config = own_finetune.get_config("scratch")
    config.data.update({"dir": str(tmp_path), "patch_size": (48, 48), "fold": None})
    config.model.update({"name": "unet", "filters": 4})
    dataset = open_dataset(tmp_path, "own")
    complete = complete_config(config, dataset)
    write_run(tmp_path / "run", config, Segmentation(complete).init(), dataset=dataset)
    results = evaluate_run(tmp_path / "run", split="test")
    assert list(results["by_volume"]) == ["t1"]
    assert read_scores(Workdir(tmp_path / "run"), "test") == results
    with pytest.raises(ValueError, match="no labelled validation volume"):
        evaluate_run(tmp_path / "run")


def labels(seed: int, size: tuple[int, int, int] = (6, 5, 4)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 3, size).astype(np.uint8)


def test_names_of_other_tools_match_and_numbers_are_classes(tmp_path: Path) -> None:
    for folder in ("predictions", "labels"):
        (tmp_path / folder).mkdir()
    there = labels(0)
    found = there.copy()
    found[0] = 0
    save(tmp_path / "predictions" / "case_7_0000.nii.gz", 5 * found, (1, 2, 3))
    save(tmp_path / "labels" / "case_7.nii", 5 * there, (1, 2, 3))
    save(tmp_path / "labels" / "case_8.nii", there)
    results = evaluate_folders(tmp_path / "predictions", tmp_path / "labels", output=tmp_path)
    assert results is not None
    assert list(results["by_class"]) == ["class_5", "class_10"]
    for number in (1, 2):
        a, b = found == number, there == number
        expected = 2 * (a & b).sum() / (a.sum() + b.sum())
        assert results["pooled_dice"][f"class_{5 * number}"] == pytest.approx(expected)
    row = next(csv.DictReader((tmp_path / "volumes.csv").open()))
    assert row["volume"] == "case_7_0000"
    assert float(row["prediction_mm3"]) == 6 * (found == 1).sum()
    assert float(row["reference_mm3"]) == 6 * (there == 1).sum()


def test_images_among_the_references_are_not_theirs() -> None:
    references = {s: Path(f"{s}.nii") for s in ("ct_1_image", "ct_1_label", "b", "ct_2_label")}
    pairs, notes = match_names({"ct_1_image": Path("x.nii"), "z": Path("z.nii")}, references)
    assert pairs == {"ct_1_image": Path("ct_1_label.nii"), "z": None}
    assert notes == [
        "z.nii: no reference",
        "2 references without prediction are not scored: b.nii, ct_2_label.nii",
    ]


def test_volumes_need_no_references(tmp_path: Path) -> None:
    save(tmp_path / "a.nii.gz", labels(1), (2, 2, 2))
    assert evaluate_folders(tmp_path) is None
    rows = list(csv.DictReader((tmp_path / "volumes.csv").open()))
    assert [float(row["prediction_mm3"]) for row in rows] == [
        8 * (labels(1) == number).sum() for number in (1, 2)
    ]
    assert [row["reference_mm3"] for row in rows] == ["", ""]


def test_all_faults_come_at_once_and_nothing_is_written(tmp_path: Path) -> None:
    for folder in ("p", "l"):
        (tmp_path / folder).mkdir()
        for name in ("shape", "affine", "float", "same"):
            save(tmp_path / folder / f"{name}.nii", labels(2))
    save(tmp_path / "p" / "shape.nii", labels(2, (6, 5, 3)))
    save(tmp_path / "p" / "affine.nii", labels(2), (1, 1, 1))
    save(tmp_path / "p" / "float.nii", labels(2).astype(np.float32) / 2)
    save(tmp_path / "l" / "same.nii.gz", labels(2))
    with pytest.raises(ValueError, match="shape") as error:
        evaluate_folders(tmp_path / "p", tmp_path / "l")
    text = str(error.value)
    assert len(text.splitlines()) == 4
    for part in (
        "shape.nii: shape (6, 5, 3), but the reference has (6, 5, 4)",
        "affine.nii: its affine differs from the reference's by up to",
        "float.nii: labels that are not whole numbers",
        "same.nii.gz: has the name of same.nii",
    ):
        assert part in text
    assert not (tmp_path / "p" / "volumes.csv").exists()
    others = [_folder_of(tmp_path, name) for name in ("one", "other")]
    with pytest.raises(ValueError, match=r"no file of .* has the name of one of"):
        evaluate_folders(*others)
    with pytest.raises(ValueError, match="is not a folder"):
        evaluate_folders(tmp_path / "p", tmp_path / "nowhere")


def _folder_of(tmp_path: Path, name: str) -> Path:
    (tmp_path / name).mkdir()
    save(tmp_path / name / f"{name}.nii", labels(3))
    return tmp_path / name
