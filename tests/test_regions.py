"""nnU-Net's regions: unions of labels that may overlap, from `dataset.json` to written labels."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.export
import nibabel as nib
import numpy as np
import pytest

from data_prep.builder import Options
from data_prep.nnunet import open_nnunet
from data_prep.prepare import prepare_dataset
from data_prep.readers import reader_of
from kafjax import losses
from kafjax.configs import own_finetune, own_pretrain
from kafjax.data.dataset import SliceDataset, check_facts, facts_of_run, open_dataset
from kafjax.errors import UserError
from kafjax.inference.evaluation import evaluate_run
from kafjax.inference.exported import export
from kafjax.inference.folders import evaluate_folders
from kafjax.inference.prediction import load_volume_predictor, predict_files, predict_volume
from kafjax.regions import Region, members, most_probable, regions_of, structures_of, write_labels
from kafjax.segmentation_metrics import count_pixels, volume_metrics
from kafjax.training.loop import train
from kafjax.training.preflight import complete_config, open_run_dataset
from tests.raw_layouts import write_nnunet

GROUPS = ((1, 2, 3), (2, 3), (3,))
TUMOUR = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}
HEART = {"background": 0, "heart": [1, 2], "myocardium": 2}


def describe(folder: Path, **changes: Any) -> None:
    path = folder / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_written_labels_follow_the_order() -> None:
    inside = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 0, 1]], bool)
    np.testing.assert_array_equal(write_labels(inside, (1, 2, 3)), [0, 1, 2, 3, 3])
    np.testing.assert_array_equal(write_labels(inside, (3, 2, 1)), [0, 3, 2, 1, 1])
    np.testing.assert_array_equal(
        jax.jit(lambda x: write_labels(x, (1, 2, 3)))(inside), [0, 1, 2, 3, 3]
    )


def test_labels_are_members_of_regions_and_come_back() -> None:
    label = np.array([[0, 1, 2], [3, -1, 0]])
    inside = np.asarray(members(label, GROUPS))
    for r, group in enumerate(GROUPS):
        np.testing.assert_array_equal(inside[..., r], np.isin(label, group))
    np.testing.assert_array_equal(write_labels(inside, (1, 2, 3)), np.maximum(label, 0))
    facts = {"regions": [["whole", [1, 2, 3], 1], ["core", [2, 3], 2]], "classes": ["b", *"123"]}
    np.testing.assert_array_equal(
        most_probable(np.array([[0.6, 0.4], [0.6, 0.7], [0.4, 0.4]]), facts), [1, 2, 0]
    )
    names, groups = structures_of(facts)
    assert names == ("whole", "core", "1", "2", "3")
    assert groups == [(1, 2, 3), (2, 3), (1,), (2,), (3,)]


@pytest.mark.parametrize("ignoring", [False, True])
def test_losses_are_those_of_each_region_by_itself(ignoring: bool) -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, 5, 6, 3)).astype(np.float32)
    label = rng.integers(-1 if ignoring else 0, 4, (2, 5, 6))
    inside, known = np.asarray(members(label, GROUPS)), label >= 0
    found = [
        jax.jit(loss, static_argnames="ignoring")(logits, inside, known, ignoring=ignoring)
        for loss in (losses.region_cross_entropy, losses.region_dice_loss)
    ]
    entropies, dices = [], []
    for r in range(3):
        own, there = logits[..., r][known], inside[..., r][known]
        p = 1 / (1 + np.exp(-own))
        entropies.append(-np.mean(np.where(there, np.log(p), np.log(1 - p))))
        dices.append(1 - (2 * p[there].sum() + 2) / (p.sum() + there.sum() + 2))
    np.testing.assert_allclose(found, [np.mean(entropies), np.mean(dices)], rtol=1e-5)


def test_regions_are_counted_and_measured_like_classes() -> None:
    rng = np.random.default_rng(0)
    prediction, label = rng.integers(0, 4, (6, 7, 8)), rng.integers(-1, 4, (6, 7, 8))
    counts = np.asarray(count_pixels(prediction, label, 4, groups=GROUPS))
    known = label >= 0
    for row, group in zip(counts[1:], GROUPS, strict=True):
        a, b = np.isin(prediction, group)[known], np.isin(label, group)[known]
        assert row.tolist() == [(a & b).sum(), a.sum(), b.sum()]
    label = np.maximum(label, 0)
    whole = volume_metrics(prediction, label, num_classes=4, spacing=(1, 2, 3), groups=GROUPS)
    alone = volume_metrics(
        (prediction > 1).astype(int), (label > 1).astype(int), num_classes=2, spacing=(1, 2, 3)
    )
    assert whole[1] == alone[0]


def test_dataset_json_gives_regions_and_their_order(tmp_path: Path) -> None:
    write_nnunet(tmp_path, labels={**TUMOUR, "ignore": 4}, regions_class_order=[1, 2, 3])
    reader = open_nnunet(tmp_path)
    assert reader.faults == ()
    assert reader.classes == ("background", "label_1", "label_2", "label_3")
    assert reader.ignore_label == 4
    assert reader.regions == (
        Region("whole", (1, 2, 3), 1),
        Region("core", (2, 3), 2),
        Region("enhancing", (3,), 3),
    )
    facts = json.loads(json.dumps({**reader.facts, "classes": reader.classes, "radius": 9}))
    assert regions_of(facts) == reader.regions
    assert reader_of({**facts, "kind": "nnunet"}).classes == reader.classes


@pytest.mark.parametrize(
    ("labels", "order", "expected"),
    [
        (TUMOUR, None, "has no regions_class_order; expected a label of each of the 3 regions"),
        (TUMOUR, [1, 2], "regions_class_order is [1, 2]"),
        (TUMOUR, [1, 2, 2], "regions_class_order is [1, 2, 2]"),
        (TUMOUR, [1, 2, 4], "regions_class_order is [1, 2, 4]"),
        ({**TUMOUR, "core": [2, 0]}, [1, 2, 3], "a region has the background or the ignore label"),
        ({**TUMOUR, "core": [2, "x"]}, [1, 2, 3], "labels is {"),
        ({**TUMOUR, "core": []}, [1, 2, 3], "labels is {"),
        ({**TUMOUR, "core": [2, 5]}, [1, 2, 3], "labels are numbered 0, 1, 2, 3, 5"),
        ({**TUMOUR, "label_2": [2]}, [1, 2, 3, 2], "a region is named 'label_2'"),
        ({**TUMOUR, "background": [0]}, [1, 2, 3], 'has regions; expected "background": 0'),
        ({**TUMOUR, "ignore": 3}, [1, 2, 3], "a region has the background or the ignore label"),
    ],
)
def test_wrong_regions_are_one_line(tmp_path: Path, labels: Any, order: Any, expected: str) -> None:
    write_nnunet(tmp_path, labels=labels, regions_class_order=order)
    (fault,) = open_nnunet(tmp_path).faults
    assert expected in str(fault)
    assert fault.stops


def test_labels_that_do_not_come_back_are_noted(tmp_path: Path) -> None:
    write_nnunet(tmp_path, labels=TUMOUR, regions_class_order=[3, 2, 1])
    found = [(fault.found, fault.stops) for fault in open_nnunet(tmp_path).faults]
    assert found == [
        ("its regions write label 1 as 3", False),
        ("its regions write label 3 as 1", False),
    ]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cases of two channels, whose regions are a heart and its myocardium."""
    return write_nnunet(
        tmp_path_factory.mktemp("raw"),
        channels=("CT", "T2"),
        labels=HEART,
        regions_class_order=[1, 2],
    )


@pytest.fixture(scope="module")
def dataset(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> SliceDataset:
    data_dir, options = tmp_path_factory.mktemp("data"), Options(max_keypoints=16)
    prepare_dataset(open_nnunet(raw), raw, data_dir, name="own", options=options, num_workers=0)
    return open_dataset(data_dir, "own")


def run_config(dataset: SliceDataset, variant: str = "scratch") -> Any:
    config = own_finetune.get_config(variant)
    config.update({"batch_size": 4, "num_epochs": 2, "num_steps": 1})
    config.data.update({"dir": str(dataset.directory.parents[1]), "patch_size": (48, 48)})
    config.data.update({"context": 1, "validation": ("case_002",)})
    config.model.update({"name": "unet", "filters": 4})
    return config


def test_a_run_of_two_channels_and_regions(
    dataset: SliceDataset, raw: Path, tmp_path: Path
) -> None:
    """Trains, scores its regions, and writes raw files' labels in the order of the regions."""
    run = tmp_path / "run"
    assert train(run_config(dataset), run) is None
    results = evaluate_run(run)
    predict_files([run], raw / "imagesTr", tmp_path / "out", probabilities=True)
    scan, label, found, kept = (
        np.asanyarray(nib.load(path).dataobj)  # type: ignore[attr-defined]
        for path in (
            raw / "imagesTr" / "case_002_0000.nii.gz",
            raw / "labelsTr" / "case_002.nii.gz",
            tmp_path / "out" / "case_002.nii.gz",
            tmp_path / "out" / "case_002_probabilities.nii.gz",
        )
    )
    assert kept.shape == (*scan.shape, 2)
    expected = np.where(kept[..., 1] > 0.5, 2, np.where(kept[..., 0] > 0.5, 1, 0))
    np.testing.assert_array_equal(found, expected)
    assert found.any()
    dice = {
        name: 2 * (a & b).sum() / (a.sum() + b.sum())
        for name, numbers in (("heart", (1, 2)), ("myocardium", 2), ("label_1", 1), ("label_2", 2))
        for a, b in [(np.isin(found, numbers), np.isin(label, numbers))]
    }
    dice["mean"] = (dice["heart"] + dice["myocardium"]) / 2
    assert results["pooled_dice"] == pytest.approx(dice)
    heart = (label > 0).mean(), (label == 2).mean()
    assert results["chance"] == pytest.approx(np.mean(heart))
    others = evaluate_folders(tmp_path / "out", raw / "labelsTr", dataset_json=raw / "dataset.json")
    assert others is not None
    for name, scores in others["by_volume"]["case_002"].items():
        assert scores == pytest.approx(results["by_volume"]["case_002"][name])
    assert list(others["by_class"]) == ["heart", "myocardium", "label_1", "label_2"]
    # The same array, in Python: channels are the last axis.
    other = np.asanyarray(nib.load(raw / "imagesTr" / "case_002_0001.nii.gz").dataobj)  # type: ignore[attr-defined]
    array = np.stack([scan, other], axis=-1).swapaxes(0, 1)
    predictor = load_volume_predictor([run])
    again = predict_volume(array, (1.7, 1.5, 10.0), predictor, volume_id="case_002")
    np.testing.assert_array_equal(again, found.swapaxes(0, 1))
    with pytest.raises(UserError, match=r"\[row, col, slice, channel\] of 2 channels"):
        predict_volume(array[..., 0], (1.7, 1.5, 10.0), predictor)
    with pytest.raises(UserError, match=r"uncertainty .* the regions heart, myocardium"):
        predict_files([run], raw / "imagesTr", tmp_path / "out", uncertainty=True)

    export([run], tmp_path / "net.stablehlo")
    facts = json.loads((tmp_path / "net.json").read_text())
    assert facts["inputs"][0]["shape"] == ["b", 48, 48, 2 * 3]
    assert facts["output"]["shape"] == ["b", 48, 48, 2]
    assert [region["name"] for region in facts["regions"]] == ["heart", "myocardium"]
    assert facts["context"] == 1
    program = jax.export.deserialize(bytearray((tmp_path / "net.stablehlo").read_bytes()))
    image = np.random.default_rng(0).standard_normal((1, 48, 48, 6)).astype(np.float32)
    nowhere = (np.zeros((1, 16, 2), np.int32), np.zeros((1, 16), bool))
    (expected,) = predictor.predictors[0].probabilities([(image[0], nowhere[0][0], nowhere[1][0])])
    np.testing.assert_allclose(program.call(image, *nowhere)[0], expected, atol=1e-5)


def test_pretraining_sees_no_regions(dataset: SliceDataset) -> None:
    config = own_pretrain.get_config()
    config.data.update({"dir": str(dataset.directory.parents[1]), "context": 1})
    complete = complete_config(config, open_run_dataset(config))
    check_facts(dataset, facts_of_run(complete))
    complete.task = "segment"
    with pytest.raises(UserError, match=r"num_regions: the dataset has 2, the config says 0"):
        check_facts(dataset, facts_of_run(complete))


def test_teachers_and_class_weights_do_not_take_regions(dataset: SliceDataset) -> None:
    for variant, change in (("scratch,copy_paste", {}), ("scratch", {"class_weights": (1, 1, 1)})):
        config = run_config(dataset, variant)
        config.loss.update(change)
        with pytest.raises(
            UserError, match=r"^config\.data\.regions is .*expected none for config"
        ) as e:
            complete_config(config, open_run_dataset(config))
        assert len(str(e.value).splitlines()) == 1
