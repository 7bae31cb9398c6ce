"""Shards and datasets: what is in a record, the same bytes always, and every interruption."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from data_prep import builder, prepare, sift
from data_prep.builder import Options
from data_prep.chd import ChdReader
from data_prep.faults import DatasetError
from data_prep.prepare import PreparationError, prepare_dataset
from data_prep.readers import READERS
from data_prep.volumes import Source
from kafjax.data.records import RecordReader, load_decoder

ROOT = Path(__file__).parent.parent
CHD = READERS["chd"]
OPTIONS = Options(max_keypoints=64)


def prepared(raw_dir, data_dir, *, reader=CHD, options=OPTIONS, num_workers=0, **more):
    return prepare_dataset(
        reader,
        raw_dir,
        data_dir,
        name="phantom",
        options=options,
        num_workers=num_workers,
        **more,
    )


def contents(directory):
    """The bytes of every file of a dataset, by name."""
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def some_keypoints(seed, counts, edge=40):
    rng = np.random.default_rng(seed)
    return [
        sift.Keypoints(
            rng.integers(0, edge, (n, 2), np.int16), rng.integers(0, 9, (n, 128), np.uint8), n
        )
        for n in counts
    ]


# What is in a record.


def test_match_volume_holds_every_pair_in_both_directions():
    keypoints = some_keypoints(0, (12, 0, 20, 9, 15))
    table = builder.match_volume(keypoints, reach=3, own_reach=2, radius=20, places=20)
    assert (table.shape, table.dtype) == ((5, 6, 20), np.int16)
    for i, first in enumerate(keypoints):
        for row, offset in enumerate((-3, -2, -1, 1, 2, 3)):
            expected = np.full(20, -1)
            if abs(offset) <= 2 and 0 <= i + offset < 5:
                second = keypoints[i + offset]
                expected[: len(first)] = sift.correspondences(first, second, radius=20)
            np.testing.assert_array_equal(table[i, row], expected)


def test_records_hold_what_the_files_and_the_method_say(phantom_raw, phantom_dataset):
    source = CHD.find(phantom_raw)[0][1]
    volume = CHD.read(source)
    low, high = np.percentile(volume.image, [1, 99])
    clipped = np.clip(volume.image, int(low), int(high))
    keypoints = [
        sift.find_keypoints(
            clipped[:, :, i], max_keypoints=64, rng=sift.slice_generator(0, "ct_1002", i)
        )
        for i in range(12)
    ]
    records, decode = RecordReader(phantom_dataset), load_decoder(phantom_dataset)
    assert list(records.splits) == ["ct_1001", "ct_1002", "ct_1003", "ct_1004"]
    for i in range(12):
        record = decode(records[records.record_number("ct_1002", i)])
        n = len(keypoints[i])
        np.testing.assert_array_equal(record["image"][..., 0], clipped[:, :, i])
        np.testing.assert_array_equal(record["label"][..., 0], volume.label[:, :, i])
        np.testing.assert_array_equal(record["keypoints"][:n], keypoints[i].positions)
        assert not record["keypoints"][n:].any()
        assert record["num_keypoints"] == n > 0
        before = -np.ones(64)
        if i > 0:
            before[:n] = sift.correspondences(keypoints[i], keypoints[i - 1], radius=20)
        np.testing.assert_array_equal(record["correspondences"][0], before)
        assert record["correspondences"].shape == (2, 64)
        assert (record["slice_index"], record["num_slices"]) == (i, 12)
        assert (record["volume_id"], record["has_label"]) == (b"ct_1002", True)
        np.testing.assert_allclose(record["mean"], clipped.mean(), rtol=1e-6)
        np.testing.assert_allclose(record["std"], clipped.std(), rtol=1e-6)
        np.testing.assert_allclose(record["spacing"], (4.125, 4.125, 13), rtol=1e-6)


def test_correspondences_are_found_and_agree_in_both_directions(phantom_dataset):
    records, decode = RecordReader(phantom_dataset), load_decoder(phantom_dataset)
    slices = [decode(records[i]) for i in records.splits["ct_1001"]]
    num_matches = 0
    for this, following in itertools.pairwise(slices):
        forward, backward = this["correspondences"][1], following["correspondences"][0]
        matched = np.flatnonzero(forward >= 0)
        np.testing.assert_array_equal(backward[forward[matched]], matched)
        assert (backward >= 0).sum() == len(matched)
        num_matches += len(matched)
    assert num_matches > 50
    assert (slices[0]["correspondences"][0] == -1).all()
    assert (slices[-1]["correspondences"][1] == -1).all()


_READ_WITHOUT_TENSORFLOW = """
import sys
from importlib.machinery import PathFinder

find = PathFinder.find_spec  # as if TensorFlow were not installed
PathFinder.find_spec = lambda name, *a: None if name.startswith("tensorflow.") or (
    name == "tensorflow") else find(name, *a)
import numpy as np, tensorflow_datasets as tfds
from kafjax.data.records import RecordReader
directory, out = sys.argv[1:]
builder = tfds.builder_from_directory(directory)
records = RecordReader(directory)
decoded = [builder.info.features.deserialize_example_np(records[i]) for i in range(3)]
np.savez(out, **{f"{i}/{k}": v for i, record in enumerate(decoded) for k, v in record.items()})
try:
    import tensorflow
except ModuleNotFoundError:
    sys.exit(0)
sys.exit("TensorFlow was there")
"""

_READ_WITH_TENSORFLOW = """
import sys, numpy as np, tensorflow_datasets as tfds
directory, out = sys.argv[1:]
dataset = tfds.builder_from_directory(directory).as_dataset(split="ct_1001[:3]")
np.savez(out, **{
    f"{i}/{k}": v for i, record in enumerate(dataset.as_numpy_iterator()) for k, v in record.items()
})
"""


def read_in_subprocess(script, dataset, out):
    subprocess.run([sys.executable, "-c", script, dataset, out], check=True, cwd=ROOT)
    with np.load(out) as arrays:
        return dict(arrays)


def test_records_decode_where_tensorflow_cannot_be_imported(phantom_dataset, tmp_path):
    found = read_in_subprocess(_READ_WITHOUT_TENSORFLOW, phantom_dataset, tmp_path / "a.npz")
    decode, records = load_decoder(phantom_dataset), RecordReader(phantom_dataset)
    for i in range(3):
        for name, value in decode(records[i]).items():
            np.testing.assert_array_equal(found[f"{i}/{name}"], value)


def test_tensorflow_reads_the_same_values(phantom_dataset, tmp_path):
    pytest.importorskip("tensorflow")
    found = read_in_subprocess(_READ_WITH_TENSORFLOW, phantom_dataset, tmp_path / "a.npz")
    decode, records = load_decoder(phantom_dataset), RecordReader(phantom_dataset)
    for i in range(3):
        for name, value in decode(records[i]).items():
            np.testing.assert_array_equal(found[f"{i}/{name}"], value)


def test_tfds_opens_the_dataset_and_its_metadata(phantom_raw, phantom_dataset):
    info = tfds.builder_from_directory(phantom_dataset).info
    assert (info.name, str(info.version)) == ("phantom", phantom_dataset.name)
    assert {name: split.num_examples for name, split in info.splits.items()} == {
        f"ct_{n}": 12 for n in range(1001, 1005)
    }
    metadata = dict(info.metadata)
    expected = {"kind": "chd", "max_keypoints": 64, "reach": 1, "radius": 20, "seed": 0}
    assert {key: metadata[key] for key in expected} == expected
    assert metadata["keypoint_selection"] == "random"
    assert metadata["classes"] == list(CHD.classes)
    assert metadata["libraries"].keys() >= {"opencv", "numpy", "nibabel"}
    volume = metadata["volumes"]["ct_1001"]
    assert (volume["num_slices"], volume["size"], volume["labelled"]) == (12, [64, 64], True)
    label = phantom_raw / "ct_1001_label.nii.gz"
    assert volume["sources"]["ct_1001_label.nii.gz"] == prepare.sha256_of(label)
    names = {path.name for path in phantom_dataset.iterdir()}
    assert {"dataset_info.json", "features.json", "metadata.json", "record_index.json"} < names
    beside = {".1.0.0.volumes.json", "1.0.0"}
    assert {p.name for p in phantom_dataset.parent.iterdir()} == beside


class UnlabelledReader(ChdReader):
    """CHD without labels, and with one volume of another type."""

    def find(self, raw_dir):
        sources, faults = super().find(raw_dir)
        return [Source(source.id, source.image) for source in sources], faults

    def read(self, source):
        volume = super().read(source)
        wider = volume.image.astype(np.int32) if source.id == "ct_1002" else volume.image
        return dataclasses.replace(volume, image=wider)


def test_volumes_without_labels_and_of_several_types(phantom_raw, tmp_path):
    directory = prepared(phantom_raw, tmp_path, reader=UnlabelledReader()).directory
    records, decode = RecordReader(directory), load_decoder(directory)
    for volume in ("ct_1001", "ct_1002"):
        record = decode(records[records.record_number(volume, 6)])
        assert not record["has_label"]
        assert record["label"].shape == (64, 64, 1)
        assert not record["label"].any()
        assert record["image"].dtype == np.int32
    assert not json.loads((directory / "metadata.json").read_text())["volumes"]["ct_1001"][
        "labelled"
    ]


class FarReader(ChdReader):
    """A reach of two slices in the first volume, of one in the others."""

    def reach(self, num_slices):
        return 2 if num_slices == 12 else 1


def test_offsets_beyond_a_volumes_own_reach_are_empty(phantom_raw, tmp_path):
    import nibabel as nib

    raw_dir = tmp_path / "raw"
    shutil.copytree(phantom_raw, raw_dir)
    for kind in ("image", "label"):
        path = raw_dir / f"ct_1002_{kind}.nii.gz"
        nib.save(nib.load(path).slicer[:, :, 2:10], path)
    directory = prepared(raw_dir, tmp_path / "data", reader=FarReader()).directory
    records, decode = RecordReader(directory), load_decoder(directory)
    far, near = (
        decode(records[records.record_number(name, 5)])["correspondences"] >= 0
        for name in ("ct_1001", "ct_1002")
    )
    assert far.any(1).tolist() == [True] * 4
    assert near.any(1).tolist() == [False, True, True, False]


# The same bytes, always.


def test_any_number_of_workers_writes_the_same_bytes(phantom_raw, phantom_dataset, tmp_path):
    summary = prepared(phantom_raw, tmp_path, num_workers=2)
    assert contents(summary.directory) == contents(phantom_dataset)
    assert (summary.num_volumes, summary.num_slices) == (4, 48)
    assert len(summary.keypoints_found) == 48


def children_of(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end
        time.sleep(0.001)
    return result


def test_a_killed_run_is_finished_with_the_same_bytes(phantom_raw, phantom_dataset, tmp_path):
    command = "-m data_prep.main --dataset chd --max_keypoints 64 --num_workers 1 --raw_dir "
    arguments = [*command.split(), phantom_raw, "--data_dir", tmp_path]
    notes = tmp_path / "chd" / ".1.0.0.preparing" / "volumes"
    run = subprocess.Popen([sys.executable, *arguments], cwd=ROOT)
    wait_for(lambda: list(notes.glob("ct_*.json")))
    workers = children_of(run.pid)
    run.kill()
    run.wait()
    wait_for(lambda: not any(map(is_running, workers)))
    finished = {path.name: path.stat().st_mtime_ns for path in notes.glob("ct_*.json")}
    assert 1 <= len(finished) < 4
    assert not (tmp_path / "chd" / "1.0.0").exists()
    with pytest.raises(ValueError, match="no prepared dataset"):
        RecordReader(tmp_path / "chd" / "1.0.0")

    shards = notes.parent / "dataset"
    times = {name: (shards / f"chd-{name[:7]}.tfrecord-00000-of-00001").stat() for name in finished}
    prepare_dataset(CHD, phantom_raw, tmp_path, name="chd", options=OPTIONS, num_workers=0)
    after = contents(tmp_path / "chd" / "1.0.0")
    for name, stat in times.items():
        path = tmp_path / "chd" / "1.0.0" / f"chd-{name[:7]}.tfrecord-00000-of-00001"
        assert path.stat().st_mtime_ns == stat.st_mtime_ns  # not made again
    for name, content in contents(phantom_dataset).items():
        if "tfrecord" in name:
            assert after[name.replace("phantom", "chd")] == content
    assert not notes.parent.exists()


def fail_once(monkeypatch, module, name):
    """Makes a function fail as if the process were stopped there, once."""

    def stop(*_, **__):
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(module, name, stop)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (builder, "write_index"),
        (prepare, "sync_tree"),
        (builder, "_slice_keypoints"),
        (prepare, "write_text"),
    ],
)
def test_a_run_stopped_anywhere_is_finished(
    phantom_raw, phantom_dataset, tmp_path, monkeypatch, module, name
):
    fail_once(monkeypatch, module, name)
    with pytest.raises(KeyboardInterrupt):
        prepared(phantom_raw, tmp_path)
    assert not (tmp_path / "phantom" / "1.0.0").exists()
    assert contents(prepared(phantom_raw, tmp_path).directory) == contents(phantom_dataset)


def test_unfinished_work_of_other_options_is_made_again(
    phantom_raw, phantom_dataset, tmp_path, monkeypatch
):
    fail_once(monkeypatch, builder, "write_index")
    with pytest.raises(KeyboardInterrupt):
        prepared(phantom_raw, tmp_path, options=Options(max_keypoints=9, seed=5))
    assert contents(prepared(phantom_raw, tmp_path).directory) == contents(phantom_dataset)


def test_a_damaged_unfinished_shard_is_made_again(
    phantom_raw, phantom_dataset, tmp_path, monkeypatch
):
    fail_once(monkeypatch, builder, "write_index")
    with pytest.raises(KeyboardInterrupt):
        prepared(phantom_raw, tmp_path)
    shards = tmp_path / "phantom" / ".1.0.0.preparing" / "dataset"
    shard = shards / "phantom-ct_1003.tfrecord-00000-of-00001"
    shard.write_bytes(shard.read_bytes()[:-1])
    (shards / "phantom-ct_9999.tfrecord-00000-of-00001").write_bytes(b"of a volume now gone")
    assert contents(prepared(phantom_raw, tmp_path).directory) == contents(phantom_dataset)


def test_an_empty_version_folder_is_not_taken_for_a_dataset(phantom_raw, phantom_dataset, tmp_path):
    (tmp_path / "phantom" / "1.0.0").mkdir(parents=True)
    assert contents(prepared(phantom_raw, tmp_path).directory) == contents(phantom_dataset)


# A dataset that is there already.


@pytest.fixture
def existing(phantom_raw, phantom_dataset, tmp_path):
    """A raw folder and a data folder with its dataset, to be spoilt."""
    shutil.copytree(phantom_raw, tmp_path / "raw")
    shutil.copytree(phantom_dataset, tmp_path / "data" / "phantom" / "1.0.0")
    return tmp_path / "raw", tmp_path / "data"


def test_a_finished_dataset_is_left_as_it_is(existing, phantom_dataset):
    raw_dir, data_dir = existing
    summary = prepared(raw_dir, data_dir)
    assert summary.already_prepared
    assert (summary.num_volumes, summary.num_slices) == (4, 48)
    assert contents(summary.directory) == contents(phantom_dataset)


def test_all_differences_are_listed_and_overwriting_must_be_asked(existing):
    raw_dir, data_dir = existing
    for kind in ("image", "label"):
        (raw_dir / f"ct_1003_{kind}.nii.gz").unlink()
        shutil.copy(raw_dir / f"ct_1002_{kind}.nii.gz", raw_dir / f"ct_1100_{kind}.nii.gz")
        (raw_dir / f"ct_1002_{kind}.nii.gz").unlink()
    shutil.copy(raw_dir / "ct_1001_label.nii.gz", raw_dir / "ct_1004_label.nii.gz")
    options = Options(max_keypoints=32, seed=1)
    with pytest.raises(ValueError, match="--overwrite") as error:
        prepared(raw_dir, data_dir, options=options)
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        "max_keypoints: 64 there, 32 asked for",
        "seed: 0 there, 1 asked for",
        "ct_1002: its files are missing from the raw folder",
        "ct_1003: its files are missing from the raw folder",
        "ct_1004: its files have changed",
        "ct_1100: its files are new",
    ]
    summary = prepared(raw_dir, data_dir, options=options, overwrite=True)
    assert list(RecordReader(summary.directory).splits) == ["ct_1001", "ct_1004", "ct_1100"]


def test_a_damaged_dataset_is_not_taken_for_done(existing, phantom_dataset):
    raw_dir, data_dir = existing
    shard = next((data_dir / "phantom" / "1.0.0").glob("*ct_1002.tfrecord*"))
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(ValueError, match="not a finished kafjax dataset"):
        prepared(raw_dir, data_dir)
    prepared(raw_dir, data_dir, overwrite=True)
    assert contents(data_dir / "phantom" / "1.0.0") == contents(phantom_dataset)


# What stops a preparation.


def test_all_faults_of_a_dataset_are_reported_in_one_pass(existing):
    raw_dir, data_dir = existing
    shutil.rmtree(data_dir)
    (raw_dir / "ct_1001_label.nii.gz").unlink()
    for kind in ("image", "label"):
        shutil.copy(raw_dir / f"ct_1002_{kind}.nii.gz", raw_dir / f"ct_1010_{kind}.nii.gz")
    truncated = raw_dir / "ct_1003_image.nii.gz"
    truncated.write_bytes(truncated.read_bytes()[:-20])
    shutil.copy(truncated, raw_dir / "notes.nii.gz")
    with pytest.raises(DatasetError) as error:
        prepared(raw_dir, data_dir)
    assert [fault.path.name for fault in error.value.faults] == [
        "ct_1001_image.nii.gz",
        "ct_1003_image.nii.gz",
        "ct_1010_image.nii.gz",
        "notes.nii.gz",
    ]
    assert not data_dir.exists()


class DeadlyReader(ChdReader):
    """Kills its process at the second look at one volume: in preparation, not in the check."""

    def __init__(self, folder):
        self.folder = folder

    def prepare(self, volume):
        seen = self.folder / volume.id
        if volume.id == "ct_1002" and seen.exists():
            os.kill(os.getpid(), signal.SIGKILL)
        seen.touch()
        return super().prepare(volume)


def test_a_dead_worker_is_reported_with_its_volume(phantom_raw, phantom_dataset, tmp_path):
    (tmp_path / "seen").mkdir()
    with pytest.raises(PreparationError, match=r"ct_1002_image\.nii\.gz: .*memory"):
        prepared(phantom_raw, tmp_path, reader=DeadlyReader(tmp_path / "seen"), num_workers=1)
    notes = tmp_path / "phantom" / ".1.0.0.preparing" / "volumes"
    assert sorted(path.stem for path in notes.iterdir()) == ["ct_1001", "ct_1003", "ct_1004"]
    assert contents(prepared(phantom_raw, tmp_path).directory) == contents(phantom_dataset)


class ChangingReader(ChdReader):
    """Finds a file changed when it is read for the second time."""

    def read(self, source):
        volume = super().read(source)
        path = source.label
        path.write_bytes(path.read_bytes() + bytes(8))  # gzip allows zeros at the end
        return volume


def test_a_file_that_changes_meanwhile_is_a_fault(existing, tmp_path):
    with pytest.raises(DatasetError, match=r"ct_1001_image\.nii\.gz: changed while"):
        prepared(existing[0], tmp_path / "new", reader=ChangingReader())


def test_two_processes_do_not_prepare_the_same_dataset(phantom_raw, tmp_path):
    with (
        prepare._lock(tmp_path / "phantom" / ".1.0.0.preparing"),
        pytest.raises(ValueError, match="another process"),
    ):
        prepared(phantom_raw, tmp_path)
    prepared(phantom_raw, tmp_path)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"max_keypoints": 0}, "max_keypoints is 0; expected 1 to 32767"),
        ({"max_keypoints": 32768}, "max_keypoints is 32768"),
        ({"keypoint_selection": "best"}, "keypoint_selection is 'best'"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_impossible_options_are_refused(change, found):
    with pytest.raises(ValueError, match=found):
        Options(**change)
