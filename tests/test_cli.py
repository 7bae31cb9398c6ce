"""The command `kafjax`: what it runs, and what needs no JAX."""

import json
import os
import platform
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import kafjax
from kafjax.cli import COMMANDS, find_source, main
from kafjax.completion import flags_of
from kafjax.workdir.environment import describe_environment


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kafjax", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_import_nothing_slow(flag: str) -> None:
    program = f"import sys; sys.argv = ['kafjax', {flag!r}]; import kafjax.cli; kafjax.cli.main()"
    program += "; print(sorted({'jax', 'numpy', 'flax', 'tensorflow', 'absl'} & set(sys.modules)))"
    seconds = []
    for _ in range(3):
        begin = time.monotonic()
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        seconds.append(time.monotonic() - begin)
        assert done.stdout.endswith("\n[]\n"), done
    if flag == "--help":
        assert min(seconds) < 0.3


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"  {name} " in text
        assert command.summary in text
        assert find_source(command.module).is_file()
    assert max(map(len, text.splitlines())) <= 100
    assert main([]) == 2


def test_unknown_commands_are_one_line_with_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["trai", "--config", "x"]) == 2
    assert capsys.readouterr().err == "error: unknown command 'trai'; the nearest is train\n"
    assert main(["zzz"]) == 2
    assert "expected one of auto, prepare, train, " in capsys.readouterr().err
    assert main(["--version", "--verbose"]) == 2
    assert "found '--verbose', expected --devices or nothing" in capsys.readouterr().err


def test_version_is_what_a_bug_report_needs_and_names_nobody(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--version"]) == 0
    text = capsys.readouterr().out
    found = dict(line.split(": ", 1) for line in text.splitlines())
    assert found == describe_environment(devices=False)
    assert found["kafjax"] == kafjax.__version__
    assert found["python"] == platform.python_version()
    needed = {"jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow-datasets"}
    assert needed | {"nibabel", "system", "processor", "processors"} <= found.keys()
    assert any(name.startswith("opencv-python") for name in found)
    assert socket.gethostname() not in text
    assert os.path.expanduser("~") not in text
    assert main(["--version", "--devices"]) == 0
    assert "devices: " in capsys.readouterr().out


_ALL_HELP = """
import os, sys
import kafjax.report.page, kafjax.study.experiment, kafjax.training.loop  # once for all
from kafjax.cli import main
for name, *words in map(str.split, sys.argv[1:]):
    if not os.fork():
        sys.stdout = open("_".join([name, *words]), "w")
        try:
            main([name, *words, "--help"])
        finally:
            sys.stdout.close()
            os._exit(0)
    os.wait()
"""


def test_commands_describe_themselves_and_their_flags(tmp_path: Path) -> None:
    """The flags that completion reads in the sources are those that --help prints."""
    parts = {"figures": ["keypoints", "similarity", "segmentation"]}
    names = sorted(COMMANDS.keys() - {"completion"})
    calls = [f"{name} {part}".strip() for name in names for part in parts.get(name, [""])]
    done = subprocess.run(
        [sys.executable, "-c", _ALL_HELP, *calls], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stderr == ""
    for name in names:
        text = "".join(path.read_text() for path in tmp_path.glob(f"{name}*"))
        printed = set(re.findall(r"^\s+(?:-\w, )?--(?:\[no\])?(\w+)", text, re.MULTILINE))
        ours = {flag for flag in printed if not flag.startswith("help")}
        assert flags_of(COMMANDS[name].module) == ours, name
        assert f"kafjax {name}" in text


def test_commands_run_as_their_modules_do(tmp_path: Path) -> None:
    """In a folder that is not a clone."""
    shipped = ("--config", "configs/phantom_small_pretrain.py", "--describe")
    by_path = run("train", *shipped, cwd=tmp_path)
    assert by_path.returncode == 0, by_path.stderr
    module = [sys.executable, "-m", "kafjax.main", "--config", "phantom_small_pretrain"]
    by_name = subprocess.run([*module, "--describe"], capture_output=True, text=True, cwd=tmp_path)
    assert by_name.stdout == by_path.stdout
    assert by_path.stdout.startswith("kaf_unet, pretraining, 8 filters")
    assert not list(tmp_path.iterdir())


def test_mistakes_keep_their_line_and_status(tmp_path: Path) -> None:
    done = run("train", "--config", "chd_pretrai", cwd=tmp_path)
    assert done.returncode == 2
    assert "no such file; the nearest shipped: chd_pretrain" in done.stderr
    assert done.stderr.count("\n") == 1
    done = run("prepare", "--dataset", "chd", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--raw_dir is missing" in done.stderr


def test_preparation_spawns_its_workers(tmp_path: Path) -> None:
    """Each of them imports the main module again, which must not run the command again."""
    size = ("--num_subjects", "2", "--size", "64x64x8", "--max_keypoints", "16")
    done = run("prepare", "--dataset", "phantom", *size, "--num_workers", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Prepared 2 volumes") == 1
    assert "Next: kafjax train --config phantom_pretrain" in done.stdout
    (info,) = tmp_path.glob("data/phantom/*/dataset_info.json")
    assert json.loads(info.read_text())["name"] == "phantom"
