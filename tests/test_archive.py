"""Thousands of volumes: costs that grow with their number, and no faster."""

import argparse
import os
import statistics
import time

import pytest

from benchmarks import archive
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


def test_rates_are_of_thousands_or_tenths() -> None:
    assert archive.rates([1.0] * 100, 10_000) == [100.0] * 10
    assert archive.rates([0.5] * 4 + [1.0] * 2, 600) == [200.0] * 4 + [100.0] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "total",
    [
        500,
        pytest.param(
            10_000,
            marks=pytest.mark.skipif(
                "KAFJAX_CLUSTER" not in os.environ, reason="takes 20 minutes: make test-cluster"
            ),
        ),
    ],
)
def test_an_archive_is_prepared_opened_and_extended(total: int) -> None:
    arguments = argparse.Namespace(num_volumes=total, num_added=100, num_workers=2)
    numbers = archive.measure(arguments).numbers
    assert numbers["prepare"]["volumes"] == [total, total]
    assert numbers["prepare_again"]["volumes"] == [100, 100]
    for seconds in numbers["prepare"]["passes"]:
        rates = archive.rates(seconds, total)
        # Other work on the machine comes and goes.
        assert statistics.median(rates[-4:]) > 0.5 * statistics.median(rates[:4])
    assert numbers["open_dataset"]["records"] == total * archive.NUM_SLICES
    limits = {"open_dataset": 5, "first_batch": 10}  # on a machine with nothing else to do
    assert all(numbers[part]["seconds"] < limit for part, limit in limits.items())
    assert all(part["peak"] < 500e6 for part in numbers.values())
    assert all(numbers[part]["largest_worker"] < 300e6 for part in ("prepare", "check"))
