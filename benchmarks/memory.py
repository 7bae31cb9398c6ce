"""How much memory does a training step need, and what does it cost to need less?

Temporaries are the compiled step's memory in addition to its arguments and results. Rematerialising
(`config.model.remat`) and microbatches (`config.num_microbatches`) buy memory with time; variants
are timed turn about.
"""

import argparse
import statistics
from typing import Any

from benchmarks.case import Case
from benchmarks.flags import integers, make_parser, network_flags, run, settings
from benchmarks.report import Result, Table, gigabytes, ratio, seconds
from benchmarks.workers import Worker, take_turns, workers


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    flags = make_parser(__doc__)
    network_flags(flags, size=256)
    flags.add_argument("--micro_size", type=int, default=128, help="pixels, for microbatches")
    flags.add_argument("--micro_batch_size", type=int, default=2, help="slices, for microbatches")
    flags.add_argument("--num_microbatches", type=integers, default=(1, 2))
    flags.add_argument("--turns", type=int, default=3)
    return flags


def measure(arguments: argparse.Namespace) -> Result:
    """Compares a step with and without remat, and numbers of microbatches."""
    common: dict[str, Any] = {
        "num_keypoints": arguments.num_keypoints,
        "filters": arguments.filters,
    }
    remat = {
        f"remat {choice}": Case(
            size=arguments.size, batch_size=arguments.batch_size, remat=choice, **common
        )
        for choice in (False, True)
    }
    micro = {
        f"num_microbatches {n}": Case(
            size=arguments.micro_size,
            batch_size=arguments.micro_batch_size,
            num_microbatches=n,
            **common,
        )
        for n in arguments.num_microbatches
    }
    tables, numbers = [], {}
    for name, cases in (("remat", remat), ("microbatches", micro)):
        compared = compare(cases, arguments.turns)
        numbers[name] = compared
        tables.append(_table(str(next(iter(cases.values()))), compared))
    title = "Memory of a training step, and its price"
    return Result("memory", title, tables, numbers, settings(arguments))


def compare(cases: dict[str, Case], turns: int) -> dict[str, dict[str, float]]:
    """Temporaries, peak memory and median seconds of each variant."""
    makers: dict[str, tuple[Any, ...]] = {
        name: ("benchmarks.ours:make_step_side", case) for name, case in cases.items()
    }
    with workers(makers) as sides:
        timed = take_turns(sides, ("step",), turns)
        return {name: _facts(side, timed[name]["step"]) for name, side in sides.items()}


def _facts(side: Worker, times: list[float]) -> dict[str, float]:
    return {
        "temporaries": side.facts["temporaries"],
        "peak": side.peak_memory(),
        "seconds": statistics.median(times),
    }


def _table(title: str, compared: dict[str, dict[str, float]]) -> Table:
    first = next(iter(compared.values()))["seconds"]
    rows = [
        [
            name,
            gigabytes(facts["temporaries"]),
            gigabytes(facts["peak"]),
            seconds(facts["seconds"]),
            ratio(facts["seconds"] / first),
        ]
        for name, facts in compared.items()
    ]
    columns = ["", "temporaries", "peak memory of the process", "step", "of the first's time"]
    return Table(title, columns, rows)


if __name__ == "__main__":
    run(parser(), measure)
