"""Thousands of volumes: costs that grow with their number, and no faster."""

import time

from kafjax.data.splits import (
    Split,
    equal_images_across,
    group_subjects,
    split_by_names,
    split_volumes,
    unlabelled_volumes,
)


def test_ten_thousand_volumes_are_split_in_seconds() -> None:
    volumes = [f"case_{number:05d}" for number in range(10_000)]
    equal = [volumes[i : i + 2] for i in range(0, 10_000, 10)]
    begin = time.process_time()
    subject = group_subjects(volumes, equal)
    fold = split_volumes(volumes, fold=0, num_labeled=None, subject=subject)
    named = split_by_names(volumes, train=fold.train, validation=fold.validation, subject=subject)
    assert set(named.train) == set(fold.train) and set(named.validation) == set(fold.validation)
    half = Split(fold.train[:4000], fold.validation)
    others = unlabelled_volumes(volumes, half, apart=(), subject=subject)
    assert set(others) == set(fold.train[4000:])
    assert equal_images_across(fold, equal) == []
    apart = Split(tuple(volumes[1:]), ("case_00000",))
    assert equal_images_across(apart, equal) == [("case_00001", "case_00000")]
    assert time.process_time() - begin < 3
