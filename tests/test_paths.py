"""Paths as users give them, and as libraries take them."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from kafjax import paths
from kafjax.errors import UserError
from kafjax.paths import expand, plain, split_list
from tests.campaigns.paths import NAMES
from tests.runs import ROOT


def test_a_tilde_is_the_users_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand("~/runs/a") == tmp_path / "runs" / "a"
    for other in ("a/~", "a~", Path("a")):
        assert expand(other) == Path(other)
    assert expand("./~/a") == expand(expand("./~/a")) == Path.cwd() / "~" / "a"


@pytest.mark.parametrize(
    ("path", "words"),
    [("~nobody-of-that-name/x", "home is not known"), ("https://bucket/run", "not a bucket's")],
)
def test_a_path_that_cannot_be_is_named(path: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        expand(path)
    assert path in str(caught.value)


def test_a_comma_of_an_existing_folder_belongs_to_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "lr=0.1,bs=4", "a,b,c"):
        Path(name).mkdir()
    assert split_list("a,b") == ["a", "b"]
    assert split_list("lr=0.1,bs=4") == ["lr=0.1,bs=4"]
    assert split_list("a,lr=0.1,bs=4,b") == ["a", "lr=0.1,bs=4", "b"]
    assert split_list("a,b,c") == ["a,b,c"]
    assert split_list("lr=0.2,bs=4") == ["lr=0.2,bs=4"]  # which is then named as not there
    assert split_list("a,lr=0.2,bs=4") == ["a", "lr=0.2,bs=4"]


def test_a_plain_path_is_itself(tmp_path: Path) -> None:
    for name in ("a", "Änderung", "日本", "a b.c,d=e+f@g%h-i"):
        assert plain(tmp_path / name) == tmp_path / name


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_any_folder_has_a_path_that_is_plain(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name / "run"
    link = plain(folder)  # before it is there
    assert paths._is_plain(str(link))
    folder.mkdir(parents=True)
    (link / "file").write_text("text")
    assert (folder / "file").read_text() == "text"
    assert plain(folder) == link
    assert plain(os.path.relpath(folder)) == link


def test_the_links_go_when_the_process_ends() -> None:
    code = "from kafjax.paths import plain; print(plain('/[none]/a'))"
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not Path(child.stdout.strip()).parent.exists()


def test_a_folder_of_temporary_files_of_an_odd_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / "[tmp]"
    odd.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(odd))
    monkeypatch.setattr(paths, "_folders", {})
    with pytest.raises(UserError, match=r"\[tmp\]; expected .* set TMPDIR"):
        plain(tmp_path / "[x]")
