"""What to label next: medoids against brute force, embeddings and uncertainty against the runs."""

import csv
import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from kafjax.configs import phantom_finetune, phantom_pretrain
from kafjax.data.dataset import SliceDataset, open_dataset
from kafjax.errors import UserError
from kafjax.inference.predictor import load_predictor
from kafjax.models import build_model
from kafjax.suggest.embeddings import embed_volumes
from kafjax.suggest.medoids import k_medoids
from kafjax.suggest.suggestions import suggest, suggest_typical
from kafjax.tasks.pretraining import Pretraining
from kafjax.tasks.segmentation import Segmentation
from kafjax.training.preflight import complete_config
from kafjax.workdir.split import open_split
from kafjax.workdir.workdir import Workdir
from tests.runs import write_run


def random_distances(n: int, seed: int, *, clusters: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    points = rng.standard_normal((n, 3))
    if clusters:
        points += 40 * rng.standard_normal((clusters, 3))[np.arange(n) % clusters]
    return np.linalg.norm(points[:, None] - points, axis=-1)


def total_of(distances: np.ndarray, chosen: tuple[int, ...]) -> float:
    return sum(min(distances[i, j] for j in chosen) for i in range(len(distances)))


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_medoids_of_clusters_are_the_best_of_all_sets(k: int, seed: int) -> None:
    distances = random_distances(12, seed, clusters=k)
    best = min(itertools.combinations(range(12), k), key=lambda s: total_of(distances, s))
    found = k_medoids(distances, k)
    assert sorted(found.indices) == sorted(best)
    np.testing.assert_allclose(found.total, total_of(distances, best))
    for i, place in enumerate(found.nearest):
        assert distances[i, found.indices[place]] == distances[i, list(best)].min()


@pytest.mark.parametrize("seed", range(6))
def test_no_swap_improves_and_fixed_medoids_stay(seed: int) -> None:
    distances = random_distances(15, seed)
    fixed = () if seed % 2 else (3, 7)
    found = k_medoids(distances, 3, fixed=fixed)
    assert found.indices[: len(fixed)] == fixed
    assert len(set(found.indices)) == 3 + len(fixed)
    for place in range(len(fixed), len(found.indices)):
        for other in set(range(15)) - set(found.indices):
            swapped = list(found.indices)
            swapped[place] = other
            assert total_of(distances, tuple(swapped)) >= found.total * (1 - 1e-8)
    best = min(total_of(distances, (*fixed, *s)) for s in itertools.combinations(range(15), 3))
    assert found.total <= 1.1 * best


def test_all_may_be_medoids_but_not_more() -> None:
    distances = random_distances(4, 0)
    assert sorted(k_medoids(distances, 4).indices) == [0, 1, 2, 3]
    assert k_medoids(distances, 4).total == 0
    assert len(k_medoids(np.zeros((3, 3)), 2).indices) == 2
    for k, fixed in ((0, ()), (5, ()), (4, (1,))):
        with pytest.raises(ValueError, match=r"expected \[n, n\] and 1 to n - "):
            k_medoids(distances, k, fixed=fixed)


@pytest.fixture(scope="module")
def dataset(phantom_dataset: Path) -> SliceDataset:
    return open_dataset(phantom_dataset.parents[1], "phantom")


@pytest.fixture(scope="module")
def runs(
    phantom_dataset: Path, dataset: SliceDataset, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A pretraining run and two that segment, of one labelled volume each, of random weights."""
    folder = tmp_path_factory.mktemp("suggest")
    tasks: dict[str, Any] = {}
    for name in ("pretrain", "a", "b"):
        config = (phantom_pretrain if name == "pretrain" else phantom_finetune).get_config()
        config.update_from_flattened_dict(
            {
                "model.filters": 4,
                "model.name": "unet",
                "data.num_threads": 1,
                "data.dir": str(phantom_dataset.parents[1]),
                "data.patch_size": (48, 48),
                "batch_size": 5,
            }
        )
        if name != "pretrain":
            config.seed = ord(name)
            config.model.num_classes = 8
            config.data.update({"fold": None, "num_labeled": 1})
        else:
            config.loss.weights.update({"kaf": 0.0, "matching": 0.0})
        task = (Pretraining if name == "pretrain" else Segmentation)(config)
        tasks[name] = write_run(folder / name, config, task.init(), dataset=dataset)
    return {name: folder / name for name in tasks}


def test_embeddings_are_means_of_the_centres_features(
    runs: dict[str, Path], dataset: SliceDataset
) -> None:
    names = list(dataset.volumes)[:2]
    found = embed_volumes(runs["pretrain"], dataset, names)
    config = load_config(runs["pretrain"], dataset)
    variables = Pretraining(config).init()
    encoder = build_model(config.model).encoder
    parts = {name: tree["encoder"] for name, tree in jax.device_get(variables).items()}
    encode = jax.jit(lambda *inputs: encoder.apply(parts, *inputs, train=False).center)
    for name, embedding in zip(names, found, strict=True):
        images = np.stack([dataset.read(record).image for record in dataset.volumes[name]])
        top, left = (np.array(images.shape[1:3]) - 48) // 2
        images = images[:, top : top + 48, left : left + 48]
        n = len(images)
        no_keypoints = np.zeros((n, 1, 2), np.int32), np.zeros((n, 1), bool)
        expected = np.asarray(encode(images, *no_keypoints)).mean(axis=(0, 1, 2))
        np.testing.assert_allclose(embedding, expected / np.linalg.norm(expected), atol=1e-5)


def load_config(workdir: Path, dataset: SliceDataset) -> Any:
    config = phantom_pretrain.get_config()
    config.update(Workdir(workdir).read_config())
    return complete_config(config, dataset)


def test_suggested_subjects_are_medoids_of_cosine_distances(
    runs: dict[str, Path], dataset: SliceDataset
) -> None:
    names = list(dataset.volumes)
    x = embed_volumes(runs["pretrain"], dataset, names).astype(np.float64)
    distances = 1 - x @ x.T
    found = suggest_typical(Workdir(runs["pretrain"]), dataset, number=2, ignore_labels=True)
    pairs = itertools.combinations(range(len(names)), 2)
    best = min(pairs, key=lambda pair: total_of(distances, pair))
    assert {typical.subject for typical in found} == {names[i] for i in best}
    assert sum(typical.stands_for for typical in found) == len(names)
    total = sum(typical.stands_for * typical.distance for typical in found)
    np.testing.assert_allclose(total, total_of(distances, best), rtol=1e-3)


def test_labelled_subjects_are_not_suggested(runs: dict[str, Path], dataset: SliceDataset) -> None:
    with pytest.raises(UserError, match=r"^0 of \d+ subjects have no labels, fewer than the 1"):
        suggest_typical(Workdir(runs["pretrain"]), dataset, number=1)


def test_uncertain_volumes_are_those_of_the_averaged_probabilities(
    runs: dict[str, Path], dataset: SliceDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    used = {n for r in "ab" for n in open_split(Workdir(runs[r]), dataset).train}
    left = [name for name in dataset.volumes if name not in used]
    predictors = [load_predictor(runs[r]) for r in "ab"]
    expected = {}
    for name in left:
        slices = [dataset.read(record) for record in dataset.volumes[name]]
        views = [(s.image, s.keypoints, s.mask) for s in slices]
        p = np.mean([np.stack(list(run.probabilities(views))) for run in predictors], axis=0)
        entropy = -(p * np.log(p)).sum(-1) / np.log(8)
        of_classes = (entropy[p.argmax(-1) == c] for c in range(1, 8))
        expected[name] = np.mean([e.mean() if e.size else 1.0 for e in of_classes])
    found: Any = suggest([runs["a"], runs["b"]], tmp_path / "out", number=len(left))
    assert [one.volume for one in found] == sorted(left, key=lambda name: -expected[name])
    for one in found:
        np.testing.assert_allclose(one.entropy, expected[one.volume], rtol=1e-4)
    rows = list(csv.DictReader((tmp_path / "out" / "suggestions.csv").open()))
    assert [row["volume"] for row in rows] == [one.volume for one in found]
    assert (tmp_path / "out" / "suggestions.png").stat().st_size > 1000
    assert capsys.readouterr().out.startswith(f"1  {found[0].volume}  entropy ")
    with pytest.raises(UserError, match="volumes that the runs did not train or validate on"):
        suggest([runs["a"]], tmp_path, number=99)
    with pytest.raises(UserError, match="expected one pretraining run, or segmentation runs"):
        suggest([runs["a"], runs["pretrain"]], tmp_path, number=1)


def test_the_medoids_are_written(runs: dict[str, Path], tmp_path: Path) -> None:
    (found,) = suggest([runs["pretrain"]], tmp_path, number=1, ignore_labels=True)
    (row,) = csv.DictReader((tmp_path / "suggestions.csv").open())
    assert row["rank"] == "1"
    assert row["subject"] == found[0]
    assert int(row["stands_for"]) > 1
    assert (tmp_path / "suggestions.png").stat().st_size > 1000
    with pytest.raises(UserError, match="number is 0; expected 1 or more"):
        suggest([runs["pretrain"]], tmp_path, number=0)
