"""The paper's figures by their command: what is shown is what training and the runs say."""

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from absl import flags
from matplotlib.figure import Figure
from scipy.spatial.distance import cosine

from kafjax.augment import AugmentConfig
from kafjax.configs import phantom_finetune, phantom_pretrain
from kafjax.data.dataset import SliceDataset, open_dataset
from kafjax.data.splits import split_volumes
from kafjax.drawing.figures import save_figure
from kafjax.drawing.overlay import draw_labels
from kafjax.figures import choice, segmentation, similarity
from kafjax.figures.__main__ import main, make_parser
from kafjax.inference.predictor import Predictor
from kafjax.tasks.pretraining import Pretraining
from kafjax.tasks.segmentation import Segmentation
from kafjax.workdir.workdir import name_runs
from tests.runs import write_run

TINY = {"model.filters": 4, "data.num_threads": 1}


@pytest.fixture(scope="module")
def dataset(phantom_dataset: Path) -> SliceDataset:
    return open_dataset(phantom_dataset.parents[1], "phantom")


@pytest.fixture(scope="module")
def runs(
    phantom_dataset: Path, dataset: SliceDataset, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Workdirs as runs leave them: a pretrained KAF-UNet, and a plain UNet that segments."""
    folder = tmp_path_factory.mktemp("runs")
    pretraining, finetuning = phantom_pretrain.get_config(), phantom_finetune.get_config()
    for config in (pretraining, finetuning):
        config.update_from_flattened_dict({**TINY, "data.dir": str(phantom_dataset.parents[1])})
    finetuning.update_from_flattened_dict(
        {
            "model.name": "unet",
            "model.num_classes": 8,
            "data.num_folds": 2,
            "data.num_labeled": 1,
        }
    )
    tasks = {"kaf": Pretraining(pretraining), "plain": Segmentation(finetuning)}
    for (name, task), config in zip(tasks.items(), (pretraining, finetuning), strict=True):
        write_run(folder / name, config, task.init(), dataset=dataset)
    return {name: folder / name for name in tasks}


def draw(*arguments: Any) -> Figure:
    parsed = make_parser().parse_args([*map(str, arguments), "--output", "x.png"])
    figure: Figure = parsed.draw(parsed)
    return figure


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_keypoints_figure_counts_what_training_is_given(
    dataset: SliceDataset, tmp_path: Path
) -> None:
    arguments = ("keypoints", "--data_dir", dataset.directory.parents[1])
    arguments = (*arguments, "--volume", "ct_1002", "--slice", 5, "--seed", 3)
    figure = draw(*arguments)
    record = dataset.volumes["ct_1002"][5]
    sample = choice.make_chosen_pair(dataset, record, 1, patch_size=(64, 64), seed=3)
    assert sample["record"].tolist() == [record, record + 1]
    task = Pretraining(phantom_pretrain.get_config())
    batch = {field: np.asarray(value)[None] for field, value in sample.items()}
    moved = jax.tree.map(lambda x: np.asarray(x[0]), jax.jit(task.augment)(batch))
    assert np.any(moved["keypoint_mask"] != sample["keypoint_mask"])
    before, after = sample["keypoint_mask"].sum(1), moved["keypoint_mask"].sum(1)
    pairs = [np.sum(x["correspondence"] >= 0) for x in (sample, moved)]
    assert texts(figure) == [
        f"(a) {before[0]} and {before[1]} keypoints",
        "ct_1002 slice 5",
        "ct_1002 slice 6",
        f"(b) {pairs[0]} correspondences",
        f"(c) {after[0]} and {after[1]} after augmentation",
        f"(d) {pairs[1]} after augmentation",
    ]
    dots = [sum(len(line.get_xdata()) for line in axes.lines) for axes in figure.axes]
    assert dots == [before.sum()] * 2 + [after.sum()] * 2
    lines = [sum(len(c.get_segments()) for c in axes.collections) for axes in figure.axes]
    assert lines == [0, pairs[0], 0, pairs[1]]
    for name in ("a.png", "a.pdf", "a.svg"):
        paths = [tmp_path / name, tmp_path / f"again_{name}"]
        for path, one in zip(paths, (figure, draw(*arguments)), strict=True):
            save_figure(one, path)
        assert paths[0].read_bytes() == paths[1].read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_offsets_are_those_that_a_slice_has(dataset: SliceDataset) -> None:
    records = dataset.volumes["ct_1001"]
    assert choice.choose_offset(dataset, records[3]) == 1
    assert choice.choose_offset(dataset, records[-1]) == -1
    assert choice.choose_offset(dataset, records[3], -1) == -1
    with pytest.raises(ValueError, match=r"slice 0 has no neighbour at offset -1; expected 1"):
        choice.choose_offset(dataset, records[0], -1)


def test_names_of_runs_tell_them_apart() -> None:
    assert name_runs(["/a/b/c", "/a/b/d"]) == ["c", "d"]
    assert name_runs(["/a/x/c", "/a/y/c", "/a/y/d"]) == ["x/c", "y/c", "y/d"]


def test_cosine_is_scipys() -> None:
    features = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
    found = similarity.cosine_map(features, np.array([2, 1]))
    for place in np.ndindex(2, 3, 4):
        assert found[place] == pytest.approx(
            1 - cosine(features[place], features[0, 2, 1]), abs=1e-6
        )
    assert np.isfinite(similarity.cosine_map(np.zeros((1, 2, 2, 3), np.float32), [0, 0])).all()


def test_query_is_the_keypoint_with_most_correspondences_then_the_nearest_to_the_middle() -> None:
    def sample(mask: list[int], matched: list[int]) -> dict[str, np.ndarray]:
        places = np.array([[0, 0], [30, 30], [31, 33], [2, 2], [32, 32]])
        return {
            "image": np.zeros((2, 64, 64, 1)),
            "keypoints": np.stack([places, places]),
            "keypoint_mask": np.array([mask, [1] * 5], bool),
            "correspondence": np.where(matched, 0, -1),
        }

    before = sample([1, 1, 1, 1, 0], [1, 1, 1, 1, 0])
    counts = np.array([4, 4, 4, 5, 9])
    assert similarity.choose_query(counts, before, sample([1] * 5, [1, 1, 1, 0, 0])) == 2
    assert similarity.choose_query(counts, before, sample([1] * 5, [1] * 5)) == 3
    assert similarity.choose_query(counts, before, sample([1, 1, 1, 0, 0], [0] * 5)) == 2
    with pytest.raises(ValueError, match="no keypoint; expected a point of it as --query"):
        similarity.choose_query(counts, sample([0] * 5, [0] * 5), before)


def test_query_given_by_hand_moves_with_the_image(dataset: SliceDataset) -> None:
    record = dataset.volumes["ct_1001"][4]
    query = (20, 40)
    views = similarity.make_views(dataset, record, 1, query=query, patch_size=(64, 96), seed=1)
    assert views.query.places[0].tolist() == [20, 56]  # centred in the patch
    assert views.query.found.tolist() == [True, False, True, False]
    sample = choice.make_chosen_pair(dataset, record, 1, patch_size=(64, 96), seed=1)
    rows, columns = np.indices((64, 96))
    lump = np.exp(-((rows - 20) ** 2 + (columns - 56) ** 2) / 8)[..., None]
    sample["image"] = np.stack([lump, lump]).astype(np.float32)
    places = np.broadcast_to([[20, 56]], (2, 65, 2)).astype(np.int32)
    mask, unmatched = np.ones((2, 65), bool), np.full(65, -1, np.int32)
    sample.update(keypoints=places, keypoint_mask=mask, correspondence=unmatched)
    always = AugmentConfig(spatial_probability=1.0)
    moved = choice.augment_sample(sample, mode="analytic", config=always)
    brightest = np.unravel_index(moved["image"][0].argmax(), (64, 96))
    assert np.abs(np.subtract(brightest, views.query.places[2])).max() <= 1
    assert views.query.places[2].tolist() != [20, 56]


def test_similarity_figure_of_two_networks(dataset: SliceDataset, runs: dict[str, Path]) -> None:
    figure = draw("similarity", "--workdir", *runs.values(), "--volume", "ct_1001", "--slice", 4)
    record = dataset.volumes["ct_1001"][4]
    views = similarity.make_views(dataset, record, 1, query=None, patch_size=(64, 64), seed=0)
    assert views.query.found.all()
    partner = dataset.read(record).correspondences[1]
    matched = (dataset.read(record).keypoints == views.query.places[0]).all(-1)
    (index,) = np.flatnonzero(matched & dataset.read(record).mask)
    neighbour = dataset.read(record + 1).keypoints[partner[index]]
    np.testing.assert_array_equal(neighbour, views.query.places[1])
    grid = np.array(figure.axes[:24]).reshape(3, 8)
    for network in (1, 2):
        for column, size in ((0, 32), (4, 8)):
            (picture,) = grid[network, column].images
            shown = picture.get_array()
            assert shown.shape == (size, size)
            place = views.query.places[0] * size // 64
            assert shown[tuple(place)] == pytest.approx(1, abs=1e-5)
            assert shown.max() <= 1 + 1e-5
            assert shown.min() < 0.99
            star = grid[network, column].lines[0]
            assert (star.get_ydata()[0], star.get_xdata()[0]) == tuple(views.query.places[0])
    assert [axes.texts[-1].get_text() for axes in grid[1:, 0]] == ["kaf", "plain"]


class Shifted:
    """Predicts each slice's label, moved by a pixel."""

    context = 0
    views = Predictor.views

    def __init__(self, dataset: SliceDataset, config: Any):
        self.config = config
        slices = [dataset.read(i, with_label=True) for i in range(len(dataset.reader))]
        self._labels = {s.image.tobytes(): np.roll(s.label, 1, axis=0) for s in slices}

    def probabilities(self, views: Sequence[Any]) -> Iterator[np.ndarray]:
        for image, _, _ in views:
            yield np.eye(8)[self._labels[image.tobytes()]]


def test_segmentation_figure_has_dice_of_the_largest_slices(
    dataset: SliceDataset, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = segmentation.load_predictor(runs["plain"], batch_size=1)
    monkeypatch.setattr(
        segmentation, "load_predictor", lambda *_, **__: Shifted(dataset, real.config)
    )
    figure = draw("segmentation", "--workdir", runs["plain"])
    held_out = split_volumes(list(dataset.volumes), fold=0, num_labeled=1, num_folds=2)
    expected = []
    for row, name in enumerate(held_out.validation):
        records = list(dataset.volumes[name])
        labels = np.stack([dataset.read(r, with_label=True).label for r in records])
        largest = int((labels > 0).sum(axis=(1, 2)).argmax())
        label, moved = labels[largest], np.roll(labels[largest], 1, axis=0)
        image = dataset.read(records[largest]).image[..., 0]
        for column, shown in ((1, label), (2, moved)):
            (picture,) = figure.axes[3 * row + column].images
            np.testing.assert_array_equal(
                picture.get_array(), draw_labels(image, shown, opacity=0.65)
            )
        dice = [
            2 * np.sum((label == i) & (moved == i)) / (np.sum(label == i) + np.sum(moved == i))
            for i in np.unique(label)[1:]
        ]
        expected += [f"{name} slice {largest}", f"Dice {np.mean(dice):.3f}"]
    found = [text for text in texts(figure) if re.match("ct_|Dice", text)]
    assert found == expected
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert set(names) <= set(dataset.classes[1:])
    given = ("--volume", held_out.train[0], "--slice", 5)
    figure = draw("segmentation", "--workdir", runs["plain"], *given)
    assert [text.endswith("*") for text in texts(figure) if text.startswith("Dice")] == [True]


def test_segmentation_figure_of_a_run(runs: dict[str, Path], tmp_path: Path) -> None:
    figure = draw("segmentation", "--workdir", runs["plain"], "--num_slices", 1)
    save_figure(figure, tmp_path / "new" / "a.svg")
    assert (tmp_path / "new" / "a.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("keypoints --volume ct_9 --slice 3", "has no volume ct_9; it has ct_1001, ct_1002"),
        ("keypoints --volume ct_1001 --slice 12", "ct_1001 has the slices 0 to 11; found --slice"),
        ("keypoints --volume ct_1001 --slice 1 --output a.gif", "expected the extension .png, "),
        ("keypoints --volume ct_1001 --slice 1 --dataset chd", "no prepared dataset here"),
        ("keypoints --volume ct_1001 --slice 1 --patch_size 64", "'64'; expected HxW, such as"),
        ("keypoints --volume ct_1001 --slice 1 --seed -1", "--seed is -1; expected 0 or more"),
        (
            "similarity --workdir RUN --volume ct_1001 --slice 1 --levels 5",
            "levels are 5; expected",
        ),
        (
            "similarity --workdir RUN --volume ct_1001 --slice 1 --query 64,0",
            "the query is (64, 0); expected a pixel of 64 rows, 64 columns",
        ),
        ("segmentation --workdir KAF", "a run of task 'pretrain'; expected 'segment'"),
        ("segmentation --workdir NONE", "has no config.json; expected the workdir of a run"),
        ("segmentation --workdir RUN --slice 3", "--slice is given without --volume"),
        ("segmentation --workdir RUN --volume ct_1001 --slice 3 4", "2 slices of 1 volumes"),
        ("segmentation", "the following arguments are required: --workdir"),
    ],
)
def test_mistakes_are_one_line(
    dataset: SliceDataset,
    runs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    expected: str,
) -> None:
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(sys.argv[:1])
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    places = {"RUN": runs["plain"], "KAF": runs["kaf"], "NONE": tmp_path}
    words = [str(places.get(word, word)) for word in arguments.split()]
    words += [] if "--output" in words else ["--output", str(tmp_path / "a.png")]
    words += [f"--data_dir={dataset.directory.parents[1]}"]
    with pytest.raises(SystemExit) as caught:
        main(make_parser().parse_args(words))
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert expected in error
    assert not list(tmp_path.glob("a.*"))
