"""Folds and choices of labelled subjects: scikit-learn, Python's random, and golden values."""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sklearn.model_selection import KFold

from kafjax.data.splits import (
    Split,
    choose_labeled,
    equal_images_across,
    folds,
    group_subjects,
    read_splits_file,
    split_by_names,
    split_volumes,
    subject_of,
    unlabelled_volumes,
)
from kafjax.workdir.split import RunSplit, check_split
from kafjax.workdir.workdir import Workdir

GOLDEN = json.loads((Path(__file__).parent / "golden" / "splits.json").read_text())


@pytest.mark.parametrize(("count", "num_folds"), [(5, 5), (68, 5), (100, 5), (23, 4), (2, 2)])
def test_folds_are_those_of_scikit_learn(count: int, num_folds: int) -> None:
    subjects = [1000 + 3 * i for i in range(count)]
    found = folds(subjects, num_folds=num_folds)
    expected = KFold(num_folds, shuffle=True, random_state=12345).split(subjects)
    assert found == [
        ([subjects[i] for i in train], [subjects[i] for i in validation])
        for train, validation in expected
    ]


@pytest.mark.parametrize("fold", range(5))
def test_acdc_is_split_as_the_release_does(fold: int) -> None:
    golden = GOLDEN["acdc"][f"fold_{fold}"]
    frames = {
        n: (f"patient{n:03}_frame01", f"patient{n:03}_frame{9 + n % 5:02}") for n in range(1, 101)
    }
    volumes = [frame for pair in frames.values() for frame in pair]
    random.Random(0).shuffle(volumes)

    def frames_of(numbers: list[int]) -> tuple[str, ...]:
        return tuple(frame for number in numbers for frame in frames[number])

    for name, numbers in golden.items():
        if name == "validation":
            continue
        split = split_volumes(volumes, fold=fold, num_labeled=int(name.removeprefix("train_M")))
        assert split.train == frames_of(numbers), name
        assert split.validation == frames_of(golden["validation"])


def test_chd_subjects_are_volumes_in_order_of_number() -> None:
    numbers = [1001, 1002, 1010, 1003, 1128, 1050, 1099, 998]
    split = split_volumes([f"ct_{n}" for n in numbers], fold=1, num_labeled=3)
    ordered = sorted(numbers)
    train, validation = list(KFold(5, shuffle=True, random_state=12345).split(ordered))[1]
    random.seed(1234)
    chosen = random.sample([ordered[i] for i in train], k=3)
    assert split.train == tuple(f"ct_{n}" for n in chosen)
    assert split.validation == tuple(f"ct_{ordered[i]}" for i in validation)


def test_every_volume_is_validated_once_and_never_trained_on_there() -> None:
    volumes = [f"case{name}_frame{i}" for name in "abcdefg" for i in range(3)]
    splits = [split_volumes(volumes, fold=fold, num_labeled=None) for fold in range(5)]
    assert sorted(v for split in splits for v in split.validation) == sorted(volumes)
    for split in splits:
        assert set(split.train) | set(split.validation) == set(volumes)
        assert not {*map(subject_of, split.train)} & {*map(subject_of, split.validation)}


@pytest.mark.parametrize(
    ("volume", "subject"),
    [
        ("patient001_frame12", "patient001"),
        ("a_frame1_frame2", "a"),
        ("p1_frame01_ed", "p1"),
        ("case_frameless_3", "case_frameless_3"),
        ("case_frame", "case_frame"),
        ("case_frame_1", "case_frame_1"),
        ("_frame1", "_frame1"),
        ("ct_1001", "ct_1001"),
    ],
)
def test_a_subject_ends_at_frame_and_a_number(volume: str, subject: str) -> None:
    assert subject_of(volume) == subject


def test_equal_images_join_subjects_by_way_of_others_too() -> None:
    volumes = ["p1_frame1", "p1_frame2", "p2_frame1", "p3_frame1", "p4", "p5"]
    equal = [
        ["p2_frame1", "p1_frame2"],
        ["p3_frame1", "unlabelled_0"],
        ["unlabelled_0", "p2_frame2"],
    ]
    found = group_subjects(volumes, equal)
    assert found == dict(zip(volumes, ["p1", "p1", "p1", "p1", "p4", "p5"], strict=True))
    assert group_subjects(volumes)["p3_frame1"] == "p3"


def test_equal_images_stay_on_one_side_and_only_where_they_are_given() -> None:
    volumes = [f"case_{i}" for i in range(12)]
    equal = [["case_2", "case_9"], ["case_4", "case_5", "case_11"]]
    crossed = 0
    for fold in range(5):
        split = split_volumes(
            volumes, fold=fold, num_labeled=None, subject=group_subjects(volumes, equal)
        )
        assert sorted((*split.train, *split.validation)) == sorted(volumes)
        assert equal_images_across(split, equal) == []
        crossed += len(
            equal_images_across(split_volumes(volumes, fold=fold, num_labeled=None), equal)
        )
    assert crossed > 0
    # M counts a group once.
    for num_labeled in range(1, 5):
        split = split_volumes(
            volumes, fold=0, num_labeled=num_labeled, subject=group_subjects(volumes, equal)
        )
        assert (
            len({group_subjects(volumes, equal)[volume] for volume in split.train}) == num_labeled
        )


def test_pairs_on_both_sides_are_found_in_the_papers_folds() -> None:
    volumes = [f"patient{n:03}_frame{f:02}" for n in range(1, 101) for f in (1, 12)]
    equal = [
        ["patient074_frame01", "patient076_frame01"],
        ["patient074_frame12", "patient076_frame12"],
    ]
    across = []
    for fold in range(5):
        split = split_volumes(volumes, fold=fold, num_labeled=None)
        numbers = {n for n in (74, 76) if f"patient{n:03}_frame01" in split.validation}
        pairs = equal_images_across(split, equal)
        assert len(pairs) == (2 if len(numbers) == 1 else 0)
        across += pairs
    assert {name[:10] for pair in across for name in pair} in (set(), {"patient074", "patient076"})
    by_hand = Split(("a", "b"), ("c", "d"))
    assert equal_images_across(by_hand, [["c", "a"], ["b", "d", "a"]]) == [
        ("a", "c"),
        ("a", "d"),
        ("b", "d"),
    ]


def test_impossible_splits_are_refused() -> None:
    volumes = [f"ct_{n}" for n in range(6)]
    with pytest.raises(ValueError, match="fold is 5; expected 0 to 4"):
        split_volumes(volumes, fold=5, num_labeled=None)
    with pytest.raises(ValueError, match="5 folds of 4 labelled subjects"):
        split_volumes(volumes[:4], fold=0, num_labeled=None)
    with pytest.raises(ValueError, match="num_labeled is 5; expected 1 to 4"):
        split_volumes(volumes, fold=0, num_labeled=5)
    with pytest.raises(ValueError, match="num_labeled is 0"):
        choose_labeled(volumes, 0)


VOLUMES = [f"p{n}_frame{f}" for n in range(1, 6) for f in (1, 2)]


def test_two_labelled_volumes_are_both_trained_on_without_validation() -> None:
    assert split_by_names(["b", "a"]) == Split(("a", "b"), ())
    with pytest.raises(ValueError, match=r"5 folds of 2 .*config\.data\.fold=None"):
        split_volumes(["a", "b"], fold=0, num_labeled=None)


def test_named_volumes_or_subjects_are_validated_on_and_their_subjects_not_trained_on() -> None:
    by_subject = split_by_names(VOLUMES, validation=["p4"])
    assert by_subject.validation == ("p4_frame1", "p4_frame2")
    assert by_subject.train == tuple(v for v in VOLUMES if "p4" not in v)
    by_volume = split_by_names(VOLUMES, validation=["p4_frame2"])
    assert by_volume == Split(by_subject.train, ("p4_frame2",))
    chosen = split_by_names(VOLUMES, validation=["p4"], num_labeled=2)
    assert {subject_of(v) for v in chosen.train} == set(choose_labeled(["p1", "p2", "p3", "p5"], 2))
    assert len(chosen.train) == 4


def test_names_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="validation: no labelled volume or subject p7, p9; there"):
        split_by_names(VOLUMES, validation=["p9", "p4", "p7"])
    with pytest.raises(ValueError, match="p1: on both sides"):
        split_by_names(VOLUMES, train=["p1_frame1", "p2"], validation=["p1_frame2"])
    with pytest.raises(ValueError, match="no labelled volume is left to train on"):
        split_by_names(VOLUMES[:2], validation=["p1"])
    # A table joins what names do not.
    table = {"p1_frame1": "one", "p2_frame1": "one"}
    subject = group_subjects(VOLUMES, table=table)
    with pytest.raises(ValueError, match="one: on both sides"):
        split_by_names(VOLUMES, train=["p1_frame1"], validation=["p2_frame1"], subject=subject)


def test_nnunets_splits_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "splits_final.json"
    sides = [{"train": ["a", "b"], "val": ["c"]}, {"train": ["c"], "val": ["a", "b"]}]
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(sides).encode())  # with a byte order mark
    assert read_splits_file(path, 1) == (["c"], ["a", "b"])
    with pytest.raises(ValueError, match=r"config\.data\.fold is 2, expected 0 to 1"):
        read_splits_file(path, 2)
    for text in ("{", "{}", '[{"train": []}]', "[7]"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"splits_file is .*expected nnU-Net's splits_final"):
            read_splits_file(path, 0)


def test_unlabelled_volumes_are_all_others_of_subjects_that_are_not_held_out() -> None:
    volumes = ["p1_frame1", "p1_frame2", "p2_frame1", "p2_frame2", "p3", "p4", "p5", "t1"]
    split = Split(("p1_frame1",), ("p2_frame1",))
    subject = group_subjects(volumes, [["p3", "p2_frame2"], ["p4", "t1"]])
    found = unlabelled_volumes(volumes, split, apart=["t1"], subject=subject)
    # p3 is a scan of p2, which is validated on, and p4 one of the test set.
    assert found == ("p1_frame2", "p5")
    assert unlabelled_volumes(volumes, split, apart=[], subject=subject) == (
        *("p1_frame2", "p4", "p5", "t1"),
    )


def test_a_volume_used_without_labels_may_be_labelled_since() -> None:
    workdir, classes = Workdir("run"), ("background", "heart")
    split = RunSplit({}, classes, {"a": "1"}, {}, ("b",), {"b": "2"})

    def dataset(**contents: str) -> Any:
        return SimpleNamespace(classes=classes, contents=lambda: contents, directory="data")

    check_split(workdir, split, dataset(a="1", b="3"), training=False)
    with pytest.raises(ValueError, match=r"b \(unlabelled\): other content"):
        check_split(workdir, split, dataset(a="1", b="3"), training=True)
    for contents in ({"a": "3", "b": "2"}, {"a": "1"}):
        with pytest.raises(ValueError, match="is not the dataset"):
            check_split(workdir, split, dataset(**contents), training=False)
