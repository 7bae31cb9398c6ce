"""Prediction from raw files: what networks see is what records hold, and labels lie on the scan."""

import gzip
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from data_prep.acdc import AcdcReader
from data_prep.builder import Options
from data_prep.nifti import from_slices, to_slices
from data_prep.nnunet import open_nnunet
from data_prep.prepare import prepare_dataset
from data_prep.readers import READERS
from data_prep.volumes import Reader, Source
from kafjax.configs import phantom_finetune
from kafjax.data.dataset import SliceDataset, open_dataset
from kafjax.inference import prediction as predict
from kafjax.inference import prediction_files
from kafjax.inference.evaluation import evaluate
from kafjax.inference.prediction import (
    VolumePredictor,
    load_volume_predictor,
    predict_files,
    predict_volume,
)
from kafjax.inference.predictor import View, load_predictor
from kafjax.tasks.segmentation import Segmentation
from tests.raw_layouts import write_acdc, write_nnunet
from tests.runs import write_run

ROOT = Path(__file__).parents[1]
# Fewer places than slices have keypoints, so that the choice matters.
OPTIONS = Options(max_keypoints=4, keypoint_selection="random", seed=3)
CHD = {
    "kind": "chd",
    "classes": list(READERS["chd"].classes),
    "max_keypoints": 4,
    "keypoint_selection": "random",
    "seed": 3,
}


class Corner:
    """Class 1 where the slice is bright, 2 in its first rows, 3 in its first columns, else 0."""

    context = 0

    def probabilities(self, views: Sequence[View]) -> Iterator[np.ndarray]:
        for image, _, _ in views:
            classes = np.where(image[..., 0] > 0.5, 1, 0)
            classes[:, :2] = 3
            classes[:2] = 2
            yield np.eye(8, dtype=np.float32)[classes]


class Random:
    """Probabilities of each pixel's value, by a random map; nothing but the image matters."""

    context = 0

    def __init__(self, seed: int):
        self.config = ml_collections.ConfigDict()
        self._rates = np.random.default_rng(seed).standard_normal(8).astype(np.float32)

    def probabilities(self, views: Sequence[View]) -> Iterator[np.ndarray]:
        for image, _, _ in views:
            yield np.asarray(jax.nn.softmax(image * self._rates))


def predictor_of(*networks: Any, mirror: bool = False, **changes: Any) -> VolumePredictor:
    return VolumePredictor(networks, {**CHD, **changes}, mirror=mirror)


def scan(path: Path, size: tuple[int, int, int] = (7, 9, 4), seed: int = 0) -> None:
    """Writes noise, [x, y, z] with x to the left and y to the back."""
    values = np.random.default_rng(seed).integers(-900, 900, size).astype(np.int16)
    image = nib.Nifti1Image(values, np.diag([-1.5, -1.7, 2.0, 1.0]))
    nib.save(image, path)


def load(path: Path | None) -> Any:
    assert path is not None
    return nib.load(path)


# What networks see.


def prepared(reader: Reader, raw_dir: Path, data_dir: Path) -> SliceDataset:
    prepare_dataset(reader, raw_dir, data_dir, name="tiny", options=OPTIONS, num_workers=0)
    return open_dataset(data_dir, "tiny")


@pytest.mark.parametrize("kind", ["chd", "acdc", "ct", "mr", "several"])
def test_raw_volumes_give_the_numbers_of_the_records(
    kind: str, phantom_raw: Path, tmp_path: Path
) -> None:
    raw = tmp_path / "raw"
    if kind == "chd":
        reader, raw = READERS["chd"], phantom_raw
        scans = sorted(raw.glob("*_image.nii.gz"))
    elif kind == "acdc":
        reader = AcdcReader()
        write_acdc(raw, 1)
        scans = sorted(raw.glob("*/*_frame??.nii.gz"))
    else:
        write_nnunet(raw, unlabelled=("with-dash",), channels=(kind.upper(), "other", "CT"))
        several = {"channel": "1,CT", "keypoint_channel": "CT"}
        reader = open_nnunet(raw, **(several if kind == "several" else {"channel": "0"}))
        scans = sorted(raw.glob(f"imagesTr/*_000{int(kind == 'several')}.nii.gz"))
    dataset = prepared(reader, raw, tmp_path / "data")
    facts = {k: v for k, v in dataset.metadata.items() if k != "volumes"}
    read, chosen = set(), 0
    for path in scans:
        (job,), _ = prediction_files.list_requests(path, tmp_path / "out", facts)
        volume = VolumePredictor((), facts).reader.read(job.source)
        views = predict.prepare_views(reader.prepare(volume), facts)
        records = dataset.volumes[volume.id]
        assert len(views) == len(records)
        for (image, keypoints, mask), record in zip(views, records, strict=True):
            expected = dataset.read(record)
            np.testing.assert_array_equal(image, expected.image, strict=True)
            np.testing.assert_array_equal(keypoints, expected.keypoints, strict=True)
            np.testing.assert_array_equal(mask, expected.mask, strict=True)
            chosen += int(mask.all())
        read.add(volume.id)
    assert read == set(dataset.volumes)
    assert chosen > 0


# Where labels lie.


def orientations_of_axes() -> Iterator[np.ndarray]:
    for axes in itertools.permutations(range(3)):
        for flips in itertools.product([1, -1], repeat=3):
            yield np.stack([axes, flips], axis=1)


def oblique() -> np.ndarray:
    """A turn by 20 degrees about x, then 15 about z."""
    a, b = np.radians([20, 15])
    about_x = [[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]]
    about_z = [[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]]
    turn = np.eye(4)
    turn[:3, :3] = np.array(about_z) @ about_x
    return turn


@pytest.mark.parametrize("kind", ["chd", "acdc"])
@pytest.mark.parametrize("tilt", [np.eye(4), oblique()], ids=["straight", "oblique"])
def test_labels_turn_with_the_scan(kind: str, tilt: np.ndarray, tmp_path: Path) -> None:
    predictor = predictor_of(Corner(), kind=kind)
    values = np.random.default_rng(1).integers(-900, 900, (7, 9, 4)).astype(np.int16)
    # ACDC's plane is the one across the coarsest axis: here its slices are sagittal.
    spacing = (1.5, 1.7, 8.0) if kind == "chd" else (8.0, 1.7, 1.5)
    original = nib.Nifti1Image(values, tilt @ np.diag([-spacing[0], -spacing[1], spacing[2], 1]))
    wanted = None
    for number, turn in enumerate(orientations_of_axes()):
        turned = original.as_reoriented(turn)
        nib.save(turned, tmp_path / f"{number}.nii")
        job = prediction_files.Request(
            Source("same", tmp_path / f"{number}.nii"), tmp_path / f"labels_{number}.nii.gz"
        )
        predict.predict_file(job, predictor)
        found = load(job.labels)
        assert found.shape == turned.shape
        np.testing.assert_allclose(found.affine, turned.affine, atol=1e-5)
        if wanted is None:
            np.testing.assert_array_equal(turn, [[0, 1], [1, 1], [2, 1]])
            wanted = nib.Nifti1Image(np.asanyarray(found.dataobj), original.affine)
            assert set(np.unique(wanted.dataobj)) == {0, 1, 2, 3}
            # Rows run to the back, along y here, columns to the left, along x.
            if kind == "chd":
                np.testing.assert_array_equal(wanted.dataobj[:, :2], 2)
                np.testing.assert_array_equal(wanted.dataobj[:2, 2:], 3)
            else:  # and in sagittal slices down, against z, and to the back
                np.testing.assert_array_equal(wanted.dataobj[:, :, -1], 2)
                np.testing.assert_array_equal(wanted.dataobj[:, 0, :-2], 3)
        expected = np.asanyarray(wanted.as_reoriented(turn).dataobj)
        np.testing.assert_array_equal(np.asanyarray(found.dataobj), expected)
    assert number == 47


def test_resampled_probabilities_come_back_to_the_sources_grid(tmp_path: Path) -> None:
    """A smooth blob, seen at 1.25 mm, is where it was at 2 mm; probabilities still add up to 1."""

    class Bright:
        context = 0

        def probabilities(self, views: Sequence[View]) -> Iterator[np.ndarray]:
            for image, _, _ in views:
                assert image.shape == (64, 48, 1)
                yield np.concatenate([image < 0.7, image >= 0.7], -1).astype(np.float32)

    rows, cols = np.mgrid[:40, :30]
    blob = np.exp(-((rows - 25) ** 2 + (cols - 10) ** 2) / 60)
    volume = np.stack([blob, blob], axis=-1)
    predictor = predictor_of(Bright(), kind="acdc")
    labels = predict_volume(volume, (2.0, 2.0, 10.0), predictor)
    threshold = volume.mean() + 0.7 * volume.std()
    assert np.mean(labels != (volume >= threshold)) < 0.01
    whole = predict._as_volume(volume, (2.0, 2.0, 10.0), "v")
    for probabilities in predict.slice_probabilities(whole, predictor):
        np.testing.assert_allclose(probabilities.sum(-1), 1, atol=1e-5)


# What is averaged.


def test_mirrored_views_show_the_same_keypoints_and_come_back() -> None:
    seen: list[View] = []

    class Watching(Corner):
        def probabilities(self, views: Sequence[View]) -> Iterator[np.ndarray]:
            seen.extend(views)
            return super().probabilities(views)

    noise = np.random.default_rng(0).standard_normal((24, 17, 2))
    volume = (900 * gaussian_filter(noise, (1.5, 1.5, 0))).astype(np.int16)
    whole = predict._as_volume(volume, (1.0, 1.0, 1.0), "v")
    predictor = predictor_of(Watching(), mirror=True, max_keypoints=64)
    for k, found in enumerate(predict.slice_probabilities(whole, predictor)):
        image = seen[4 * k][0]
        expected = np.zeros((24, 17, 8))
        for row, col in np.ndindex(24, 17):
            for r, c in itertools.product((row, 23 - row), (col, 16 - col)):
                inside = 3 if c < 2 else int(image[row, col, 0] > 0.5)
                expected[row, col, 2 if r < 2 else inside] += 0.25
        np.testing.assert_array_equal(found, expected)
    assert len(seen) == 8
    images = {image.tobytes() for image, _, _ in seen}
    assert len(images) == 8
    for first in (0, 4):
        under = []
        for image, keypoints, mask in seen[first : first + 4]:
            assert mask.sum() > 3
            under.append(image[keypoints[mask][:, 0], keypoints[mask][:, 1], 0])
        for values in under[1:]:
            np.testing.assert_array_equal(values, under[0])


def test_runs_are_averaged() -> None:
    volume = np.random.default_rng(0).integers(0, 99, (5, 6, 3)).astype(np.int16)
    whole = predict._as_volume(volume, (1.0, 1.0, 1.0), "v")
    networks = Random(0), Random(1), Random(2)
    each = [list(predict.slice_probabilities(whole, predictor_of(n))) for n in networks]
    found = list(predict.slice_probabilities(whole, predictor_of(*networks)))
    np.testing.assert_allclose(found, np.mean(each, axis=0), rtol=1e-6)
    labels = predict_volume(volume, (1.0, 1.0, 1.0), predictor_of(*networks))
    np.testing.assert_array_equal(labels, np.moveaxis(np.mean(each, axis=0).argmax(-1), 0, 2))


@pytest.mark.parametrize(
    ("array", "spacing", "message"),
    [
        (np.zeros((3, 3)), (1, 1, 1), "expected integers or floats"),
        (np.zeros((3, 3, 3), bool), (1, 1, 1), "expected integers or floats"),
        (np.full((3, 3, 3), np.nan), (1, 1, 1), "NaN or infinite"),
        (np.zeros((3, 3, 3)), (1, 1, 1), "constant"),
        (np.zeros((3, 3, 3)), (1, 0, 1), "spacing is"),
    ],
)
def test_arrays_that_are_no_volume_are_refused(array: Any, spacing: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predict_volume(array, spacing, predictor_of(Corner()))


# Runs.


@pytest.fixture(scope="module")
def runs(phantom_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Workdirs of two runs that have just begun: KAF-UNets, 48 x 48 patches, slices are larger."""
    workdirs = []
    for seed in range(2):
        config = phantom_finetune.get_config()
        config.update_from_flattened_dict(
            {
                "model.filters": 4,
                "model.num_attention_layers": 2,
                "model.num_classes": 8,
                "data.max_keypoints": 64,
                "data.dir": str(phantom_dataset.parents[1]),
                "data.patch_size": (48, 48),
                "batch_size": 8,
                "seed": seed,
            }
        )
        workdirs.append(tmp_path_factory.mktemp(f"run{seed}"))
        write_run(workdirs[-1], config, Segmentation(config).init())
    return workdirs


def test_raw_file_gets_the_labels_that_evaluation_gives_its_records(
    runs: list[Path],
    phantom_raw: Path,
    phantom_dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dataset = open_dataset(phantom_dataset.parents[1], "phantom")
    network = load_predictor(runs[0])
    found, traced = [], []
    probabilities, trace = network.probabilities, Segmentation.predict

    def watch(views: Sequence[View]) -> Iterator[np.ndarray]:
        for of_slice in probabilities(views):
            found.append(of_slice.argmax(-1))
            yield of_slice

    def count(*arguments: Any) -> Any:
        traced.append(arguments)
        return trace(*arguments)

    monkeypatch.setattr(network, "probabilities", watch)
    name = min(dataset.volumes)
    evaluate(network, dataset, (name,))
    monkeypatch.setattr(Segmentation, "predict", count)
    # Two scans of different sizes; one was prepared.
    small = tmp_path / "in" / "small.nii.gz"
    small.parent.mkdir()
    scan(small, (30, 70, 2))
    scan_path = phantom_raw / f"{name}_image.nii.gz"
    os.link(scan_path, small.parent / scan_path.name)
    predict_files([runs[0]], small.parent, tmp_path / "out")
    assert len(traced) == 1  # compiled once for all of them
    assert load(tmp_path / "out" / small.name).shape == (30, 70, 2)
    labels = load(tmp_path / "out" / scan_path.name)
    slices, _ = to_slices(np.asanyarray(labels.dataobj), labels.affine)
    assert len(np.unique(slices)) > 2
    np.testing.assert_array_equal(slices, np.stack(found, axis=-1))
    # From Python, with an array.
    raw = load(scan_path)
    array, _ = to_slices(np.asanyarray(raw.dataobj), raw.affine)
    predictor = load_volume_predictor([runs[0]])
    again = predict_volume(array, (1.0, 1.0, 1.0), predictor, volume_id=name)
    np.testing.assert_array_equal(from_slices(again, raw.affine), labels.get_fdata())


def test_one_bad_file_of_ten(
    runs: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for number in range(10):
        scan(source / f"scan{number}.nii.gz", (9, 11, 2), seed=number)
    bad = source / "scan4.nii.gz"
    bad.write_bytes(bad.read_bytes()[:-20])
    done = subprocess.run(
        [
            *(sys.executable, "-m", "kafjax.predict", "--workdir", f"{runs[0]},{runs[1]}"),
            *("--input", source, "--output", target, "--probabilities", "--mirror", "--step", "0"),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done.stdout
    assert f"  {bad}: its gzip stream is truncated; copy or download it again" in done.stdout
    assert "Traceback" not in done.stdout
    good = [number for number in range(10) if number != 4]
    written = sorted(path.name for path in target.iterdir())
    expected = [f"scan{n}{end}.nii.gz" for n in good for end in ("", "_probabilities")]
    assert written == sorted(expected)
    labels, probabilities = (load(target / f"scan5{end}.nii.gz") for end in ("", "_probabilities"))
    assert probabilities.shape == (9, 11, 2, 8)
    np.testing.assert_array_equal(probabilities.get_fdata().argmax(-1), labels.get_fdata())
    times = [path.stat().st_mtime_ns for path in sorted(target.iterdir())]

    monkeypatch.setattr(predict, "load_predictor", lambda *_, **__: Random(0))
    options: dict[str, Any] = {"probabilities": True, "mirror": True, "step": 0}
    with pytest.raises(ValueError, match=f"could not be predicted:\n  {bad}: its gzip"):
        predict_files(runs, source, target, **options)
    assert "Skipped 9 of 10 files" in capsys.readouterr().out
    assert [path.stat().st_mtime_ns for path in sorted(target.iterdir())] == times
    # Mended, it is the only one that is predicted.
    content = gzip.decompress((source / "scan5.nii.gz").read_bytes())
    bad.write_bytes(gzip.compress(content))
    predict_files(runs, source, target, **options)
    assert f"Wrote {target / bad.name}" in capsys.readouterr().out
    assert len(list(target.iterdir())) == 20


@pytest.mark.parametrize(
    "name", ["a [b] *?", "c, 'd' $f", "本 é", "l" * 200, os.fsdecode(b"\xff\xfe"), "~"]
)
def test_any_path_of_scans_and_results_works_and_again(
    name: str,
    runs: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(predict, "load_predictor", lambda *_, **__: Random(0))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    place = tmp_path / "home" if name == "~" else tmp_path / name
    (place / "in").mkdir(parents=True)
    file_name = "s.nii.gz" if name == "~" else f"{name}.nii.gz"
    scan(place / "in" / file_name, (9, 11, 2))
    content = gzip.decompress((place / "in" / file_name).read_bytes())
    (place / "in" / "plain.nii.gz").write_bytes(content)  # not compressed, though its name says so
    (place / "in" / "broken.nii.gz").symlink_to("nowhere")
    source, target = ("~/in", "~/out") if name == "~" else (place / "in", place / "out")
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"^these files .*\n  .*broken.nii.gz: is a link to now"
        ):
            predict_files(runs[:1], source, target)
        written = sorted(path.name for path in (place / "out").iterdir())
        assert written == sorted([file_name, "plain.nii.gz"])
    first, second = (np.asanyarray(load(path).dataobj) for path in (place / "out").iterdir())
    assert first.shape == (9, 11, 2)
    np.testing.assert_array_equal(first, second)


def test_a_scan_cut_in_another_plane_than_the_runs_know_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = np.random.default_rng(1).integers(-900, 900, (4, 9, 7)).astype(np.int16)
    path = tmp_path / "sagittal.nii.gz"
    nib.save(nib.Nifti1Image(values, np.diag([-8.0, 1.7, 1.5, 1.0])), path)
    job = prediction_files.Request(Source("s", path), tmp_path / "labels.nii.gz")
    facts = {"kind": "nnunet", "channel": 0, "channel_name": "", "intensity": "zscore", "radius": 9}
    for planes, told in ((["axial"], True), (["axial", "sagittal"], False), (None, False)):
        known = {} if planes is None else {"planes": planes}
        predict.predict_file(job, predictor_of(Corner(), **facts, **known))
        expected = f"note: {path}: is cut in sagittal slices; the runs were trained on axial ones"
        assert (expected in capsys.readouterr().err) == told
