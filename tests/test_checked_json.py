"""JSON files with a checksum: what was changed is refused."""

import json

import pytest

from kafjax.files import read_checked, write_checked

FIELDS = {
    "name": "é",
    "sizes": (1, 2),
    "rate": 1e-4,
    "none": None,
    "by": {10: "x", 9: float("inf")},
}


def test_what_is_written_is_read(tmp_path):
    write_checked(tmp_path / "a.json", FIELDS)
    assert read_checked(tmp_path / "a.json") == json.loads(json.dumps(FIELDS))


def test_a_changed_value_is_refused_and_a_file_by_hand_is_not(tmp_path):
    path = tmp_path / "a.json"
    write_checked(path, FIELDS)
    path.write_text(path.read_text().replace("0.0001", "0.0003"))
    with pytest.raises(ValueError, match="changed since it was written: wrong checksum"):
        read_checked(path)
    path.write_text('{"rate": 0.0003}')
    assert read_checked(path) == {"rate": 0.0003}


@pytest.mark.parametrize("text", ["", "{", "7", "[]", '{"checksum": 3}'])
def test_what_is_not_fields_is_refused(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError):
        read_checked(tmp_path / "a.json")
