"""A file is what it was until its successor is whole."""

import os
import re
from pathlib import Path

import pytest

from kafjax.files import (
    read_checked,
    read_text,
    replacing,
    sync_tree,
    write_checked,
    write_text,
)
from tests.runs import ROOT


def test_text_takes_the_place_of_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text in ("first", "zweite ä\n"):
        write_text(path, text)
        assert path.read_bytes() == text.encode()
    assert list(tmp_path.iterdir()) == [path]


def test_text_with_a_name_that_is_not_utf8_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    write_text(path, "no UTF-8: \udcff")
    assert path.read_text() == r"no UTF-8: \udcff"
    write_text(path, "no UTF-8: \udcff", errors="xmlcharrefreplace")
    assert path.read_text() == "no UTF-8: &#56575;"
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "no UTF-8: \udcff", errors="strict")
    assert path.read_text() == "no UTF-8: &#56575;"
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_may_be_as_long_as_the_system_takes(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 127)
    write_text(path, "long")
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_names_the_file_that_was_to_be_written(tmp_path: Path) -> None:
    path = tmp_path / "none" / "a.json"
    with pytest.raises(FileNotFoundError, match=r"none/a\.json"):
        write_text(path, "")


def test_file_and_folder_are_on_the_disk_before_anything_counts_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, done = tmp_path / "a.json", []

    def fsync(descriptor: int) -> None:
        what = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        done.append((what == tmp_path, path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(path, "text")
    assert done == [(False, False), (True, True)]  # the file's content, then the folder's names


def test_all_of_a_folder_is_synchronised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_text("")
    done: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda d: done.append(os.readlink(f"/proc/self/fd/{d}")))
    sync_tree(tmp_path)
    assert done == [str(tmp_path / name) for name in ("a/b/file", "a/b", "a")] + [str(tmp_path)]


def test_nothing_else_writes_whole_files() -> None:
    """What appends to logs, or locks, is no whole file."""
    writing = re.compile(r"write_text\(|write_bytes\(|os\.replace\(|open\(.*[\"'][wx]|savefig\(")
    ours = (
        "replacing(",
        "write_text(",
        "partial.",
        "savefig(partial",
        "savefig(stream",
        '"lock").open("w")',
    )
    others = [
        f"{path}: {line}"
        for folder in ("kafjax", "data_prep")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line in path.read_text().splitlines()
        if writing.search(line) and path.name != "files.py"
        if not any(word in line.replace(".write_text(", ".written(") for word in ours)
    ]
    assert others == []


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with replacing(path) as first, replacing(path) as second:
        first.write_text("first")
        second.write_text("second")
        assert not path.exists()
    assert path.read_text() == "first"  # the last to end
    with pytest.raises(KeyError), replacing(path) as partial:
        partial.write_text("half")
        raise KeyError
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_text_of_any_system_reads_alike(encoding: str, end: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(f"ä: 1{end}b: 2".encode(encoding))
    assert read_text(path) == "ä: 1\nb: 2"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_checked_fields_of_any_system_are_the_same(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_checked(path, {"name": "ä", "n": [1, 2.5]})
    path.write_bytes(path.read_text().replace("\n", "\r\n").strip().encode(encoding))
    assert read_checked(path) == {"name": "ä", "n": [1, 2.5]}
