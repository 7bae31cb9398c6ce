"""A file is what it was until its successor is whole."""

from pathlib import Path

import pytest

from kafjax.files import read_checked, read_text, replacing, write_checked, write_text


def test_text_takes_the_place_of_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text in ("first", "zweite ä\n"):
        write_text(path, text)
        assert path.read_bytes() == text.encode()
    assert list(tmp_path.iterdir()) == [path]


def test_text_that_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    write_text(path, "first")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "no UTF-8: \udcff")
    assert path.read_text() == "first"
    write_text(path, "no UTF-8: \udcff", errors="xmlcharrefreplace")
    assert path.read_text() == "no UTF-8: &#56575;"


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
