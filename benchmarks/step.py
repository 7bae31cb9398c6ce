"""How fast are training and prediction on this machine, against the same network in PyTorch?

Each side starts fresh, without a compilation cache, and is called turn about; all with huge pages,
as `kafjax train` has them, or with the C library's malloc as it is. The plain network is compared
with MONAI's of the same widths as well, where that is installed.
"""

import argparse
import statistics
from typing import Any

from benchmarks.case import NETWORKS, Case
from benchmarks.flags import make_parser, run, settings
from benchmarks.report import Result, Table, gigabytes, ratio, seconds, version
from benchmarks.workers import NO_CACHE, take_turns, workers
from kafjax.xla import HUGE_PAGES

CALLS = ("forward", "step")  # the longer one last
# NETWORK:PIXELS:FILTERS:BATCH; the last two are what a CPU trains on in practice.
CASES = "kaf_unet:512:32:1,unet:512:32:1,unet:256:16:1,unet:96:8:12"


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    flags = make_parser(__doc__)
    flags.add_argument("--cases", default=CASES, help="NETWORK:PIXELS:FILTERS:BATCH, ...")
    flags.add_argument("--num_keypoints", type=int, default=400)
    flags.add_argument("--malloc", choices=("huge", "default"), default="huge", help="pages")
    flags.add_argument("--compiled", action="store_true", help="PyTorch by torch.compile as well")
    flags.add_argument("--turns", type=int, default=5)
    flags.add_argument(
        "--limit", type=float, default=60, help="seconds, after which three turns are enough"
    )
    return flags


def measure(arguments: argparse.Namespace) -> Result:
    """Compares every case."""
    tables, numbers = [], {}
    malloc = {"GLIBC_TUNABLES": HUGE_PAGES} if arguments.malloc == "huge" else {}
    turns = arguments.turns, arguments.limit
    for text in arguments.cases.split(","):
        case = make_case(text, arguments.num_keypoints)
        numbers[text] = compare(case, *turns, malloc, compiled=arguments.compiled)
        tables.append(_table(case, numbers[text]))
    title = f"Training step and forward pass on CPU, {arguments.malloc} pages"
    return Result("step", title, tables, numbers, settings(arguments))


def make_case(text: str, num_keypoints: int) -> Case:
    """The case of NETWORK:PIXELS:FILTERS:BATCH.

    Raises:
      ValueError: it is not of this form.
    """
    try:
        network, *sizes = text.split(":")
        size, filters, batch_size = map(int, sizes)
        if network not in NETWORKS:
            raise ValueError
    except ValueError as error:
        expected = f"NETWORK:PIXELS:FILTERS:BATCH, NETWORK one of {', '.join(NETWORKS)}"
        raise ValueError(f"--cases has {text!r}, expected {expected}") from error
    return Case(
        network=network,
        size=size,
        num_keypoints=num_keypoints,
        batch_size=batch_size,
        filters=filters,
    )


def compare(
    case: Case, turns: int, limit: float, malloc: dict[str, str], *, compiled: bool
) -> dict[str, Any]:
    """Facts, seconds of each turn and peak memory of every side."""
    # Names only: this process, which measures, imports neither JAX nor PyTorch.
    makers: dict[str, tuple[Any, ...]] = {"kafjax": ("benchmarks.ours:make_side", case)}
    if version("torch"):
        makers["PyTorch"] = ("benchmarks.peer_side:make_side", case)
        if compiled:
            makers["PyTorch, compiled"] = (*makers["PyTorch"], "compiled")
        if case.network == "unet" and version("monai"):
            makers["MONAI"] = ("benchmarks.peer_side:make_monai_side", case)
    with workers(makers, NO_CACHE | malloc) as sides:
        timed = take_turns(sides, CALLS, turns, limit)
        return {
            name: {"facts": side.facts, "seconds": timed[name], "peak": side.peak_memory()}
            for name, side in sides.items()
        }


def _table(case: Case, sides: dict[str, Any]) -> Table:
    names = list(sides)
    columns = ["", "kafjax"]
    for name in names[1:]:
        columns += [name, f"{name} / kafjax"]
    rows = []
    for call in CALLS:
        values = [statistics.median(sides[name]["seconds"][call]) for name in names]
        rows.append(_row(call, values, seconds))
    rows.append(_row("peak memory", [sides[name]["peak"] for name in names], gigabytes))
    ours = sides["kafjax"]["facts"]
    rows.append(_row("init", [sides[name]["facts"]["init"] for name in names], seconds))
    blank = [""] * (len(columns) - 2)
    rows.append(["compile of the step, no cache", seconds(ours["compile"]), *blank])
    rows.append(["temporaries of the step", gigabytes(ours["temporaries"]), *blank])
    peers = ("torch", "monai") if case.network == "unet" else ("torch",)
    missing = [n for n in peers if not version(n)]
    taken = {len(side["seconds"]["step"]) for side in sides.values()}
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
