"""How fast are training and prediction on this machine, against the same network in PyTorch?

Each side starts fresh, without a compilation cache, and is called turn about; with the C library's
malloc as it is, and KAF-UNet with huge pages too. The plain network is compared with MONAI's of the
same widths as well, where that is installed.
"""

import argparse
import statistics
from typing import Any

from benchmarks.case import Case
from benchmarks.flags import make_parser, network_flags, run, settings
from benchmarks.report import Result, Table, gigabytes, ratio, seconds, version
from benchmarks.workers import HUGE_PAGES, NO_CACHE, take_turns, workers

CALLS = ("forward", "step")  # the longer one last
MALLOCS: dict[str, dict[str, str]] = {"default": {}, "huge pages": HUGE_PAGES}


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    flags = make_parser(__doc__)
    network_flags(flags)
    flags.add_argument("--networks", default="kaf_unet,unet", help="which to compare")
    flags.add_argument("--turns", type=int, default=5)
    flags.add_argument(
        "--limit", type=float, default=60, help="seconds, after which three turns are enough"
    )
    return flags


def measure(arguments: argparse.Namespace) -> Result:
    """Compares every network."""
    tables, numbers = [], {}
    for network in arguments.networks.split(","):
        case = Case(
            network=network,
            size=arguments.size,
            num_keypoints=arguments.num_keypoints,
            batch_size=arguments.batch_size,
            filters=arguments.filters,
        )
        turns = arguments.turns, arguments.limit
        mallocs = MALLOCS if case.layers else {"default": MALLOCS["default"]}
        compared = {name: compare(case, *turns, env) for name, env in mallocs.items()}
        numbers[network] = compared
        tables.append(_table(case, compared))
    title = "Training step and forward pass on CPU"
    return Result("step", title, tables, numbers, settings(arguments))


def compare(case: Case, turns: int, limit: float, malloc: dict[str, str]) -> dict[str, Any]:
    """Facts, seconds of each turn and peak memory of every side."""
    # Names only: this process, which measures, imports neither JAX nor PyTorch.
    makers: dict[str, tuple[Any, ...]] = {"kafjax": ("benchmarks.ours:make_side", case)}
    if version("torch"):
        makers["PyTorch"] = ("benchmarks.peer_side:make_side", case)
        if case.network == "unet" and version("monai"):
            makers["MONAI"] = ("benchmarks.peer_side:make_monai_side", case)
    with workers(makers, NO_CACHE | malloc) as sides:
        timed = take_turns(sides, CALLS, turns, limit)
        return {
            name: {"facts": side.facts, "seconds": timed[name], "peak": side.peak_memory()}
            for name, side in sides.items()
        }


def _table(case: Case, compared: dict[str, Any]) -> Table:
    names = list(compared["default"])
    columns = ["", "kafjax"]
    for name in names[1:]:
        columns += [name, f"{name} / kafjax"]
    rows = []
    for malloc, sides in compared.items():
        for call in CALLS:
            values = [statistics.median(sides[name]["seconds"][call]) for name in names]
            rows.append(_row(f"{call}, {malloc} malloc", values, seconds))
        rows.append(
            _row(f"peak memory, {malloc} malloc", [sides[n]["peak"] for n in names], gigabytes)
        )
    ours = compared["default"]["kafjax"]["facts"]
    inits = [compared["default"][name]["facts"]["init"] for name in names]
    rows.append(_row("init", inits, seconds))
    blank = [""] * (len(columns) - 2)
    rows.append(["compile of the step, no cache", seconds(ours["compile"]), *blank])
    rows.append(["temporaries of the step", gigabytes(ours["temporaries"]), *blank])
    missing = [
        n
        for n in ("torch", "monai")
        if not version(n) and (n, case.network) != ("monai", "kaf_unet")
    ]
    taken = {len(side["seconds"]["step"]) for sides in compared.values() for side in sides.values()}
    turns = " or ".join(map(str, sorted(taken)))
    notes = [f"Medians of {turns} turns."]
    notes += [f"Not installed, so not compared: {', '.join(missing)}."] if missing else []
    return Table(str(case), columns, rows, notes)


def _row(label: str, values: list[float], write: Any) -> list[str]:
    cells = [label, write(values[0])]
    for value in values[1:]:
        cells += [write(value), ratio(value / values[0])]
    return cells


if __name__ == "__main__":
    run(parser(), measure)
