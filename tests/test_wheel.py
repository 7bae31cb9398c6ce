"""Installed from a wheel, in an empty folder: everything works without a clone."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import kafjax
from kafjax.config_files import TABLES, shipped_names
from tests.runs import ROOT

SOURCES = ("kafjax", "configs", "data_prep")
FILES = ("setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
OWN = """\
from kafjax.configs import phantom_small_pretrain


def get_config(method="simclr"):
    config = phantom_small_pretrain.get_config(method)
    config.update({"num_steps": 2, "batch_size": 4})
    config.data.update({"name": "phantom", "patch_size": (32, 32), "max_keypoints": 16})
    config.model.filters = 4
    return config
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this clone, built from a copy, in which earlier builds have left nothing."""
    root = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, root)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(root / "out")]
    if importlib.util.find_spec("setuptools") and importlib.util.find_spec("wheel"):
        command.append("--no-build-isolation")  # nothing is downloaded
    subprocess.run([*command, str(root)], check=True, capture_output=True)
    (path,) = (root / "out").glob("kafjax-*.whl")
    return path


class Installed:
    """An environment with kafjax in it, and an empty folder to work in."""

    def __init__(self, root: Path, folder: Path):
        self.root, self.folder = root, folder
        folder.mkdir()

    def run(self, *words: str, status: int = 0) -> str:
        """What a command of the environment prints; it must end with the status."""
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(
            [str(self.root / "bin" / words[0]), *words[1:]],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == status, f"{words}: {done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr
        return done.stdout if status == 0 else done.stderr


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel in an environment of its own, which borrows the dependencies of this one.

    A .pth file adds the folder of the dependencies; the .pth files there, such as that of an
    editable kafjax, are then not read.
    """
    root = tmp_path_factory.mktemp("installed")
    venv.create(root / "venv", with_pip=False)
    python = root / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index"]
    subprocess.run([*pip, "--no-deps", str(wheel)], check=True, capture_output=True)
    (site,) = (root / "venv").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return Installed(root / "venv", root / "empty")


def test_nothing_comes_from_the_clone(installed: Installed) -> None:
    program = (
        "import sys, data_prep, kafjax, kafjax.configs.tables.table4 as t;"
        "print(kafjax.__file__, t.__file__, t.table3.__file__, data_prep.__file__, *sys.path)"
    )
    found = installed.run("python", "-c", program).split()
    assert all(path.startswith(str(installed.root)) for path in found[:4])
    assert str(ROOT) not in found


def test_the_wheel_has_every_module_and_config(wheel: Path, tmp_path: Path) -> None:
    shutil.unpack_archive(wheel, tmp_path, "zip")
    for name in SOURCES:
        place = "kafjax/configs" if name == "configs" else name
        ours = {path.relative_to(ROOT / name) for path in (ROOT / name).rglob("*.py")}
        theirs = {path.relative_to(tmp_path / place) for path in (tmp_path / place).rglob("*.py")}
        assert ours <= theirs, name
    # What leads to configs/ in a clone.
    lead = (ROOT / "kafjax/configs/__init__.py").read_text()
    assert (tmp_path / "kafjax/configs/__init__.py").read_text() != lead
    assert (tmp_path / "kafjax/py.typed").exists()


def test_help_version_and_mistakes(installed: Installed) -> None:
    assert "cross-validate" in installed.run("kafjax", "--help")
    assert installed.run("kafjax", "--version").startswith(f"kafjax: {kafjax.__version__}\n")
    assert "the nearest is train" in installed.run("kafjax", "tran", status=2)


def test_shipped_configs_work_by_path_and_by_name(installed: Installed) -> None:
    by_path = ("-m", "kafjax.main", "--config", "configs/chd_pretrain.py", "--describe")
    text = installed.run("python", *by_path)
    assert text.startswith("kaf_unet, pretraining, 32 filters")
    assert installed.run("kafjax", "train", "--config", "chd_pretrain", "--describe") == text
    names = installed.run("kafjax", "completion", "words", "kafjax train --config ")
    assert names.split() == shipped_names()


def test_studies_are_planned(installed: Installed) -> None:
    words = ("--table", f"{TABLES}/table1.py", "--dataset", "phantom", "--small", "--plan")
    plan = installed.run("kafjax", "experiment", *words)
    assert "--config configs/phantom_small_finetune.py:scratch" in plan
    assert "to do for kaf_unet" in plan


def from_phantoms_to_a_run(installed: Installed) -> None:
    """Prepares phantoms and trains as a user's own config says; both print what to do next."""
    size = ("--num_subjects", "2", "--size", "48x48x8", "--max_keypoints", "16")
    words = ("prepare", "--dataset", "phantom", *size, "--num_workers", "0")
    assert "Next: kafjax train --config phantom_pretrain" in installed.run("kafjax", *words)
    own = installed.folder.parent / "a study" / "own.py"
    own.parent.mkdir(exist_ok=True)
    own.write_text(OWN)
    installed.run("kafjax", "train", "--config", str(own))
    assert (installed.folder / "runs" / "own" / "checkpoints" / "2").is_dir()


def test_own_config_trains_on_phantoms(installed: Installed) -> None:
    from_phantoms_to_a_run(installed)


@pytest.mark.slow
def test_a_fresh_environment_needs_only_the_wheel(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    fresh = Installed(tmp_path / "venv", tmp_path / "empty")
    fresh.run("python", "-m", "pip", "install", "--quiet", f"{wheel}[data]")
    assert "jax: " in fresh.run("kafjax", "--version")
    by_path = ("-m", "kafjax.main", "--config", "configs/chd_pretrain.py", "--describe")
    assert fresh.run("python", *by_path).startswith("kaf_unet, pretraining, 32 filters")
    from_phantoms_to_a_run(fresh)


def test_the_container_is_built_from_the_files_of_a_wheel() -> None:
    recipe = (ROOT / "Dockerfile").read_text()
    copied = {
        name
        for words in re.findall(r"^COPY (.+) \S+$", recipe, re.MULTILINE)
        for name in words.split()
    }
    assert copied == {*SOURCES, *FILES}  # which the wheel of these tests is built from
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignored if line.startswith("!")} == copied
    (default,) = re.findall(r"^ARG EXTRAS=(\S+)$", recipe, re.MULTILINE)
    asked = {default, *re.findall(r"--build-arg EXTRAS=(\S+)", recipe)}
    extras = re.findall(r"^(\w+) =$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)
    assert {extra for text in asked for extra in text.split(",")} == {"data", "cuda"} <= set(extras)
