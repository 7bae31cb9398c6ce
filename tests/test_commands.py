"""Exit statuses and the one line of a mistake."""

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from absl import flags

import kafjax
from kafjax.commands import run_command
from kafjax.errors import UserError
from tests.runs import ROOT


@pytest.fixture(autouse=True)
def parsed_flags() -> None:
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(sys.argv[:1])


# A module that is not installed, to whoever imports it.
WITHOUT = """
import sys

class Without:
    def find_spec(self, name, path=None, target=None):
        if name in ("cv2", "nibabel", "torch"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Without())
"""


def raising(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("batch_size is 3"), 2, "error: batch_size is 3\n"),
        (MemoryError(), 2, "error: out of memory: a smaller batch or more config.num_microbatches"),
        (RuntimeError("RESOURCE_EXHAUSTED: 9 GiB"), 2, "error: out of memory: "),
        (OSError(28, "No space left on device", "/x"), 2, "error: [Errno 28] No space left"),
        (FloatingPointError("the loss is nan"), 1, "error: the loss is nan\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_mistakes_end_in_one_line(
    capsys: pytest.CaptureFixture[str], error: BaseException, status: int, line: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_command(raising(error))
    assert caught.value.code == status
    assert capsys.readouterr().err.startswith(line)


@pytest.mark.parametrize("error", [AssertionError("ours"), ValueError("a library's"), TypeError()])
def test_our_own_mistakes_keep_their_traceback_and_ask_for_a_report(
    capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_command(raising(error))
    assert caught.value.code == 70
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-2].startswith(type(error).__name__)
    assert lines[-1].startswith(f"error: this is a fault of kafjax {kafjax.__version__}: please")


def test_a_process_whose_run_has_lost_another_ends_at_once_and_is_worth_a_retry(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """XLA's error on CPU after the other process was killed; JAX would wait for the other."""

    def end(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", end)
    lost = "UNKNOWN: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:60104"
    with pytest.raises(SystemExit) as caught:
        run_command(raising(jax.errors.JaxRuntimeError(lost)))
    assert caught.value.code == 75
    assert capsys.readouterr().err.startswith("error: another process of the run has ended; start")
    with pytest.raises(SystemExit) as caught:
        run_command(raising(jax.errors.JaxRuntimeError("INTERNAL: no such kernel")))
    assert caught.value.code == 70


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--config=phantom_pretrain", "--config.model.filter=8", "--config.x=1"],
            "error: config.model.filter is not a field of phantom_pretrain; the nearest is "
            "config.model.filters\n"
            "config.x is not a field of phantom_pretrain; expected one of docs/configuration.md",
        ),
        (
            ["--config", "configs/phantom_pretrain.py", "--config.init_from=runs/x"],
            "error: config.init_from is not a field of configs/phantom_pretrain.py; "
            "phantom_finetune has it",
        ),
        (
            ["--config=phantom_pretrain", "--config.batch_size=x"],
            "error: config.batch_size is 'x', expected a whole number, or None",
        ),
        (
            ["--config=phantom_pretrain", "--config.batch_size=None"],
            "error: config.batch_size is None, expected a whole number from 1 on",
        ),
        (
            ["--config=phantom_pretrain", "--workdir=https://bucket/run"],
            "error: --workdir: https://bucket/run: not a bucket's; expected a path, or as in "
            "s3://bucket/folder",
        ),
        (["--config=phantom_pretrain", "--workdr=x"], "error: Unknown command line flag 'workdr'"),
    ],
)
def test_slips_on_the_command_line_name_the_field_and_what_was_expected(
    arguments: list[str], line: str
) -> None:
    command = [sys.executable, "-m", "kafjax.main", *arguments, "--describe"]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (child.returncode, child.stderr.split(". Did you")[0].rstrip()) == (2, line)


def test_none_is_taken_where_the_config_may_be_without() -> None:
    given = ["--config=phantom_finetune", "--config.model.num_classes=3"]
    given += [f"--config.{name}=None" for name in ("data.num_labeled", "data.fold", "num_steps")]
    command = [sys.executable, "-m", "kafjax.main", *given, "--describe"]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr


@pytest.mark.parametrize(
    ("module", "arguments", "missing", "extra"),
    [
        ("data_prep.main", ["--dataset", "phantom"], "cv2", "data"),
        ("kafjax.predict", ["--workdir=x", "--input=y", "--output=z"], "cv2", "data"),
        (
            "kafjax.torch_import",
            ["--input=a.pth", "--config=phantom_pretrain", "--output=b"],
            "torch",
            "torch",
        ),
    ],
)
def test_a_missing_extra_is_named_with_its_pip_install(
    tmp_path: Path, module: str, arguments: list[str], missing: str, extra: str
) -> None:
    """In an interpreter whose imports of the extra fail as where it is not installed."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    (tmp_path / "a.pth").write_bytes(b"")
    child = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    line = f"error: {missing} is missing; expected: pip install 'kafjax[{extra}]'\n"
    assert (child.returncode, child.stderr) == (2, line)


def test_what_reaches_a_command_is_raised_as_a_users_mistake_or_is_a_fault() -> None:
    """A plain `ValueError` is left to what is called from Python alone, and to `kafjax.files`."""
    library = {"models", "losses.py", "augment.py", "assignment.py", "segmentation_metrics.py"}
    plain = [
        f"{path}:{node.lineno}"
        for folder in ("kafjax", "data_prep")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.relative_to(ROOT / folder).parts[0] not in library | {"files.py"}
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Raise) and "ValueError(" in ast.unparse(node)
    ]
    assert plain == []


def test_signal_is_the_status_and_success_returns() -> None:
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: 15)
    assert caught.value.code == 143
    run_command(lambda: None)
