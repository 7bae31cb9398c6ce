"""Runs campaigns of faults and prints their table.

`python -m tests.campaigns.main [--only NAME,...]` runs those that are named, or all.

`--count` is the number of tries of each campaign instead of its own, `--jobs` how many campaigns
run at a time, `--output` a folder for the table as Markdown and JSON. The same seed damages the
same places. Exit status 1 if anything was silent or unclear.
"""

import argparse
import functools
import importlib
import json
import logging
import multiprocessing
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

from kafjax.cores import usable_cores
from tests.campaigns.campaign import Settings, Tally, as_json, as_markdown

# By name: the module and its function. Quick ones first.
CAMPAIGNS = {
    "volumes": ("tests.campaigns.volumes", "run_preparation"),
    "prediction": ("tests.campaigns.volumes", "run_prediction"),
    "nrrd": ("tests.campaigns.formats", "run_nrrd"),
    "metaimage": ("tests.campaigns.formats", "run_metaimage"),
    "dicom": ("tests.campaigns.formats", "run_dicom"),
    "entries": ("tests.campaigns.folders", "run_entries"),
    "texts": ("tests.campaigns.folders", "run_texts"),
    "headers": ("tests.campaigns.folders", "run_headers"),
    "shards": ("tests.campaigns.shards", "run"),
    "datasets": ("tests.campaigns.datasets", "run"),
    "checkpoints": ("tests.campaigns.checkpoints", "run"),
    "disks": ("tests.campaigns.disks", "run"),
    "paths": ("tests.campaigns.paths", "run"),
    "hostile": ("tests.campaigns.hostile", "run"),
    "configs": ("tests.campaigns.configs", "run"),
    "degenerate": ("tests.campaigns.degenerate", "run"),
    "kills": ("tests.campaigns.runs", "run_kills"),
    "resumes": ("tests.campaigns.runs", "run_resumes"),
    "signals": ("tests.campaigns.runs", "run_signals"),
    "pairs": ("tests.campaigns.runs", "run_pairs"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    arguments = _parse(argv)
    begin = time.perf_counter()
    tallies = list(run_campaigns(arguments))
    minutes = (time.perf_counter() - begin) / 60
    table = f"{_title(arguments, minutes)}\n\n{as_markdown(tallies)}"
    print(table)
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "faults.md").write_text(table + "\n")
        (arguments.output / "faults.json").write_text(json.dumps(as_json(tallies), indent=1) + "\n")
    return int(any(tally.wrong for tally in tallies))


def run_campaigns(arguments: argparse.Namespace) -> Iterator[Tally]:
    """The tallies of the campaigns in their order, each campaign in a process of its own.

    The last ones take longest and are started first, so that no job waits for another at the end.
    """
    with ProcessPoolExecutor(
        arguments.jobs, multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        running = {
            name: pool.submit(_run_alone, name, arguments.seed, arguments.count)
            for name in reversed(arguments.only or CAMPAIGNS)
        }
        for name in reversed(running):
            yield from running[name].result()


def _run_alone(name: str, seed: int, count: int | None) -> list[Tally]:
    logging.disable(logging.ERROR)  # of what is damaged on purpose
    with tempfile.TemporaryDirectory(prefix=f"faults_{name}_") as scratch:
        tallies = run_campaign(name, Settings(seed, count, Path(scratch)))
    seconds = sum(tally.seconds for tally in tallies)
    print(f"{name}: done, {seconds:.0f} s", file=sys.stderr, flush=True)
    return tallies


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


def _title(arguments: argparse.Namespace, minutes: float) -> str:
    when = datetime.now(UTC).strftime("%Y-%m-%d")
    count = "" if arguments.count is None else f", {arguments.count} tries each"
    machine = f"{platform.machine()}, {len(usable_cores())} cores"
    how = f"{minutes:.0f} minutes, {arguments.jobs} campaigns at a time"
    return f"{when}, seed {arguments.seed}{count}, {machine}, {how}"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.main", description=__doc__)
    positive = functools.partial(_at_least, 1)
    parser.add_argument("--only", type=_names, help=f"of {', '.join(CAMPAIGNS)}")
    parser.add_argument("--seed", type=functools.partial(_at_least, 0), default=0)
    parser.add_argument("--count", type=positive, help="tries of each campaign")
    parser.add_argument(
        "--jobs",
        type=positive,
        default=len(usable_cores()),
        help="campaigns at a time (default: cores)",
    )
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
