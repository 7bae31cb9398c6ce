"""Labels of a part of the voxels: raw files to batches, losses and scores, none counts the rest."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from data_prep.builder import Options
from data_prep.check import as_text, fingerprint, survey_dataset
from data_prep.faults import DatasetError
from data_prep.folder import OwnReader, open_folder
from data_prep.main import main
from data_prep.nnunet import open_nnunet
from data_prep.prepare import prepare_dataset
from data_prep.volumes import Reader
from kafjax.configs import own_finetune
from kafjax.data.batches import BatchOptions, segmentation_batches, steps_per_epoch
from kafjax.data.dataset import SliceDataset, open_dataset, records_of
from kafjax.data.samples import make_labelled
from kafjax.inference.evaluation import evaluate
from kafjax.inference.folders import evaluate_folders
from kafjax.inference.postprocessing import LARGEST, Example, choose_rules
from kafjax.inference.volumes import count_mm3
from kafjax.losses import cross_entropy, dice_loss
from kafjax.segmentation_metrics import count_pixels, volume_metrics
from kafjax.tasks.registry import make_task
from kafjax.training.preflight import complete_config
from tests.raw_layouts import heart, save, write_nnunet

_WITH_IGNORE = {"background": 0, "ventricles": 1, "myocardium": 2, "ignore": 3}
_TO_CLASSES = np.array([0, 1, 1, 0, 0, 2, 0, 0], np.uint8)


def scribble(number: int) -> np.ndarray:
    """Every seventh voxel of slices 1 to 3 with its class, [x, y, z]; 3 elsewhere."""
    classes = _TO_CLASSES[heart(number)[1]]
    known = np.arange(classes.size).reshape(classes.shape) % 7 == 0
    known[:, :, [0, 4, 5]] = False
    return np.where(known, classes, 3).astype(np.uint8)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nnU-Net's layout: two volumes with scribbles and one without labels."""
    folder = tmp_path_factory.mktemp("raw")
    write_nnunet(folder, unlabelled=("case_003",), labels=_WITH_IGNORE)
    for number in (0, 1):
        save(folder / "labelsTr" / f"case_{number + 1:03d}.nii.gz", scribble(number))
    return folder


def prepare(reader: Reader, raw_dir: Path, data_dir: Path) -> SliceDataset:
    options = Options(max_keypoints=16)
    prepare_dataset(reader, raw_dir, data_dir, name="own", options=options, num_workers=0)
    return open_dataset(data_dir, "own")


@pytest.fixture(scope="module")
def dataset(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> SliceDataset:
    return prepare(open_nnunet(raw), raw, tmp_path_factory.mktemp("data"))


def test_slices_keep_what_is_annotated_and_ignore_the_rest(dataset: SliceDataset) -> None:
    assert dataset.classes == ("background", "ventricles", "myocardium")
    read = dataset.read_volume("case_001")
    label = np.stack([one.label for one in read], axis=-1)  # type: ignore[arg-type]
    found, count = np.unique(label, return_counts=True)
    expected = dict(zip(*np.unique(scribble(0), return_counts=True), strict=True))
    expected[-1] = expected.pop(3)
    assert dict(zip(found.tolist(), count.tolist(), strict=True)) == expected
    records = dataset.volumes["case_001"]
    assert records_of(dataset, ["case_001"], annotated=True) == list(records[1:4])
    assert records_of(dataset, ["case_001"], annotated=False) == [records[i] for i in (0, 4, 5)]
    assert records_of(dataset, ["case_001"]) == list(records)
    assert dataset.metadata["ignore_label"] == 3


def test_batches_hold_annotated_slices_and_ignore_the_padding(dataset: SliceDataset) -> None:
    volumes = ["case_001", "case_002"]
    assert steps_per_epoch(dataset, 3, volumes) == 4
    assert steps_per_epoch(dataset, 3, volumes, labelled=True) == 2
    options = BatchOptions(
        batch_size=3, patch_size=(48, 48), seed=0, num_threads=1, foreground_share=0.3
    )
    batches = segmentation_batches(dataset, options, volumes=volumes)
    taken = [next(batches) for _ in range(4)]
    batches.close()
    records = np.concatenate([batch["record"] for batch in taken])
    assert {*records.tolist()} <= {*records_of(dataset, volumes, annotated=True)}
    for batch in taken:
        assert (batch["label"][-1] > 0).any()
        assert (batch["label"] >= 0).any((1, 2)).all()
    record = records_of(dataset, ["case_001"], annotated=True)[0]
    sample = make_labelled(dataset, 0, record, patch_size=(48, 48), seed=None)
    label = dataset.read(record, with_label=True).label
    assert label is not None
    assert (sample["label"] >= 0).sum() == (label >= 0).sum()  # 36 x 40 pixels, and padding


def test_a_volume_that_annotates_nothing_is_one_line(raw: Path, tmp_path: Path) -> None:
    nothing = np.full_like(scribble(0), 3)
    folder = write_nnunet(tmp_path, labels=_WITH_IGNORE)
    save(folder / "labelsTr" / "case_002.nii.gz", nothing)
    reader = open_nnunet(folder)
    _, second = reader.find(folder)[0]
    with pytest.raises(DatasetError, match=r"case_002\.nii\.gz: annotates no voxel") as error:
        reader.read(second)
    assert len(str(error.value).splitlines()) == 1


def test_the_check_counts_annotated_slices_and_voxels(raw: Path, tmp_path: Path) -> None:
    survey, faults = survey_dataset(open_nnunet(raw), raw, num_workers=0)
    assert faults == []
    known = sum(int((scribble(i) < 3).sum()) for i in (0, 1))
    found = fingerprint(survey)
    voxels = 2 * 40 * 36 * 6
    assert found["annotated"] == {
        "slices": 6,
        "of_slices": 12,
        "voxels": known,
        "of_voxels": voxels,
    }
    assert sum(of["voxels"] for of in found["classes"]) == known
    assert f"Annotated: 6 of 12 slices and {known / voxels:.2%} of the voxels" in as_text(survey)
    arguments = ["--dataset", "nnunet", "--raw_dir", str(raw), "--num_workers", "0", "--check"]
    assert main([*arguments, "--json", str(tmp_path / "found.json")]) == 0
    assert json.loads((tmp_path / "found.json").read_text())["fingerprint"]["annotated"]


def test_folders_say_it_by_a_number_or_by_blank_slices(tmp_path: Path) -> None:
    scans, labels = tmp_path / "scans", tmp_path / "labels"
    scans.mkdir()
    labels.mkdir()
    save(scans / "anna.nii.gz", heart(0)[0])
    save(labels / "anna.nii.gz", scribble(0))
    reader = open_folder(scans, labels, ignore_label=3)
    assert reader.classes == ("background", "class_1", "class_2")
    (source,) = reader.find(scans)[0]
    label = reader.read(source).label
    assert label is not None
    assert (label < 255).sum() == (scribble(0) < 3).sum()
    some = np.where(scribble(0) == 3, 0, scribble(0)).astype(np.uint8)
    save(labels / "anna.nii.gz", some)
    for blank in (False, True):
        reader = open_folder(scans, labels, blank_slices_unannotated=blank)
        label = reader.read(source).label
        assert label is not None
        unknown = (label == 255).all((0, 1))
        assert unknown.tolist() == (
            [not some[:, :, i].any() for i in range(6)] if blank else 6 * [0]
        )
        assert ((label == 255).sum() == 0) == (not blank)
    with pytest.raises(ValueError, match="ignore_label is 0; expected 1 or more"):
        open_folder(scans, labels, ignore_label=0)
    assert not OwnReader.sparse.fget(open_folder(scans, labels))  # type: ignore[attr-defined]


def sparse_labels(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits of four classes, and labels half of them -1."""
    rng = np.random.default_rng(seed)
    label = np.where(rng.random((3, 8, 9)) < 0.5, -1, rng.integers(0, 3, (3, 8, 9)))
    return rng.standard_normal((3, 8, 9, 4)).astype(np.float32), label.astype(np.int32)


@pytest.mark.parametrize("weights", [None, (0.5, 2.0, 1.0, 3.0)])
def test_losses_do_not_depend_on_what_is_ignored(weights: tuple[float, ...] | None) -> None:
    logits, label = sparse_labels()
    known = label >= 0
    x, y = logits[known].astype(np.float64), label[known]
    of_pixel = -log_softmax(x, axis=-1)[np.arange(len(y)), y]
    expected = np.average(of_pixel, weights=None if weights is None else np.array(weights)[y])
    options: Any = {"class_weights": weights, "ignoring": True}
    np.testing.assert_allclose(cross_entropy(logits, label, **options), expected, rtol=1e-6)
    p, t = softmax(x, axis=-1)[:, 1:], np.eye(4)[y][:, 1:]
    dice = (2 * (p * t).sum(0) + 2) / (p.sum(0) + t.sum(0) + 2)
    expected = np.average(1 - dice, weights=None if weights is None else weights[1:])
    np.testing.assert_allclose(dice_loss(logits, label, **options), expected, rtol=1e-6)
    for loss in (cross_entropy, dice_loss):
        gradient = jax.grad(lambda z, loss=loss: loss(z, label, **options))(logits)
        assert not np.asarray(gradient)[~known].any()
        assert np.asarray(gradient)[known].all()


def test_losses_of_labels_without_any_annotation_are_finite() -> None:
    logits, label = sparse_labels()
    nothing = np.full_like(label, -1)
    assert cross_entropy(logits, nothing, ignoring=True) == 0
    assert dice_loss(logits, nothing, ignoring=True) == 0


def test_the_task_trains_on_annotated_pixels_and_moves_them_with_the_slice(
    dataset: SliceDataset,
) -> None:
    config = own_finetune.get_config("scratch")
    config.data.update({"dir": str(dataset.directory.parents[1]), "patch_size": (32, 32)})
    config.model.update({"name": "unet", "filters": 4})
    config.augment.intensity.probability = 0.0
    complete = complete_config(config, dataset)
    assert complete.data.sparse_labels
    task = make_task(complete)
    records = records_of(dataset, ["case_001"], annotated=True)
    samples = [make_labelled(dataset, i, r, seed=0, **task.patch) for i, r in enumerate(records)]
    batch = {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}
    batch["image"] = np.ones_like(batch["image"])
    seen = jax.tree.map(np.asarray, jax.jit(task.augment)(batch))
    outside = seen["image"][..., 0] == 0
    assert outside.any()
    assert (seen["label"][outside] == -1).all()
    assert 0 < (seen["label"] >= 0).sum() < 2 * (batch["label"] >= 0).sum()


def test_counts_and_metrics_leave_out_what_is_not_annotated() -> None:
    rng = np.random.default_rng(0)
    prediction, label = rng.integers(0, 3, (6, 7, 8)), rng.integers(-1, 3, (6, 7, 8))
    known = label >= 0
    counts = np.asarray(count_pixels(prediction, label, 3))
    for i in range(3):
        both = prediction[known] == i, label[known] == i
        expected = [(both[0] & both[1]).sum(), *(x.sum() for x in both)]
        assert counts[i].tolist() == expected
    metrics = volume_metrics(prediction, label, num_classes=3, spacing=(1, 1, 1))
    for i, found in enumerate(metrics, start=1):
        assert found.dice == pytest.approx(2 * counts[i, 0] / counts[i, 1:].sum())
        assert np.isnan([found.hd95, found.assd]).all()
    mm3 = count_mm3(prediction, label, ("a", "b"), (1, 2, 3))
    assert mm3["a"] == (6.0 * (prediction == 1).sum(), None)


def test_rules_are_chosen_by_annotated_voxels() -> None:
    label = np.zeros((12, 12, 6), np.int16)
    label[1:4, 1:4, 1:4] = 1
    prediction = label.astype(np.uint8)
    prediction[10, 10] = 1  # a speck that the largest component leaves out
    full = Example(prediction, label, 1.0)
    hidden = label.copy()
    hidden[8:, 8:] = -1
    sparse = Example(prediction, hidden, 1.0)
    assert choose_rules([(full.label, 1.0)], [full], ("heart",)) == {"heart": LARGEST}
    assert choose_rules([(sparse.label, 1.0)], [sparse], ("heart",)) == {}


def test_a_run_is_scored_on_annotated_pixels(dataset: SliceDataset) -> None:
    class Sure:
        """Predicts class 1 everywhere."""

        context = 0

        def probabilities(self, views: Any) -> Any:
            return [np.eye(3, dtype=np.float32)[np.ones(v[0].shape[:2], int)] for v in views]

    found = evaluate(Sure(), dataset, ("case_001",))  # type: ignore[arg-type]
    label = scribble(0)
    counts = [[0, 0, (label == 0).sum()], 2 * [(label == 1).sum()], [0, 0, (label == 2).sum()]]
    counts[1].insert(1, (label < 3).sum())
    np.testing.assert_array_equal(found.counts, counts)


def test_predictions_are_scored_on_annotated_voxels(tmp_path: Path) -> None:
    for name in ("predictions", "labels"):
        (tmp_path / name).mkdir()
    rng = np.random.default_rng(0)
    prediction, label = (rng.integers(0, n, (6, 5, 4)).astype(np.uint8) for n in (3, 4))
    save(tmp_path / "predictions" / "a.nii.gz", prediction)
    save(tmp_path / "labels" / "a.nii.gz", label)
    results = evaluate_folders(tmp_path / "predictions", tmp_path / "labels", ignore_label=3)
    assert results is not None
    assert list(results["by_class"]) == ["class_1", "class_2"]
    known = label < 3
    for i in (1, 2):
        a, b = prediction[known] == i, label[known] == i
        expected = 2 * (a & b).sum() / (a.sum() + b.sum())
        assert results["pooled_dice"][f"class_{i}"] == pytest.approx(expected)
        assert results["by_volume"]["a"][f"class_{i}"]["hd95"] is None
