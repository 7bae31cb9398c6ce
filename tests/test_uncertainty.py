"""Uncertainty of predictions against loops over voxels, and its way into files and evaluation."""

import csv
import json
import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.stats import rankdata

from kafjax.errors import UserError
from kafjax.inference import prediction as predict
from kafjax.inference.folders import evaluate_folders
from kafjax.inference.prediction import VolumePredictor
from kafjax.inference.prediction_files import Request, list_requests
from kafjax.inference.uncertainty import (
    Meter,
    add_to_table,
    compare_with_dice,
    mean_of_classes,
    read_table,
)
from tests.test_prediction import CHD, Random, load, predictor_of, scan


def probabilities_of(shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.dirichlet(0.3 * np.ones(shape[-1]), shape[:-1]).astype(np.float32)
    values[0, 0] = np.eye(shape[-1])[1]  # certain, with zeros
    return values


def entropy_of(probabilities: np.ndarray) -> np.ndarray:
    entropy = np.zeros(probabilities.shape[:-1])
    for place in np.ndindex(entropy.shape):
        for p in map(float, probabilities[place]):
            entropy[place] -= p * math.log(p) / math.log(probabilities.shape[-1]) if p > 0 else 0
    return entropy


def test_numbers_equal_a_loop_over_voxels() -> None:
    slices = [probabilities_of((5, 6, 4), seed) for seed in range(3)]
    slices = [p[..., [0, 1, 3, 2]] * [1, 1, 1, 1e-9] for p in slices]  # nothing is class 3
    slices = [(p / p.sum(-1, keepdims=True)).astype(np.float32) for p in slices]
    meter = Meter(4)
    for p in slices:
        np.testing.assert_allclose(meter.add(p), entropy_of(p), atol=1e-6)
    found = meter.numbers()
    for c in (1, 2, 3):
        entropies = []
        for p in slices:
            entropy = entropy_of(p)
            for place in np.ndindex(entropy.shape):
                if all(p[place][c] >= q for q in p[place]):
                    entropies.append(entropy[place])
        assert (not entropies) == (c == 3)
        if entropies:
            np.testing.assert_allclose(found[c - 1], np.mean(entropies), rtol=1e-5)
    assert math.isnan(found[2])
    np.testing.assert_allclose(mean_of_classes(found), (found[0] + found[1] + 1) / 3)


def test_certain_and_clueless_predictions_have_0_and_1() -> None:
    meter = Meter(5)
    np.testing.assert_array_equal(meter.add(np.eye(5)[np.arange(5)]), np.zeros(5, np.float32))
    assert meter.numbers() == [0, 0, 0, 0]
    np.testing.assert_allclose(meter.add(np.full((2, 5), 0.2)), 1, rtol=1e-6)


def test_the_map_is_of_the_average_of_networks_and_mirrors_on_the_scans_grid(
    tmp_path: Path,
) -> None:
    scan(tmp_path / "a.nii.gz")
    networks = Random(0), Random(1)
    predictor = predictor_of(*networks, mirror=True)
    (request,), _ = list_requests(
        tmp_path / "a.nii.gz", tmp_path / "out.nii.gz", CHD, uncertainty=True
    )
    predict.predict_file(request, predictor)
    assert request.done
    assert request.uncertainty == tmp_path / "out_uncertainty.nii.gz"
    found, labels = load(request.uncertainty), load(request.labels)
    np.testing.assert_array_equal(found.affine, load(tmp_path / "a.nii.gz").affine)
    assert found.get_data_dtype() == np.float32
    # Networks whose output depends on a pixel alone give the same for every mirror image.
    assert request.labels.parent == tmp_path
    volume = predictor.reader.read(request.source)
    average = np.stack(list(predict.slice_probabilities(volume, predictor)), axis=-2)
    each = [
        np.stack(list(predict.slice_probabilities(volume, predictor_of(n))), axis=-2)
        for n in networks
    ]
    np.testing.assert_allclose(average, np.mean(each, axis=0), atol=1e-6)
    expected = np.swapaxes(entropy_of(average), 0, 1)  # rows run along y, columns along x
    np.testing.assert_allclose(np.asanyarray(found.dataobj), expected, atol=1e-6)
    rows = list(csv.DictReader((tmp_path / "uncertainty.csv").open()))
    assert {row["volume"] for row in rows} == {"out"}
    assert [row["class"] for row in rows] == CHD["classes"][1:]
    predicted = average.argmax(-1)
    assert np.asanyarray(labels.dataobj).any()
    for i, row in enumerate(rows, start=1):
        inside = entropy_of(average)[predicted == i]
        np.testing.assert_allclose(float(row["entropy"] or "nan"), _mean(inside), rtol=1e-4)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else math.nan


def test_maps_of_an_earlier_prediction_are_no_scans(tmp_path: Path) -> None:
    scan(tmp_path / "a_0000.nii.gz")
    facts = {**CHD, "kind": "nnunet", "channel": 0, "channel_name": "CT"}
    facts |= {"radius": 5, "intensity": "ct"}
    (request,), _ = list_requests(tmp_path, tmp_path, facts, uncertainty=True)
    predict.predict_file(request, VolumePredictor((Random(0),), facts))
    assert {path.name for path in request.places} == {"a.nii.gz", "a_uncertainty.nii.gz"}
    assert request.done
    found, left_out = list_requests(tmp_path, tmp_path, facts, uncertainty=True)
    assert (found, left_out) == ([request], [])


def test_the_table_keeps_other_volumes(tmp_path: Path) -> None:
    path = tmp_path / "uncertainty.csv"
    add_to_table(path, "b", {"x": 0.5})
    add_to_table(path, "a", {"x": math.nan})
    add_to_table(path, "b", {"x": 0.125})
    found = read_table(path)
    assert list(found) == ["a", "b"]
    assert found["b"] == {"x": 0.125}
    assert math.isnan(found["a"]["x"])
    path.write_text("volume,class\na,x\n")
    with pytest.raises(UserError, match=r"uncertainty\.csv: expected a table with columns volume"):
        read_table(path)


def spearman(a: list[float], b: list[float]) -> float:
    ranks = rankdata(a) - (len(a) + 1) / 2, rankdata(b) - (len(b) + 1) / 2
    return float(ranks[0] @ ranks[1] / np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum()))


def test_evaluation_puts_uncertainty_next_to_dice(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    names = [f"v{i}" for i in range(6)]
    for folder in ("predicted", "labels"):
        (tmp_path / folder).mkdir()
    numbers = {}
    for name, wrong in zip(names, rng.permutation(6), strict=True):
        label = rng.integers(0, 3, (6, 6, 4)).astype(np.uint8)
        flip = rng.random(label.shape) < 0.1 * wrong
        predicted = np.where(flip, rng.integers(0, 3, label.shape), label).astype(np.uint8)
        for folder, array in (("predicted", predicted), ("labels", label)):
            nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / folder / f"{name}.nii.gz")
        numbers[name] = {
            "one": float(rng.random()),
            "two": math.nan if name == "v2" else float(rng.random()),
        }
        add_to_table(tmp_path / "predicted" / "uncertainty.csv", name, numbers[name])
        nib.save(
            nib.Nifti1Image(rng.random(label.shape, np.float32), np.eye(4)),
            tmp_path / "predicted" / f"{name}_uncertainty.nii.gz",
        )
    results = evaluate_folders(tmp_path / "predicted", tmp_path / "labels")
    assert results is not None
    assert list(results["by_volume"]) == names
    for c in ("one", "two"):
        pairs = [(results["by_volume"][n][c]["dice"], numbers[n][c]) for n in names]
        real = [pair for pair in pairs if not math.isnan(pair[1])]
        expected = spearman(*map(list, zip(*real, strict=True)))
        found = results["uncertainty"][c]
        np.testing.assert_allclose(found["correlation"], expected, atol=1e-6)
        assert found["volumes"] == (6 if c == "one" else 5)
    means = [np.mean([results["by_volume"][n][c]["dice"] for c in ("one", "two")]) for n in names]
    values = [np.mean([1.0 if math.isnan(v) else v for v in numbers[n].values()]) for n in names]
    expected = spearman(means, values)
    np.testing.assert_allclose(results["uncertainty"]["mean"]["correlation"], expected, atol=1e-6)
    rows = list(csv.DictReader((tmp_path / "predicted" / "evaluation.csv").open()))
    row = next(r for r in rows if (r["volume"], r["class"]) == ("v0", "one"))
    np.testing.assert_allclose(float(row["entropy"]), numbers["v0"]["one"], rtol=1e-5)
    assert next(r for r in rows if (r["volume"], r["class"]) == ("v2", "two"))["entropy"] == ""
    kept = json.loads((tmp_path / "predicted" / "evaluation.json").read_text())
    assert kept["uncertainty"] == results["uncertainty"]


def test_constant_numbers_have_no_correlation() -> None:
    metrics = {f"v{i}": {"a": {"dice": float(i)}, "b": {"dice": float(i)}} for i in range(4)}
    table = {name: {"a": 0.5, "b": -float(name[1:])} for name in metrics}
    table.pop("v3")
    found = compare_with_dice(metrics, table)
    assert found["a"] == {"volumes": 3, "correlation": None}
    assert found["b"] == {"volumes": 3, "correlation": pytest.approx(-1)}
    assert metrics["v3"]["a"] == {"dice": 3.0, "entropy": None}


def test_results_that_a_request_lacks_are_not_done(tmp_path: Path) -> None:
    scan(tmp_path / "a.nii.gz")
    (request,), _ = list_requests(tmp_path / "a.nii.gz", tmp_path / "b.nii.gz", CHD)
    predict.predict_file(request, predictor_of(Random(0)))
    assert request.done
    more = Request(request.source, request.labels, uncertainty=tmp_path / "b_uncertainty.nii.gz")
    assert not more.done
