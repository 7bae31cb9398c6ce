"""Exit statuses and the one line of a mistake."""

import ast
import sys
from collections.abc import Callable

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
