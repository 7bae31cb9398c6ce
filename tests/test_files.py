"""A file is what it was until its successor is whole."""

from pathlib import Path

import pytest

from kafjax.files import replacing, write_text


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
