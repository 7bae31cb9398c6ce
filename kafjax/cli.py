"""The command `kafjax`: lists the commands, and runs one as `python -m` would.

Only the requested command is imported: `kafjax --help` starts neither JAX nor its devices.
"""

import ast
import difflib
import importlib.util
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Command(NamedTuple):
    """A command: its module, and a one-line summary."""

    module: str
    summary: str


# In the order of a study. A new command needs only a line here.
COMMANDS = {
    "auto": Command("kafjax.auto", "from scans, some with labels, to labels for all"),
    "prepare": Command("data_prep.main", "turn raw volumes into a dataset, or check them"),
    "train": Command("kafjax.main", "pretrain or fine-tune by a config"),
    "evaluate": Command("kafjax.evaluate", "score a segmentation run, or anyone's predictions"),
    "predict": Command("kafjax.predict", "segment raw volumes with one run or several"),
    "pack": Command("kafjax.pack", "pack a run, or several, as a model in one file"),
    "push": Command("kafjax.push", "upload a packed model to a Hugging Face repository"),
    "pull": Command("kafjax.pull", "download a packed model from a Hugging Face repository"),
    "export": Command("kafjax.export", "write a network as StableHLO or ONNX"),
    "suggest": Command("kafjax.suggest", "say which volumes to label next"),
    "cross-validate": Command("kafjax.cross_validate", "train and evaluate over folds, M, seeds"),
    "experiment": Command("kafjax.experiment", "run a table of runs on all devices"),
    "figures": Command("kafjax.figures", "draw keypoints, feature similarity or segmentations"),
    "report": Command("kafjax.report", "write one HTML page about a set of runs"),
    "import-torch": Command("kafjax.torch_import", "import the authors' PyTorch weights"),
    "completion": Command("kafjax.completion", "print the completion script for bash or zsh"),
}
_HELP = """\
Keypoint-augmented self-supervised pretraining and few-label segmentation, in JAX.

usage: kafjax COMMAND [FLAGS]
       kafjax COMMAND --help
       kafjax --version [--devices]    versions for a bug report; --devices also starts JAX

commands:
{commands}

example:
  kafjax prepare --dataset phantom --num_subjects 6 --size 64x64x24 --max_keypoints 64
  kafjax train --config phantom_pretrain
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status; most commands end the program instead."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    first = arguments[0] if arguments else "--help"
    if first in ("--help", "-h", "help"):
        print(format_help(), end="")
        return 0 if arguments else 2
    if first in ("--version", "-V", "version"):
        return _print_version(arguments[1:])
    if first not in COMMANDS:
        return _fail(f"unknown command {first!r}; {_nearest(first)}")
    # absl's --help prints the module's docstring and this name above the flags.
    sys.modules["__main__"].__doc__ = ast.get_docstring(
        ast.parse(find_source(COMMANDS[first].module).read_bytes())
    )
    sys.argv = [f"kafjax {first}", *arguments[1:]]
    runpy.run_module(COMMANDS[first].module, run_name="__main__")
    return 0


def find_source(module: str) -> Path:
    """The file that `python -m MODULE` runs."""
    spec = importlib.util.find_spec(module)
    if spec is not None and spec.submodule_search_locations:
        spec = importlib.util.find_spec(f"{module}.__main__")
    assert spec is not None and spec.origin is not None, f"no module {module}"
    return Path(spec.origin)


def format_help() -> str:
    """The text of `kafjax --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return _HELP.format(commands="\n".join(lines))


def _nearest(word: str) -> str:
    near = difflib.get_close_matches(word, COMMANDS, n=1, cutoff=0.5)
    return f"the nearest is {near[0]}" if near else f"expected one of {', '.join(COMMANDS)}"


def _print_version(arguments: list[str]) -> int:
    if unknown := [word for word in arguments if word != "--devices"]:
        return _fail(f"--version: found {unknown[0]!r}, expected --devices or nothing")
    from kafjax.workdir.environment import describe_environment

    for name, value in describe_environment(devices=bool(arguments)).items():
        print(f"{name}: {value}")
    return 0


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
