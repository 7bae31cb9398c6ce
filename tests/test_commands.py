"""Exit statuses and the one line of a mistake."""

import sys
from collections.abc import Callable

import pytest
from absl import flags

from kafjax.commands import run_command


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
        (ValueError("batch_size is 3"), 2, "error: batch_size is 3\n"),
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


def test_our_own_mistakes_keep_their_traceback() -> None:
    with pytest.raises(AssertionError):
        run_command(raising(AssertionError("ours")))


def test_signal_is_the_status_and_success_returns() -> None:
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: 15)
    assert caught.value.code == 143
    run_command(lambda: None)
