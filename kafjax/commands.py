"""Shared by the commands: one-line messages for a user's mistakes, and exit statuses."""

import os
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from absl import app, flags, logging

from kafjax.config_files import unknown_fields
from kafjax.errors import (
    FAULT,
    MISTAKE,
    TRY_AGAIN,
    UserError,
    describe_fault,
    lost_process,
    missing_extra,
    out_of_memory,
)
from kafjax.files import show_any_name
from kafjax.paths import data_folder, expand, is_url, named, show, split_list, with_buckets
from kafjax.xla import set_up_xla

# absl's messages about a config field, and about the config itself.
_VALUE = re.compile(r"flag --(config\..+?)=(.*): (expected .*)")
_CONFIG = re.compile(r"flag --config=.*?: (?=.*: )")
_PATH = re.compile(r"flag (--\w+)=(.*): (?=\2: )")


def define_path(name: str, default: str | None, help_string: str, **options: Any) -> Any:
    """Defines a flag for a path, with `~` expanded; returns its holder."""
    flags.disclaim_key_flags()  # the flag belongs to the caller, whose --help shows it
    return _define(lambda text: str(named(text)), name, default, help_string, **options)


def define_data_dir(default: str | None, help_string: str) -> Any:
    """Defines --data_dir; a bucket's URL stays one, because its datasets are read from there."""
    flags.disclaim_key_flags()
    return _define(_data_dir, "data_dir", default, help_string)


def _data_dir(text: str) -> str:
    folder = data_folder(text)  # refuses names that cannot be
    return text if is_url(text) else str(folder)


def _define(
    parse: Callable[[str], str], name: str, default: str | None, help_string: str, **options: Any
) -> Any:
    serializer: Any = flags.ArgumentSerializer()  # for commands that print how to rerun them
    parser = _Parser(parse)
    return flags.DEFINE(parser, name, default, help_string, serializer=serializer, **options)


def define_paths(name: str, default: str | None, help_string: str, **options: Any) -> Any:
    """Defines a flag for a list of paths, A,B,C; see `kafjax.paths.split_list`."""
    flags.disclaim_key_flags()
    parser = _Parser(lambda text: [str(named(path)) for path in split_list(text)])
    return flags.DEFINE(parser, name, default, help_string, **options)


def expand_list(text: str) -> list[str]:
    """The paths of a list A,B,C, with `~` expanded."""
    return [str(expand(path)) for path in split_list(text)]


class _Parser(flags.ArgumentParser):
    """Parses text with a function."""

    def __init__(self, function: Callable[[str], Any]):
        self._function = function

    def parse(self, argument: str) -> Any:
        return self._function(argument)


def parse_flags(argv: list[str]) -> list[str]:
    """Parses flags for `absl.app.run`; mistakes exit with a line each and status 2."""
    show_any_name()
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        # ml_collections' error for an unknown field does not name the field.
        fail("\n".join(unknown_fields(argv)) or _explain(error), MISTAKE)


def _explain(error: Exception) -> str:
    # A KeyError's message is its argument in quotes.
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
    if match := _VALUE.fullmatch(text):
        return f"{match[1]} is {match[2]!r}, {match[3]}"
    return _PATH.sub(r"\1: ", _CONFIG.sub("", text))


def fail(message: str, status: int) -> NoReturn:
    """Prints one line on stderr and exits."""
    print(f"error: {show(message)}", file=sys.stderr, flush=True)
    sys.exit(status)


def run_command(command: Callable[..., int | None], *args: Any) -> None:
    """Runs a command and exits with its status.

    Buckets' folders are fetched and sent. A `UserError` or `OSError` is a user's mistake: one
    line, status 2; `--verbosity=1` shows the traceback. So is a network that does not fit the
    memory. A `FloatingPointError` is status 1. A returned signal number is 128 + number. A process
    that has lost another of its run exits with status 75. Any other error is a fault of kafjax: a
    traceback, and status 70.
    """
    if not flags.FLAGS["verbosity"].present:  # absl's default shows Orbax's internal messages
        logging.get_absl_handler().setLevel("WARNING")
    try:
        with with_buckets():
            received = command(*args)
    except (UserError, OSError) as error:
        logging.debug("where it came from:", exc_info=True)
        fail(str(error), MISTAKE)
    except FloatingPointError as error:
        fail(str(error), 1)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except Exception as error:
        if lost := lost_process(error):
            _end_alone(lost)
        if advice := _advice(error):
            fail(advice, MISTAKE)
        print(describe_fault(error), file=sys.stderr, flush=True)
        sys.exit(FAULT)
    if received:
        print("Stopped by a signal; rerun the command to resume.", flush=True)
        sys.exit(128 + received)


def _end_alone(message: str) -> NoReturn:
    """Exits without JAX's wait for the other processes, because one is lost."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(TRY_AGAIN)


def _advice(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return missing_extra(error)
    return out_of_memory(error)


def run_app(command: Callable[..., int | None], *, with_arguments: bool = False) -> None:
    """Parses the defined flags and runs a command, with XLA set up.

    Args:
      command: what to run.
      with_arguments: whether it takes the list of arguments without dashes.
    """

    def main(argv: list[str]) -> None:
        set_up_xla()
        run_command(command, *([argv[1:]] if with_arguments else []))

    app.run(main, flags_parser=parse_flags)
