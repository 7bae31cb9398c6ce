"""Volumes added to a dataset: only they are read, and the bytes are those of a fresh one."""

import filecmp
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from data_prep import earlier, prepare
from data_prep.builder import Options
from data_prep.folder import open_folder
from data_prep.volumes import Source
from kafjax.data import open_dataset
from kafjax.errors import UserError


@pytest.fixture(autouse=True)
def no_file_is_recent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(earlier, "_RECENT_SECONDS", 0.0)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    for number in range(3):
        write_volume(folder, f"case_{number}", seed=number)
    return folder


def write_volume(folder: Path, name: str, *, seed: int, num_slices: int = 4) -> None:
    values = np.random.default_rng(seed).integers(0, 1000, (24, 24, num_slices), np.int16)
    nib.save(nib.Nifti1Image(values, np.diag([1.0, 1.0, 3.0, 1.0])), folder / f"{name}.nii.gz")


def run(raw: Path, data: Path, **options: Any) -> prepare.Summary:
    reader = open_folder(raw, intensity="zscore")
    return prepare.prepare_dataset(
        reader,
        raw,
        data,
        name="own",
        options=Options(**{"max_keypoints": 16, **options}),
        num_workers=0,
        overwrite=True,
    )


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The volumes that were read since the last call, or whose files were hashed."""
    seen: list[str] = []
    inspect, write, digest = prepare.inspect, prepare.builder.write_shard, earlier.digest

    def inspected(reader: Any, source: Source) -> Any:
        seen.append(source.id)
        return inspect(reader, source)

    def written(plan: Any, source: Source, *more: Any) -> Any:
        seen.append(source.id)
        return write(plan, source, *more)

    def hashed(path: Path) -> str:
        seen.append(path.name.partition(".")[0])
        return digest(path)

    monkeypatch.setattr(prepare, "inspect", inspected)
    monkeypatch.setattr(prepare.builder, "write_shard", written)
    monkeypatch.setattr(earlier, "digest", hashed)

    def take() -> list[str]:
        names, seen[:] = sorted(set(seen)), []
        return names

    return take


def assert_same_dataset(first: Path, second: Path) -> None:
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert filecmp.cmpfiles(first, second, names, shallow=False) == (names, [], [])


def test_only_what_is_new_or_changed_is_read(
    raw: Path, tmp_path: Path, read: Callable[[], list[str]]
) -> None:
    run(raw, tmp_path / "data")
    assert read() == ["case_0", "case_1", "case_2"]
    assert run(raw, tmp_path / "data").already_prepared and read() == []
    write_volume(raw, "case_3", seed=3)
    write_volume(raw, "case_1", seed=11)
    (raw / "case_2.nii.gz").unlink()
    found = run(raw, tmp_path / "data")
    assert read() == ["case_1", "case_3"]
    assert (found.num_volumes, found.num_slices) == (3, 12)
    assert len(found.keypoints_found) == 12
    assert_same_dataset(found.directory, run(raw, tmp_path / "fresh").directory)
    assert list(open_dataset(tmp_path / "data", "own").volumes) == ["case_0", "case_1", "case_3"]


def test_a_longer_volume_changes_the_records_of_all(
    raw: Path, tmp_path: Path, read: Callable[[], list[str]]
) -> None:
    """Its neighbours reach farther, and a dataset's records have one reach."""
    run(raw, tmp_path / "data")
    write_volume(raw, "case_3", seed=3, num_slices=40)
    read()
    found = run(raw, tmp_path / "data")
    assert read() == ["case_0", "case_1", "case_2", "case_3"]
    assert_same_dataset(found.directory, run(raw, tmp_path / "fresh").directory)


def test_other_options_read_everything(
    raw: Path, tmp_path: Path, read: Callable[[], list[str]]
) -> None:
    run(raw, tmp_path / "data")
    read()
    found = run(raw, tmp_path / "data", max_keypoints=8)
    assert read() == ["case_0", "case_1", "case_2"]
    assert_same_dataset(found.directory, run(raw, tmp_path / "fresh", max_keypoints=8).directory)


def test_an_interrupted_addition_leaves_the_dataset_and_resumes(
    raw: Path, tmp_path: Path, read: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = run(raw, tmp_path / "data").directory
    write_volume(raw, "case_3", seed=3)
    read()
    sync_tree = prepare.sync_tree
    monkeypatch.setattr(prepare, "sync_tree", lambda _: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        run(raw, tmp_path / "data")
    assert len(open_dataset(tmp_path / "data", "own").volumes) == 3
    monkeypatch.setattr(prepare, "sync_tree", sync_tree)
    # Killed between the removal of the old dataset and the move of the new one.
    for path in place.iterdir():
        path.unlink()
    place.rmdir()
    read()
    run(raw, tmp_path / "data")
    assert read() == ["case_3"]
    assert_same_dataset(place, run(raw, tmp_path / "fresh").directory)


def damage(file: Path) -> None:
    file.write_text(file.read_text().replace("case_0", "case_9", 1))


@pytest.mark.parametrize("change", [damage, Path.unlink, lambda file: file.write_text("{")])
def test_a_damaged_record_of_the_preparation_is_not_believed(
    raw: Path, tmp_path: Path, read: Callable[[], list[str]], change: Callable[[Path], Any]
) -> None:
    run(raw, tmp_path / "data")
    change(tmp_path / "data" / "own" / ".1.0.0.volumes.json")
    write_volume(raw, "case_3", seed=3)
    read()
    run(raw, tmp_path / "data")
    assert len(read()) == 4


def test_a_damaged_shard_is_not_kept(
    raw: Path, tmp_path: Path, read: Callable[[], list[str]]
) -> None:
    place = run(raw, tmp_path / "data").directory
    shard = next(place.glob("*case_0*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    write_volume(raw, "case_3", seed=3)
    read()
    run(raw, tmp_path / "data")
    assert read() == ["case_0", "case_3"]
    assert_same_dataset(place, run(raw, tmp_path / "fresh").directory)


def test_without_hard_links_shards_are_copied(
    raw: Path, tmp_path: Path, read: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(raw, tmp_path / "data")
    write_volume(raw, "case_3", seed=3)
    read()

    def refuse(*_: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    found = run(raw, tmp_path / "data")
    assert read() == ["case_3"]
    assert_same_dataset(found.directory, run(raw, tmp_path / "fresh").directory)


def test_a_file_that_just_changed_has_no_stamp(
    raw: Path, tmp_path: Path, read: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(earlier, "_RECENT_SECONDS", 3600.0)
    run(raw, tmp_path / "data")
    write_volume(raw, "case_3", seed=3)
    read()
    run(raw, tmp_path / "data")
    assert len(read()) == 4


def test_an_addition_without_overwrite_is_refused(raw: Path, tmp_path: Path) -> None:
    run(raw, tmp_path / "data")
    write_volume(raw, "case_3", seed=3)
    with pytest.raises(UserError, match="case_3: its files are new"):
        prepare.prepare_dataset(
            open_folder(raw, intensity="zscore"),
            raw,
            tmp_path / "data",
            name="own",
            options=Options(max_keypoints=16),
            num_workers=0,
        )
