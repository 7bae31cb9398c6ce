"""Completion of `kafjax` in shells."""

import shutil
import subprocess
from pathlib import Path

import pytest

from kafjax.cli import COMMANDS
from kafjax.completion import complete, main
from kafjax.config_files import TABLES, shipped_names
from tests.runs import command_environment


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("kafjax ", sorted([*COMMANDS, "--help", "--version"])),
        ("kafjax pre", ["predict", "prepare"]),
        ("kafjax figures sim", ["similarity"]),
        ("kafjax completion ", ["bash", "zsh"]),
        ("kafjax train --res", ["--resume"]),
        ("kafjax prepare --raw", ["--raw_dir"]),
        ("kafjax predict --workdir runs/x --pro", ["--probabilities"]),
        ("kafjax train --config chd_p", ["chd_pretrain"]),
        ("kafjax train --config=chd_p", ["--config=chd_pretrain"]),
        ("kafjax experiment --table ", shipped_names(TABLES)),
        ("kafjax train --workdir ", []),  # the shell then offers files
        ("kafjax train --config 'chd", []),
        ("kafjax trai --", []),
    ],
)
def test_words_at_the_cursor(line: str, words: list[str]) -> None:
    assert complete(line) == words


def test_own_configs_are_offered_next_to_the_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "own.py").touch()
    (tmp_path / "acdc_own.py").touch()
    monkeypatch.chdir(tmp_path)
    shipped = [name for name in shipped_names() if name.startswith("acdc")]
    assert complete("kafjax train --config acdc") == sorted([*shipped, "acdc_own.py"])
    assert complete("kafjax train --config study/") == ["study/own.py"]
    assert complete(f"kafjax train --config={tmp_path}/st") == []


def test_other_shells_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fish"]) == 2
    assert capsys.readouterr().err == "error: found 'fish', expected bash or zsh\n"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return command_environment(tmp_path / "bin")


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
@pytest.mark.parametrize(
    ("words", "replies"),
    [
        (["kafjax", "cross"], "cross-validate"),
        (["kafjax", "train", "--config", "phantom_small_f"], "phantom_small_finetune"),
        # Bash itself splits at = and :, and replaces only what follows them.
        (["kafjax", "train", "--config", "=", "chd_p"], "chd_pretrain"),
        (["kafjax", "train", "--config", "="], "\n".join(shipped_names())),
        (["kafjax", "train", "--workdir", "x"], ""),
    ],
)
def test_bash_completes(
    tmp_path: Path, environment: dict[str, str], words: list[str], replies: str
) -> None:
    line = " ".join(words).replace(" =", "=").replace("= ", "=")
    script = f"""
        eval "$(kafjax completion bash)"
        complete -p kafjax
        COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}
        COMP_LINE='{line}'; COMP_POINT={len(line)}
        _kafjax
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "-euc", script], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    first, _, found = done.stdout.partition("\n")
    assert (first, done.stderr) == ("complete -o default -F _kafjax kafjax", "")
    assert found.strip() == replies


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh here")
def test_zsh_takes_the_script(tmp_path: Path, environment: dict[str, str]) -> None:
    script = """
        autoload -Uz compinit && compinit -D
        eval "$(kafjax completion zsh)"
        compadd() { print -l -- ${(P)2} }
        words=(kafjax train --config=chd_p); CURRENT=3
        _kafjax
    """
    done = subprocess.run(
        ["zsh", "-fc", script], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("--config=chd_pretrain\n", "")
