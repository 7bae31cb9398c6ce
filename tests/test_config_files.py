"""Config files by path and by name, from any folder; what is wrong with one is a line."""

from pathlib import Path

import pytest

from kafjax import config_files
from kafjax.config_files import TABLES, find, load_config, load_table, shipped_names
from tests.runs import ROOT

OWN = """\
import base
from kafjax.configs import phantom_finetune

def get_config(start="scratch"):
    config = phantom_finetune.get_config(start)
    config.batch_size = base.BATCH_SIZE
    return config
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the current one and the user's home."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def own(folder: Path) -> Path:
    """A user's config in another folder: it imports a shipped one and its own neighbour."""
    path = folder / "my study [1]" / "own.py"
    path.parent.mkdir()
    path.write_text(OWN)
    (path.parent / "base.py").write_text("BATCH_SIZE = 3\n")
    return path


def test_shipped_names_are_the_files_of_the_repository() -> None:
    for place, names in (("configs", shipped_names()), ("configs/tables", shipped_names(TABLES))):
        paths = {path.stem for path in (ROOT / place).glob("*.py")}
        assert set(names) == paths - {"__init__"}
    assert {"chd_pretrain", "phantom_small_finetune"} <= set(shipped_names())


@pytest.mark.parametrize(
    "text",
    ["chd_pretrain", "chd_pretrain.py", "configs/chd_pretrain.py", "./configs/chd_pretrain.py"],
)
def test_shipped_configs_are_found_from_any_folder(folder: Path, text: str) -> None:
    found = find(text)
    assert found.path.samefile(ROOT / "configs" / "chd_pretrain.py")
    assert (found.variant, found.name) == (None, "chd_pretrain")
    assert load_config(text).data.name == "chd"
    assert load_config(f"{text}:gcl").loss.method == "gcl"
    assert find(f"{text}:gcl").name == "chd_pretrain_gcl"


@pytest.mark.parametrize("text", ["table1", "table1.py", "configs/tables/table1.py"])
def test_shipped_tables_are_found_from_any_folder(folder: Path, text: str) -> None:
    assert load_table(text).reference == "UNet (c1)"
    assert find(text, TABLES).name == "table1"


def test_a_file_of_the_current_folder_comes_first(folder: Path) -> None:
    (folder / "configs").mkdir()
    (folder / "configs" / "chd_pretrain.py").write_text(OWN.replace("import base\n", ""))
    assert find("configs/chd_pretrain.py").path == Path("configs/chd_pretrain.py")
    assert find("chd_pretrain").path.samefile(ROOT / "configs" / "chd_pretrain.py")


@pytest.mark.parametrize("place", ["{}", "~/my study [1]/own.py", "my study [1]/own.py"])
def test_own_configs_are_found_by_any_path(own: Path, place: str) -> None:
    text = place.format(own)
    config = load_config(text)
    assert (config.batch_size, config.data.name, "init_from" in config) == (3, "phantom", False)
    assert "init_from" in load_config(f"{text}:pretrained")
    assert find(f"{text}:pretrained").name == "own_pretrained"


def test_a_colon_may_belong_to_the_path(own: Path) -> None:
    odd = own.with_name("a:b.py")
    odd.write_text(OWN)
    assert find(str(odd)).variant is None
    assert (find(f"{odd}:scratch").path, find(f"{odd}:scratch").variant) == (odd, "scratch")


def test_loading_leaves_nothing_behind(own: Path) -> None:
    import sys

    before = list(sys.path)
    load_config(str(own))
    assert sys.path == before
    own.write_text(OWN.replace("BATCH_SIZE", "BATCH_SIZE + 1"))  # within the same second
    assert load_config(str(own)).batch_size == 4


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("configs/chd_pretrian.py", "configs/chd_pretrian.py: no such file; the nearest shipped: "),
        ("/nowhere/acdc_finetun.py:scratch", "the nearest shipped: acdc_finetune"),
        ("~nobody-here/phantom_small_pretrain", "that user's home is not known; expected another"),
        ("zzz", f"zzz: no such file; shipped: {', '.join(shipped_names())}"),
        ("", "no such file; shipped: acdc_finetune"),
        ("chd_pretrain:vicreg", "chd_pretrain: method is 'vicreg', expected one of kaf, simclr"),
        ("chd_finetune:start", "chd_finetune: start is 'start', expected one of pretrained, scr"),
        ("chd_scratch:gcl", "chd_scratch: get_config() takes no variant, found 'gcl'"),
    ],
)
def test_what_is_not_there_is_a_line(folder: Path, text: str, line: str) -> None:
    with pytest.raises(ValueError, match=r"expected|shipped|variant") as caught:
        load_config(text)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("import nowhere", "own.py, line 1: ModuleNotFoundError: No module named 'nowhere'"),
        ("\n\nx = (", "own.py, line 3: SyntaxError: '(' was never closed"),
        ("config = 1", "own.py: has no get_config()"),
        ("def get_config():\n    return {}", "get_config() returns a dict, expected a ConfigDict"),
        ("def get_config(x):\n    return x", "own.py: get_config() takes a variant, found none"),
        (
            "from kafjax.configs import chd_pretrain\n\n\ndef get_config():\n"
            "    config = chd_pretrain.get_config()\n    config.model.lock().depth = 1",
            "own.py, line 6: AttributeError: ",
        ),
        ("def get_config():\n    raise ValueError('which?')", "own.py: which?"),
    ],
)
def test_what_is_wrong_in_a_file_is_a_line(own: Path, source: str, line: str) -> None:
    own.write_text(source)
    with pytest.raises(ValueError, match=r"own\.py") as caught:
        load_config(str(own))
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_table_is_no_config(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"table1: no such file"):
        load_config("table1")
    with pytest.raises(ValueError, match=r"has no get_table\(\)"):
        load_table(str(ROOT / "configs" / "chd_pretrain.py"))
    assert config_files.load_table("methods").title == "Methods of pretraining"
