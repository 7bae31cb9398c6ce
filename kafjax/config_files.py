"""Finds and loads config files and tables, by path or, if shipped, by name.

    --config configs/chd_pretrain.py    a file, or the shipped config if the file does not exist
    --config chd_pretrain               the shipped config, `kafjax.configs.chd_pretrain`
    --config ~/study/own.py:simclr      your own file and its variant, the argument of get_config

A config may import the shipped ones from `kafjax.configs`, and modules of its own folder.
"""

import contextlib
import difflib
import inspect
import os
import re
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import kafjax.configs
from kafjax.errors import UserError
from kafjax.paths import expand

CONFIGS = "configs"
TABLES = "configs/tables"
_FUNCTIONS = {CONFIGS: "get_config", TABLES: "get_table"}


class Found(NamedTuple):
    """A config or table: its file, its variant or None, and the requested text."""

    path: Path
    variant: str | None
    label: str

    @property
    def name(self) -> str:
        """The file's name and the variant: `chd_pretrain_simclr`."""
        return "_".join(filter(None, (self.path.stem, self.variant)))


def shipped_names(folder: str = CONFIGS) -> list[str]:
    """The names of the shipped configs, or with `TABLES` of the tables."""
    return sorted(path.stem for path in _shipped_dir(folder).glob("[!_]*.py"))


def find(text: str, folder: str = CONFIGS) -> Found:
    """The file that `--config` or `--table` requests.

    Args:
      text: a path, `configs/NAME.py` or NAME, with an optional `:VARIANT`.
      folder: `CONFIGS` or `TABLES`.

    Raises:
      ValueError: no such file; the message names the nearest shipped ones.
    """
    ends = [len(text), *(i for i in reversed(range(len(text))) if text[i] == ":")]
    for end in ends:
        label, variant = text[:end], text[end + 1 :] if end < len(text) else None
        if path := _locate(label, folder):
            return Found(path, variant, label)
    names = shipped_names(folder)
    stem = PurePath(text[: ends[-1]]).stem
    near = difflib.get_close_matches(stem, names, cutoff=0.5)
    hint = f"the nearest shipped: {', '.join(near)}" if near else f"shipped: {', '.join(names)}"
    raise UserError(f"{text}: no such file; {hint}")


def load_config(text: str) -> Any:
    """The ConfigDict of a config file; arguments as `find`.

    Raises:
      ValueError: no such file, or an error in it; the message names the file and the line.
    """
    return _load(find(text, CONFIGS), CONFIGS, "ConfigDict")


def load_table(text: str) -> Any:
    """The `kafjax.study.Table` of a table's file; arguments as `find`, errors as `load_config`."""
    return _load(find(text, TABLES), TABLES, "Table")


def define_config(help_string: str) -> Any:
    """Defines the required flags `--config` and `--config.FIELD`; returns the flag's holder."""
    from absl import flags
    from ml_collections import ConfigDict, config_flags
    from ml_collections.config_flags import config_flags as config_flags_module
    from ml_collections.config_flags import tuple_parser

    class NoneParser(flags.ArgumentParser):
        """For fields that are None, such as `augment` without augmentation."""

        def parse(self, argument: str) -> Any:
            raise UserError(argument)

    class Parser(flags.ArgumentParser):
        """Finds the file by this module's rules."""

        def parse(self, argument: str) -> Any:
            config = load_config(argument)
            config.lock()
            return config

    for kind, parser, words in (
        (int, flags.IntegerParser(), "a whole number, or None"),
        (float, flags.FloatParser(), "a number, or None"),
        (bool, flags.BooleanParser(), "True or False, or None"),
        (str, flags.ArgumentParser(), "a text, or None"),
        (ConfigDict, config_flags_module._ConfigDictParser(), "fields as {'name': 1}, or None"),
        (type(None), NoneParser(), "None"),
        (tuple, tuple_parser.TupleParser(), "values in brackets, as '(1, 2)', or None"),
    ):
        config_flags.register_flag_parser_for_type(kind, _or_none(parser, words))
    flags.disclaim_key_flags()  # the flag belongs to the caller, whose --help shows it
    holder = config_flags.DEFINE_config_file("config", help_string=help_string)
    flags.FLAGS["config"].parser = Parser()
    flags.mark_flag_as_required("config")
    return holder


def _or_none(parser: Any, words: str) -> Any:
    """A flag parser that also accepts None, and reports what it expects; `check_fields` decides.

    It keeps the parser's class, from which ml_collections infers the flag's type.
    """

    class OrNone(type(parser)):  # type: ignore[misc]
        def parse(self, argument: Any) -> Any:
            if argument in ("None", None):
                return None
            try:
                return super().parse(argument)
            except (TypeError, ValueError):
                raise UserError(f"expected {words}") from None

    return OrNone()


def unknown_fields(argv: Sequence[str]) -> list[str]:
    """A line for each command-line field that the config lacks, with the nearest existing one.

    Args:
      argv: with `--config=FILE` or `--config FILE`, and `--config.FIELD` for fields.
    """
    from ml_collections.config_flags import config_path

    given = [re.match(r"--?config(?:=(.*))?$", argument, re.DOTALL) for argument in argv]
    try:
        place, match = next((i, match) for i, match in enumerate(given) if match)
        file = argv[place + 1] if match[1] is None else match[1]
        config = load_config(file)
    except (StopIteration, IndexError, UserError):
        return []
    lines = []
    for argument in argv:
        if field := re.match(r"--?(?:no)?config\.([^=]+)", argument):
            try:
                config_path.get_type(field[1], config)
            except Exception:  # any kind of error means that the field is missing
                lines.append(_unknown(field[1], file, config))
    return lines


def _unknown(field: str, file: str, config: Any) -> str:
    here = f"config.{field} is not a field of {file}"
    if near := difflib.get_close_matches(field, _fields(config), n=1):
        return f"{here}; the nearest is config.{near[0]}"
    there = [name for name in shipped_names() if field in _fields(load_config(name))]
    name = difflib.get_close_matches(find(file).path.stem, there, n=1, cutoff=0)
    return f"{here}; " + (f"{name[0]} has it" if name else "expected one of docs/configuration.md")


def _fields(config: Any, prefix: str = "") -> list[str]:
    """The dotted paths of a config's fields."""
    own = [f"{prefix}{name}" for name in config]
    inner = [(name, config.get(name)) for name in config]
    return own + [
        field
        for name, value in inner
        if hasattr(value, "to_dict")
        for field in _fields(value, f"{prefix}{name}.")
    ]


def given_config() -> Found:
    """The file that the parsed flag `--config` names."""
    from absl import flags
    from ml_collections import config_flags

    return find(config_flags.get_config_filename(flags.FLAGS["config"]))


def _shipped_dir(folder: str) -> Path:
    return Path(kafjax.configs.__path__[0], *PurePath(folder).parts[1:])


def _locate(label: str, folder: str) -> Path | None:
    path = expand(label)
    if os.path.isfile(path):
        return path
    asked = PurePath(label)
    is_name = asked.parent in (PurePath(), PurePath(folder)) and asked.suffix in ("", ".py")
    if is_name and asked.stem in shipped_names(folder):
        return _shipped_dir(folder) / f"{asked.stem}.py"
    return None


def _load(found: Found, folder: str, expected: str) -> Any:
    name = _FUNCTIONS[folder]
    arguments = [] if found.variant is None else [found.variant]
    with _naming_faults(found), _importing_from(found.path.parent):
        function = getattr(_run(found.path), name, None)
        if function is None:
            raise UserError(f"has no {name}()")
        if not _accepts(function, arguments):
            what = f"no variant, found {found.variant!r}" if arguments else "a variant, found none"
            raise UserError(f"{name}() takes {what}")
        value = function(*arguments)
        if expected not in [base.__name__ for base in type(value).__mro__]:
            raise UserError(f"{name}() returns a {type(value).__name__}, expected a {expected}")
        return value


def _run(path: Path) -> types.ModuleType:
    """The file as a module; always recompiled, to see edits and to write no cache."""
    module = types.ModuleType(f"config_file_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look up their module here
    exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    return module


def _accepts(function: Any, arguments: list[str]) -> bool:
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    return True


@contextlib.contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    before = sys.path
    sys.path = [*before, str(folder.absolute())]
    try:
        yield
    finally:
        sys.path = before


@contextlib.contextmanager
def _naming_faults(found: Found) -> Iterator[None]:
    """Turns any error in a config file into one message with the file and line."""
    try:
        yield
    except ValueError as error:  # raised by `get_config`, with its own message
        raise UserError(f"{found.label}: {error}") from error
    except Exception as error:
        raise UserError(f"{_place(found, error)}: {_describe(error)}") from error


def _place(found: Found, error: Exception) -> str:
    line = error.lineno if isinstance(error, SyntaxError) else None
    trace = error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == str(found.path):
            line = trace.tb_lineno
        trace = trace.tb_next
    return found.label if line is None else f"{found.label}, line {line}"


def _describe(error: Exception) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return " ".join(f"{type(error).__name__}: {text}".split())
