"""Shared by the commands: one-line messages for a user's mistakes, and exit statuses."""

import sys
from collections.abc import Callable
from typing import Any, NoReturn

from absl import app, flags, logging

from kafjax.files import show_any_name
from kafjax.xla import set_up_xla


def parse_flags(argv: list[str]) -> list[str]:
    """Parses flags for `absl.app.run`; a mistake exits with one line and status 2."""
    show_any_name()
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        # An unknown config field raises AttributeError; its message names the nearest. An error in
        # a config file comes with its traceback; the last line names the fault.
        text = " ".join(str(error.args[0] if error.args else error).strip("'\"").split("\\n"))
        if "Traceback" in text:
            text = text.split(" Error whilst")[0] + text.strip().splitlines()[-1].partition(":")[2]
        fail(text, 2)


def fail(message: str, status: int) -> NoReturn:
    """Prints one line on stderr and exits."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(status)


def run_command(command: Callable[..., int | None], *args: Any) -> None:
    """Runs a command and exits with its status.

    A `ValueError` or `OSError` is a user's mistake: one line, status 2; `--verbosity=1` shows the
    traceback. A `FloatingPointError` is status 1. A returned signal number is 128 + number.
    """
    if not flags.FLAGS["verbosity"].present:  # absl's default shows Orbax's internal messages
        logging.get_absl_handler().setLevel("WARNING")
    try:
        received = command(*args)
    except (ValueError, OSError) as error:
        logging.debug("where it came from:", exc_info=True)
        fail(str(error), 2)
    except FloatingPointError as error:
        fail(str(error), 1)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    if received:
        print("Stopped by a signal; rerun the command to resume.", flush=True)
        sys.exit(128 + received)


def run_app(command: Callable[[], int | None]) -> None:
    """Parses the defined flags and runs a command, with XLA set up."""

    def main(_: list[str]) -> None:
        set_up_xla()
        run_command(command)

    app.run(main, flags_parser=parse_flags)
