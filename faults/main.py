"""Runs campaigns of faults and prints their table: `python -m faults.main [--only NAME,...]`.

`--count` is the number of tries of each campaign instead of its own, `--output` a folder for the
table as Markdown and JSON. The same seed damages the same places. Exit status 1 if anything was
silent or unclear.
"""

import argparse
import functools
import importlib
import json
import logging
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from faults.campaign import Settings, Tally, as_json, as_markdown

# By name: the module and its function. Quick ones first.
CAMPAIGNS = {
    "volumes": ("faults.volumes", "run_preparation"),
    "prediction": ("faults.volumes", "run_prediction"),
    "shards": ("faults.shards", "run"),
    "datasets": ("faults.datasets", "run"),
    "checkpoints": ("faults.checkpoints", "run"),
    "disks": ("faults.disks", "run"),
    "hostile": ("faults.hostile", "run"),
    "configs": ("faults.configs", "run"),
    "degenerate": ("faults.degenerate", "run"),
    "kills": ("faults.runs", "run_kills"),
    "resumes": ("faults.runs", "run_resumes"),
    "signals": ("faults.runs", "run_signals"),
    "pairs": ("faults.runs", "run_pairs"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    arguments = _parse(argv)
    logging.disable(logging.ERROR)  # of what is damaged on purpose
    tallies: list[Tally] = []
    for name in arguments.only or CAMPAIGNS:
        with tempfile.TemporaryDirectory(prefix=f"faults_{name}_") as scratch:
            settings = Settings(arguments.seed, arguments.count, Path(scratch))
            tallies += run_campaign(name, settings)
        print(f"{name}: done", file=sys.stderr, flush=True)
    table = f"{_title(arguments)}\n\n{as_markdown(tallies)}"
    print(table)
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "faults.md").write_text(table + "\n")
        (arguments.output / "faults.json").write_text(json.dumps(as_json(tallies), indent=1) + "\n")
    return int(any(tally.wrong for tally in tallies))


def run_campaign(name: str, settings: Settings) -> list[Tally]:
    """The tallies of one campaign, each with its seconds; a campaign that fails is unclear."""
    module, function = CAMPAIGNS[name]
    tallies: list[Tally] = []
    begin = time.perf_counter()
    try:
        found: Iterable[Tally] = getattr(importlib.import_module(module), function)(settings)
        for tally in found:
            tally.seconds = tally.seconds or time.perf_counter() - begin
            begin = time.perf_counter()
            tallies.append(tally)
    except Exception as error:  # the other campaigns still run
        traceback.print_exc()
        broken = Tally(f"{name} did not end", seconds=time.perf_counter() - begin)
        broken.add("unclear", f"{type(error).__name__}: {error}")
        tallies.append(broken)
    return tallies


def _title(arguments: argparse.Namespace) -> str:
    when = datetime.now(UTC).strftime("%Y-%m-%d")
    count = "" if arguments.count is None else f", {arguments.count} tries each"
    return f"{when}, seed {arguments.seed}{count}, {platform.machine()}, {os.cpu_count()} cores"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m faults.main", description=__doc__)
    positive = functools.partial(_at_least, 1)
    parser.add_argument("--only", type=_names, help=f"of {', '.join(CAMPAIGNS)}")
    parser.add_argument("--seed", type=functools.partial(_at_least, 0), default=0)
    parser.add_argument("--count", type=positive, help="tries of each campaign")
    parser.add_argument("--output", type=Path, help="folder for faults.md and faults.json")
    return parser.parse_args(argv)


def _at_least(least: int, text: str) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r}; expected {least} or more")
    return int(text)


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in CAMPAIGNS]:
        known = ", ".join(CAMPAIGNS)
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}; expected of {known}")
    return names


if __name__ == "__main__":
    sys.exit(main())
