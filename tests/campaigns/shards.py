"""Damaged, missing and foreign TFRecord shards, indices and descriptions of a prepared dataset.

A dataset counts as accepted when every record of every volume was read. The records must then equal
the prepared ones.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kafjax.data.dataset import SliceDataset
from kafjax.data.records import INDEX_NAME, RecordError
from tests.campaigns import tiny
from tests.campaigns.campaign import Settings, Tally
from tests.campaigns.damage import DAMAGES, damage_file

USUAL = 100
_DESCRIPTIONS = ("metadata.json", "features.json", "dataset_info.json")

# What a dataset says of itself, and every value of every record.
_Content = tuple[dict[str, Any], list[bytes]]


def run(settings: Settings) -> Iterator[Tally]:
    """Everything that may happen to the files of a prepared dataset."""
    rng = settings.generator("shards")
    raw = tiny.make_phantoms(settings.folder("shards/raw"))
    good = tiny.make_dataset(raw, settings.folder("shards/data"))
    other = tiny.make_dataset(raw, settings.folder("shards/other"), seed=1, max_keypoints=24)
    again = tiny.make_dataset(raw, settings.folder("shards/again"), seed=1, max_keypoints=32)
    trial = _Trial(good, settings.scratch / "shards/trial")
    count = settings.tries(USUAL)
    yield _damaged_shards(trial, rng, count)
    yield _missing_shards(trial)
    yield _foreign_shards(trial, [other, again])
    yield _damaged_indices(trial, rng, count, [other, again])
    yield _damaged_descriptions(trial, rng, count)


class _Trial:
    """A fresh copy of the dataset for each try, and the verdict on what is read of it."""

    def __init__(self, good: Path, place: Path):
        self._good, self.place = good, place
        self._expected = _read_all(good)
        self.shards = sorted(path.name for path in good.glob("*.tfrecord*"))

    def begin(self, *, with_index: bool = True) -> Path:
        """A new copy, if wanted without its index."""
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self._good, self.place)
        if not with_index:
            (self.place / INDEX_NAME).unlink()
        return self.place

    def judge(self, tally: Tally, what: str, *names: str) -> None:
        """Reads all; an error must have all of `names` in its text."""
        try:
            found = _read_all(self.place)
        except RecordError as error:
            absent = [name for name in names if name not in str(error)]
            tally.expect(not absent, f"{what}: no {', '.join(absent)} in: {error}")
        except Exception as error:
            tally.add("unclear", f"{what}: {type(error).__name__}: {error}")
        else:
            tally.add("harmless" if found == self._expected else "silent", what)

    def judge_mended(self, tally: Tally, what: str) -> None:
        """Reads all, which must be right, and the index must be as it was."""
        try:
            right = _read_all(self.place) == self._expected
        except Exception as error:
            tally.add("unclear", f"{what}: {type(error).__name__}: {error}")
            return
        index, good = (folder / INDEX_NAME for folder in (self.place, self._good))
        if right and index.read_bytes() != good.read_bytes():
            tally.add("unclear", f"{what}: the index was not rebuilt")
        else:
            tally.expect(right, what, otherwise="silent")


def _read_all(directory: Path) -> _Content:
    dataset = SliceDataset(directory)
    values = []
    for record in range(len(dataset.reader)):
        found = dataset.read(record, with_label=True)
        assert found.label is not None
        arrays = (found.image, found.label, found.keypoints, found.mask, found.correspondences)
        numbers = (found.index, found.num_slices, *found.spacing)
        values.append(b"".join([a.tobytes() for a in arrays] + [str(numbers).encode()]))
    return dataset.metadata, values


def _damaged_shards(trial: _Trial, rng: np.random.Generator, count: int) -> Tally:
    tally = Tally("TFRecord shards: flips, cuts, blanks; with and without index")
    kinds = ["flip", "flip", "flip", *sorted(DAMAGES)]
    for i in range(count):
        name, kind = str(rng.choice(trial.shards)), kinds[i % len(kinds)]
        folder = trial.begin(with_index=i % 2 == 0)
        if not damage_file(folder / name, DAMAGES[kind], rng):
            tally.add("harmless")
            continue
        # A file of another length, or none, is noticed before any record.
        trial.judge(tally, f"{kind} of {name}, try {i}", name, *["record"] * (kind == "flip"))
    return tally


def _missing_shards(trial: _Trial) -> Tally:
    tally = Tally("a missing shard; with and without index")
    for name in trial.shards:
        for with_index in (True, False):
            (trial.begin(with_index=with_index) / name).unlink()
            trial.judge(tally, f"{name} missing", name)
    return tally


def _foreign_shards(trial: _Trial, others: list[Path]) -> Tally:
    tally = Tally("a shard of another dataset or volume; with and without index")
    first, second = trial.shards[:2]
    foreign = [(other / name, name) for other in others for name in trial.shards]
    foreign += [(trial.place / second, first), (trial.place / first, second)]
    for source, name in foreign:
        for with_index in (True, False):
            folder = trial.begin(with_index=with_index)
            shutil.copyfile(source, folder / name)
            trial.judge(tally, f"{source} as {name}, index {with_index}", name)
    return tally


def _damaged_indices(
    trial: _Trial, rng: np.random.Generator, count: int, others: list[Path]
) -> Tally:
    tally = Tally("a damaged, missing, stale or foreign index is rebuilt")
    kinds = ["flip", "flip", "flip", *sorted(DAMAGES)]
    for i in range(count):
        kind = kinds[i % len(kinds)]
        damage_file(trial.begin() / INDEX_NAME, DAMAGES[kind], rng)
        trial.judge_mended(tally, f"{kind} of the index, try {i}")
    trial.begin(with_index=False)
    trial.judge_mended(tally, "no index")
    for other in others:
        # Of other descriptions: whether index or description is the wrong one cannot be known.
        shutil.copyfile(other / INDEX_NAME, trial.begin() / INDEX_NAME)
        trial.judge(tally, f"the index of {other}", INDEX_NAME)
    return tally


def _damaged_descriptions(trial: _Trial, rng: np.random.Generator, count: int) -> Tally:
    tally = Tally("damaged metadata.json, features.json, dataset_info.json")
    kinds = ["flip", "flip", "flip", *sorted(DAMAGES)]
    for i in range(count):
        name, kind = _DESCRIPTIONS[i % len(_DESCRIPTIONS)], kinds[i // 3 % len(kinds)]
        damage_file(trial.begin() / name, DAMAGES[kind], rng)
        trial.judge(tally, f"{kind} of {name}, try {i}", str(trial.place))
    return tally
