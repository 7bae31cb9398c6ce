"""Batches: patches and keypoints against a coordinate image, order against counting."""

import itertools
import shutil
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from kafjax.data.batches import (
    BatchOptions,
    evaluation_batches,
    pretraining_batches,
    segmentation_batches,
    steps_per_epoch,
)
from kafjax.data.dataset import (
    Slice,
    check_facts,
    neighbour_reach,
    open_dataset,
    select_volumes,
)
from kafjax.data.records import RecordError
from kafjax.data.samples import draw_neighbour, make_labelled, make_pair


class CoordinateDataset:
    """Slices whose pixel (row, col) of slice i holds 1 + col + 100 row + 10000 i; label its % 8."""

    directory = Path("coordinates")

    def __init__(self, volumes=(5, 7), *, kind="chd", reach=2, size=(20, 30), k=16):
        starts = [0, *itertools.accumulate(volumes)]
        self.volumes = {
            f"ct_{1001 + v}": range(starts[v], starts[v + 1]) for v in range(len(volumes))
        }
        facts = {
            name: {"labelled": True, "reach": max(1, len(records) // 20)}
            for name, records in self.volumes.items()
        }
        self.metadata = {"kind": kind, "reach": reach, "max_keypoints": k, "volumes": facts}
        self.size, self.k = size, k

    def volume_of(self, record):
        return next(name for name, records in self.volumes.items() if record in records)

    def read(self, record, *, with_label=False):
        volume = next(r for r in self.volumes.values() if record in r)
        index, reach = record - volume.start, self.metadata["reach"]
        rng = np.random.default_rng(record)
        real = int(rng.integers(self.k // 2, self.k + 1))
        keypoints = np.zeros((self.k, 2), np.int32)
        keypoints[:real] = rng.integers(0, self.size, (real, 2))
        correspondences = np.full((2 * reach, self.k), -1, np.int16)
        for row, offset in enumerate([*range(-reach, 0), *range(1, reach + 1)]):
            if record + offset in volume:
                correspondences[row, :real] = rng.integers(-1, self.k // 2, real)
        rows, cols = np.indices(self.size)
        image = 1 + cols + 100 * rows + 10_000 * index
        return Slice(
            image=image[..., None].astype(np.float32),
            keypoints=keypoints,
            mask=np.arange(self.k) < real,
            correspondences=correspondences,
            index=index,
            num_slices=len(volume),
            spacing=np.ones(3, np.float32),
            label=(image % 8).astype(np.int32) if with_label else None,
        )

    def foreground(self, record):
        label = self.read(record, with_label=True).label
        return tuple(np.unique(label[label > 0]).tolist())


class SparseDataset(CoordinateDataset):
    """Class 3 at the pixel (2, 25) of every third slice, and class 1 in half of its image."""

    def read(self, record, *, with_label=False):
        whole = super().read(record, with_label=with_label)
        if with_label:
            whole.label[:] = 0
            if record % 3 == 0:
                whole.label[10:] = 1
                whole.label[2, 25] = 3
        return whole


def offset_row(reach, offset):
    return [*range(-reach, 0), *range(1, reach + 1)].index(offset)


def options(**changes):
    return BatchOptions(
        **{"batch_size": 4, "patch_size": (24, 24), "seed": 3, "num_threads": 2, **changes}
    )


def take(batches, count):
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        for field in batch:
            np.testing.assert_array_equal(batch[field], other[field])
            assert batch[field].dtype == other[field].dtype


def open_phantom(phantom_dataset):
    return open_dataset(phantom_dataset.parents[1], phantom_dataset.parent.name)


def test_opens_the_prepared_dataset(phantom_dataset):
    dataset = open_phantom(phantom_dataset)
    assert dataset.directory == phantom_dataset
    assert list(dataset.volumes) == sorted(dataset.volumes)
    assert len(dataset.volumes) == 4
    assert all(len(records) == 12 for records in dataset.volumes.values())
    assert dataset.metadata["max_keypoints"] == 64
    assert dataset.classes == tuple(dataset.metadata["classes"])


def test_a_record_is_described_by_volume_and_slice(phantom_dataset):
    dataset = open_phantom(phantom_dataset)
    assert dataset.describe_record(0) == f"{next(iter(dataset.volumes))} slice 0"
    assert dataset.describe_record(35) == f"{list(dataset.volumes)[2]} slice 11"


def test_a_missing_dataset_says_which_command_prepares_it(tmp_path):
    with pytest.raises(ValueError, match=r"kafjax prepare --dataset chd --raw_dir"):
        open_dataset(tmp_path, "chd")


def test_all_contradictions_of_config_and_dataset_are_listed(phantom_dataset):
    dataset = open_phantom(phantom_dataset)
    radius = dataset.metadata["radius"]
    check_facts(dataset, {"max_keypoints": 64, "radius": radius})
    with pytest.raises(ValueError) as error:
        check_facts(dataset, {"max_keypoints": 512, "radius": radius + 1, "nonsense": 1})
    assert str(error.value).splitlines()[1:] == [
        "  max_keypoints: the dataset has 64, the config says 512",
        f"  radius: the dataset has {radius}, the config says {radius + 1}",
        "  nonsense: the dataset has no such fact, the config says 1",
    ]


def test_a_slice_is_normalised_by_its_volume(phantom_dataset):
    dataset = open_phantom(phantom_dataset)
    builder = tfds.builder_from_directory(str(phantom_dataset))
    name = list(dataset.volumes)[1]
    for record, raw in zip(
        dataset.volumes[name], tfds.as_numpy(builder.as_dataset(split=name)), strict=True
    ):
        found = dataset.read(record, with_label=True)
        expected = (raw["image"].astype(np.float64) - raw["mean"]) / raw["std"]
        np.testing.assert_allclose(found.image, expected, rtol=1e-5, atol=1e-6)
        assert found.image.dtype == np.float32
        np.testing.assert_array_equal(found.label, raw["label"][..., 0])
        assert found.mask.sum() == raw["num_keypoints"]
        assert (found.index, found.num_slices) == (raw["slice_index"], 12)
        np.testing.assert_array_equal(found.spacing, raw["spacing"])


def test_batches_of_the_prepared_dataset_have_the_agreed_fields(phantom_dataset):
    dataset = open_phantom(phantom_dataset)
    (batch,) = take(pretraining_batches(dataset, options(patch_size=(64, 48))), 1)
    fields = {field: (value.dtype.name, value.shape) for field, value in batch.items()}
    assert fields == {
        "image": ("float32", (4, 2, 64, 48, 1)),
        "keypoints": ("int32", (4, 2, 64, 2)),
        "keypoint_mask": ("bool", (4, 2, 64)),
        "correspondence": ("int32", (4, 64)),
        "position": ("int32", (4, 2)),
        "record": ("int32", (4, 2)),
        "sample": ("uint32", (4,)),
        "seed": ("uint32", (4,)),
    }
    (batch,) = take(segmentation_batches(dataset, options(patch_size=(64, 48))), 1)
    fields = {field: (value.dtype.name, value.shape) for field, value in batch.items()}
    labelled = {
        "image": ("float32", (4, 64, 48, 1)),
        "keypoints": ("int32", (4, 64, 2)),
        "keypoint_mask": ("bool", (4, 64)),
        "label": ("int32", (4, 64, 48)),
        "record": ("int32", (4,)),
        "sample": ("uint32", (4,)),
        "seed": ("uint32", (4,)),
    }
    assert fields == labelled
    (batch,) = take(evaluation_batches(dataset, options(patch_size=(64, 48))), 1)
    fields = {field: (value.dtype.name, value.shape) for field, value in batch.items()}
    assert fields == {**labelled, "valid": ("bool", (4,))}


def test_reading_needs_no_tensorflow(phantom_dataset):
    code = f"""
import builtins, importlib.util, sys
find_spec, import_ = importlib.util.find_spec, builtins.__import__
def hidden(name, *rest):
    return None if name == "tensorflow" else find_spec(name, *rest)
def refused(name, *rest, **options):
    if name.partition(".")[0] == "tensorflow":
        raise ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")
    return import_(name, *rest, **options)
importlib.util.find_spec, builtins.__import__ = hidden, refused
from kafjax.data import *
dataset = open_dataset({str(phantom_dataset.parents[1])!r}, {phantom_dataset.parent.name!r})
options = BatchOptions(batch_size=2, patch_size=(64, 64), seed=0)
for make in (pretraining_batches, segmentation_batches, evaluation_batches):
    batches = make(dataset, options)
    assert next(batches)["image"].any()
    batches.close()
assert "tensorflow" not in sys.modules
print("read")
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    assert result.stdout == "read\n", result.stderr


def test_a_damaged_record_stops_the_batches_by_name(phantom_dataset, tmp_path):
    copy = Path(shutil.copytree(phantom_dataset, tmp_path / "phantom" / phantom_dataset.name))
    shard = max(copy.glob("*.tfrecord*"))
    content = bytearray(shard.read_bytes())
    content[-10] ^= 1
    shard.write_bytes(content)
    batches = evaluation_batches(open_phantom(copy), options(patch_size=(64, 64)))
    with pytest.raises(RecordError, match=f"{shard.name}, record 11: damaged"):
        list(batches)
    batches.close()


def test_volumes_are_checked_and_ordered():
    dataset = CoordinateDataset((3,) * 9)
    names = list(dataset.volumes)
    assert select_volumes(dataset) == tuple(names)
    assert select_volumes(dataset, names[:1:-1]) == tuple(names[2:])
    with pytest.raises(ValueError, match="no volume ct_1, ct_2; it has ct_1001"):
        select_volumes(dataset, ["ct_2", "ct_1001", "ct_1"])
    with pytest.raises(ValueError, match="named twice: ct_1001"):
        select_volumes(dataset, ["ct_1001", "ct_1001"])
    with pytest.raises(ValueError, match="no volume selected"):
        select_volumes(dataset, [])


def test_neighbour_reach_is_that_of_the_slices_volume():
    dataset = CoordinateDataset((19, 45, 3))
    for record, reach in ((0, 1), (18, 1), (19, 2), (63, 2), (64, 1)):
        assert neighbour_reach(dataset, record) == reach


@pytest.mark.parametrize("index", [0, 1, 5, 9])
def test_neighbours_are_uniform_without_the_slice_and_clamped(index):
    rng = np.random.default_rng(0)
    drawn = Counter(draw_neighbour(rng, index, 10, 3) for _ in range(6000))
    expected = Counter(min(max(index + o, 0), 9) for o in (-3, -2, -1, 1, 2, 3))
    assert drawn.keys() == expected.keys()
    for neighbour, ways in expected.items():
        assert abs(drawn[neighbour] - 1000 * ways) < 5 * np.sqrt(1000 * ways)


@pytest.mark.parametrize("patch_size", [(24, 24), (12, 40), (40, 48), (8, 8), (20, 30)])
def test_pairs_move_keypoints_with_pixels_and_keep_correspondences(patch_size):
    dataset = CoordinateDataset((5, 25))
    masked = 0
    for sample in range(30):
        pair = make_pair(dataset, sample, sample, patch_size=patch_size, seed=1)
        sources = [dataset.read(int(record)) for record in pair["record"]]
        for view, source in enumerate(sources):
            values, counts = np.unique(pair["image"][view], return_counts=True)
            assert (counts[values > 0] == 1).all()  # each pixel once: nothing but a shift
            for i in range(dataset.k):
                row, col = source.keypoints[i]
                there = np.argwhere(pair["image"][view, :, :, 0] == source.image[row, col, 0])
                assert pair["keypoint_mask"][view, i] == (source.mask[i] and len(there) == 1)
                masked += source.mask[i] and not len(there)
                expected = there[0] if pair["keypoint_mask"][view, i] else (0, 0)
                assert tuple(pair["keypoints"][view, i]) == tuple(expected)
        assert sources[0].num_slices == sources[1].num_slices
        offset = sources[1].index - sources[0].index
        assert abs(offset) <= 1
        for i in range(dataset.k):
            j = i if offset == 0 else sources[0].correspondences[offset_row(2, offset), i]
            kept = pair["keypoint_mask"][0, i] and j >= 0 and pair["keypoint_mask"][1, j]
            assert pair["correspondence"][i] == (j if kept else -1)
        assert pair["position"].tolist() == [sources[0].index + 1, sources[0].num_slices]
        assert pair["sample"] == sample
    assert (masked > 0) == (min(np.subtract(patch_size, dataset.size)) < 0)


def pixels_at(image, keypoints, mask):
    return image[tuple(keypoints[mask].T)][:, 0].tolist()


@pytest.mark.parametrize("places", [5, 16, 99])
def test_keypoints_outside_the_patch_take_no_places(places):
    dataset = CoordinateDataset((5, 25))
    full = 0
    for sample in range(30):
        at = {"sample": sample, "record": sample, "patch_size": (12, 16), "seed": 1}
        sparse, pair = (make_pair(dataset, **at, patch_keypoints=p) for p in (None, places))
        p = min(places, 16)
        assert pair["keypoints"].shape == (2, p, 2)
        assert pair["correspondence"].shape == (p,)
        np.testing.assert_array_equal(pair["image"], sparse["image"])
        np.testing.assert_array_equal(pair["record"], sparse["record"])
        matched = []
        for one in (sparse, pair):
            first, second = (one["image"][v][tuple(one["keypoints"][v].T)][:, 0] for v in range(2))
            linked = np.flatnonzero(one["correspondence"] >= 0)
            ends = one["correspondence"][linked]
            assert one["keypoint_mask"][0, linked].all()
            assert one["keypoint_mask"][1, ends].all()
            matched.append(Counter(zip(first[linked], second[ends], strict=True)))
        for view in range(2):
            count = int(pair["keypoint_mask"][view].sum())
            inside = int(sparse["keypoint_mask"][view].sum())
            assert count == min(inside, p)
            assert pair["keypoint_mask"][view, :count].all()  # real ones come first
            views = [
                (one["image"][view], one["keypoints"][view], one["keypoint_mask"][view])
                for one in (sparse, pair)
            ]
            kept, there = (Counter(pixels_at(*v)) for v in views[::-1])
            assert kept <= there
            full += inside > p
        if full == 0:
            assert matched[0] == matched[1]
        assert matched[1] <= matched[0]
    assert (full > 0) == (places == 5)


def test_patches_that_hold_slices_whole_keep_every_place():
    dataset = CoordinateDataset()
    for make in (make_pair, make_labelled):
        at = {"sample": 3, "record": 4, "patch_size": (24, 32), "seed": 1}
        assert_same([make(dataset, **at, patch_keypoints=16)], [make(dataset, **at)])


def test_labelled_slices_keep_the_strongest_keypoints_where_their_order_tells():
    dataset = CoordinateDataset(k=16)
    dataset.metadata["keypoint_order"] = "strength"
    for record in range(12):
        at = {"sample": 0, "record": record, "patch_size": (20, 30), "seed": None}
        found = make_labelled(dataset, **at, patch_keypoints=4)
        source = dataset.read(record)
        np.testing.assert_array_equal(found["keypoints"], source.keypoints[source.mask][-4:])


def test_a_slice_alone_in_its_volume_is_its_own_neighbour():
    dataset = CoordinateDataset((1,))
    pair = make_pair(dataset, 0, 0, patch_size=(20, 30), seed=0)
    assert list(pair["record"]) == [0, 0]
    np.testing.assert_array_equal(pair["image"][0], pair["image"][1])
    mask = pair["keypoint_mask"][0]
    assert mask.any()
    np.testing.assert_array_equal(pair["correspondence"], np.where(mask, np.arange(16), -1))


def test_sample_numbers_wrap_at_32_bits():
    pair = make_pair(CoordinateDataset(), 2**32 + 5, 0, patch_size=(20, 30), seed=0)
    assert pair["sample"] == 5
    other = make_pair(CoordinateDataset(), 5, 0, patch_size=(8, 8), seed=0)
    again = make_pair(CoordinateDataset(), 2**32 + 5, 0, patch_size=(8, 8), seed=0)
    assert not np.array_equal(other["image"], again["image"])


def test_labels_move_with_their_image():
    dataset = CoordinateDataset()
    for seed in (None, 4):
        found = make_labelled(dataset, 9, 6, patch_size=(10, 40), seed=seed)
        image = found["image"][..., 0].astype(np.int64)
        np.testing.assert_array_equal(found["label"], np.where(image > 0, image % 8, 0))
        assert image.any()


@pytest.mark.parametrize("make", [pretraining_batches, segmentation_batches])
def test_the_batches_do_not_depend_on_processes_or_threads(make):
    dataset = CoordinateDataset()
    expected = take(make(dataset, options()), 7)
    for threads in (0, 1, 8):
        assert_same(take(make(dataset, options(num_threads=threads)), 7), expected)
    for count in (2, 4):
        parts = [
            take(make(dataset, options(process_index=i, process_count=count)), 7)
            for i in range(count)
        ]
        joined = [
            {field: np.concatenate([part[field] for part in step]) for field in step[0]}
            for step in zip(*parts, strict=True)
        ]
        assert_same(joined, expected)


@pytest.mark.parametrize("make", [pretraining_batches, segmentation_batches])
def test_a_step_number_resumes_the_stream(make):
    dataset = CoordinateDataset()
    expected = take(make(dataset, options()), 9)
    assert_same(take(make(dataset, options(), start_step=5), 4), expected[5:])
    part = {"process_index": 1, "process_count": 2}
    whole = take(make(dataset, options(**part)), 9)
    assert_same(take(make(dataset, options(**part), start_step=7), 2), whole[7:])


def test_samples_are_numbered_through():
    batches = take(pretraining_batches(CoordinateDataset(), options(), start_step=10), 2)
    numbers = np.concatenate([batch["sample"] for batch in batches])
    np.testing.assert_array_equal(numbers, np.arange(40, 48))


def test_an_epoch_has_each_slice_once_as_anchor_with_fresh_neighbours_and_order():
    dataset = CoordinateDataset((8, 8))
    assert steps_per_epoch(dataset, 4) == 4
    batches = take(pretraining_batches(dataset, options()), 12)
    records = np.concatenate([batch["record"] for batch in batches]).reshape(3, 16, 2)
    for epoch in records:
        assert sorted(epoch[:, 0]) == list(range(16))
    assert len({tuple(epoch[:, 0]) for epoch in records}) == 3
    neighbours = [dict(epoch.tolist()) for epoch in records]
    assert neighbours[0] != neighbours[1] != neighbours[2]


def test_an_incomplete_batch_is_dropped_and_never_the_same_slices():
    dataset = CoordinateDataset((5, 6))
    assert steps_per_epoch(dataset, 4) == 2
    batches = take(segmentation_batches(dataset, options()), 40)
    records = np.concatenate([batch["record"] for batch in batches]).reshape(20, 8)
    assert all(len(set(epoch)) == 8 for epoch in records.tolist())
    assert set(records.ravel()) == set(range(11))


def test_seeds_give_unrelated_orders():
    dataset = CoordinateDataset((8, 8))
    first, second = (
        np.concatenate(
            [b["record"] for b in take(segmentation_batches(dataset, options(seed=seed)), 8)]
        ).reshape(2, 16)
        for seed in (3, 4)
    )
    # Were epoch e of seed s seeded with s + e, the second epoch of 3 would be the first of 4.
    assert not (first[1] == second[0]).all()
    assert not (first[0] == second[0]).all()


def test_batches_come_from_the_chosen_volumes():
    dataset = CoordinateDataset((5, 7, 6))
    chosen = ["ct_1003", "ct_1001"]
    assert steps_per_epoch(dataset, 4, chosen) == 2
    batches = take(pretraining_batches(dataset, options(), volumes=chosen), 20)
    anchors = {int(r) for batch in batches for r in batch["record"].ravel()}
    assert anchors == {*range(5), *range(12, 18)}


def test_batch_sizes_that_cannot_be_are_refused():
    dataset = CoordinateDataset((5, 7))
    with pytest.raises(ValueError, match="batch_size is 16; expected 1 to 12"):
        pretraining_batches(dataset, options(batch_size=16))
    with pytest.raises(ValueError, match="batch_size is 6; expected 1 to 5, the number of slices"):
        steps_per_epoch(dataset, 6, ["ct_1001"])
    with pytest.raises(ValueError, match="batch_size is 6; expected a positive multiple of the 4"):
        options(batch_size=6, process_count=4)


@pytest.mark.parametrize(("batch_size", "count"), [(4, 1), (4, 2), (12, 1), (16, 4), (5, 1)])
def test_evaluation_has_each_slice_once_in_order(batch_size, count):
    dataset = CoordinateDataset((5, 7))
    parts = [
        list(
            evaluation_batches(
                dataset, options(batch_size=batch_size, process_index=i, process_count=count)
            )
        )
        for i in range(count)
    ]
    assert {len(part) for part in parts} == {-(-12 // batch_size)}
    records, valid = (
        np.concatenate([batch[field] for step in zip(*parts, strict=True) for batch in step])
        for field in ("record", "valid")
    )
    assert list(records[valid]) == list(range(12))
    assert len(valid) % batch_size == 0
    assert list(valid) == [True] * 12 + [False] * (len(valid) - 12)
    assert (records[~valid] == -1).all()
    last = parts[-1][-1]
    assert not last["image"][~last["valid"]].any()
    assert not last["keypoint_mask"][~last["valid"]].any()


def test_evaluation_of_one_volume_crops_centrally():
    dataset = CoordinateDataset((5, 7))
    batches = list(evaluation_batches(dataset, options(patch_size=(10, 10)), volumes=["ct_1002"]))
    assert [b["valid"].sum() for b in batches] == [4, 3]
    image = np.concatenate([b["image"][b["valid"]] for b in batches])[..., 0]
    for record, found in zip(range(5, 12), image, strict=True):
        np.testing.assert_array_equal(found, dataset.read(record).image[5:15, 10:20, 0])


def test_volumes_without_labels_are_listed_before_any_is_read():
    dataset = CoordinateDataset((5, 7, 6))
    for name in ("ct_1001", "ct_1003"):
        dataset.metadata["volumes"][name]["labelled"] = False
    for make in (segmentation_batches, evaluation_batches):
        with pytest.raises(ValueError, match="no labels in the volumes ct_1001, ct_1003"):
            make(dataset, options())
        make(dataset, options(), volumes=["ct_1002"]).close()


def test_closing_ends_the_threads():
    before = set(threading.enumerate())
    batches = pretraining_batches(CoordinateDataset(), options(num_threads=3))
    next(batches)
    readers = set(threading.enumerate()) - before
    assert readers
    batches.close()
    for reader in readers:
        reader.join(timeout=10)
    assert not any(reader.is_alive() for reader in readers)
    with pytest.raises(ValueError, match="closed"):
        next(batches)


def test_the_last_places_of_a_batch_show_foreground_and_the_others_are_as_before():
    dataset = SparseDataset((5, 7))
    plain = take(segmentation_batches(dataset, options(patch_size=(8, 9))), 30)
    found = take(
        segmentation_batches(dataset, options(patch_size=(8, 9), foreground_share=0.5)), 30
    )
    assert_same(
        [{field: x[:2] for field, x in batch.items()} for batch in found],
        [{field: x[:2] for field, x in batch.items()} for batch in plain],
    )
    shown = np.concatenate([batch["label"][2:] for batch in found])
    assert (shown > 0).any(axis=(1, 2)).all()
    # Classes are drawn alike: some half of the slices were cut around the one pixel of class 3.
    assert 0.3 < np.mean((shown == 3).any(axis=(1, 2))) < 0.8
    records = np.concatenate([batch["record"][2:] for batch in found])
    assert set(records.tolist()) == {0, 3, 6, 9}
    own = np.concatenate([batch["record"][2:] for batch in plain])
    np.testing.assert_array_equal(records[own % 3 == 0], own[own % 3 == 0])
    for batch in found:
        for image, record in zip(batch["image"], batch["record"], strict=True):
            index = record if record < 5 else record - 5
            assert image.max() // 10_000 == index


def test_foreground_is_the_same_in_resumed_and_divided_runs():
    dataset = SparseDataset((5, 7))
    common = {"patch_size": (8, 9), "foreground_share": 0.3}
    whole = take(segmentation_batches(dataset, options(**common)), 6)
    assert_same(take(segmentation_batches(dataset, options(**common), start_step=4), 2), whole[4:])
    parts = [
        take(segmentation_batches(dataset, options(**common, process_index=i, process_count=2)), 6)
        for i in range(2)
    ]
    joined = [
        {field: np.concatenate([a[field], b[field]]) for field in a}
        for a, b in zip(*parts, strict=True)
    ]
    assert_same(joined, whole)


@pytest.mark.parametrize(
    ("share", "kept"), [(0.0, []), (0.01, [3]), (0.33, [3]), (0.5, [2, 3]), (1.0, [0, 1, 2, 3])]
)
def test_a_share_of_a_batch_is_kept_for_foreground(share, kept):
    needs = options(foreground_share=share).needs_foreground
    assert [place for place in range(4) if needs(8 + place)] == kept


def test_slices_stay_where_no_label_has_foreground():
    dataset = SparseDataset((1, 1))
    names = list(dataset.volumes)[1:]
    found = take(
        segmentation_batches(dataset, options(batch_size=1, foreground_share=1.0), volumes=names), 2
    )
    assert [batch["record"].tolist() for batch in found] == [[1], [1]]


def test_the_classes_of_a_prepared_label_are_read_once(phantom_dataset, monkeypatch):
    dataset = open_phantom(phantom_dataset)
    label = dataset.read(5, with_label=True).label
    expected = tuple(sorted(set(label.ravel().tolist()) - {0}))
    assert dataset.foreground(5) == expected != ()
    monkeypatch.setattr(dataset, "read", None)
    assert dataset.foreground(5) == expected
