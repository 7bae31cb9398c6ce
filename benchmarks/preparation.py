"""How fast are raw volumes prepared, with how many workers, and in how much memory?

Phantoms in the CHD layout are drawn first. Rates hold everything from raw files to a finished
dataset, the workers' start included.
"""

import argparse
import contextlib
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.flags import integers, make_parser, run, settings
from benchmarks.report import Result, Table, gigabytes
from benchmarks.workers import Side, workers
from kafjax.cores import usable_cores


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    flags = make_parser(__doc__)
    flags.add_argument("--size", type=int, default=512, help="pixels, both edges")
    flags.add_argument("--num_slices", type=int, default=20, help="of a volume")
    flags.add_argument("--num_volumes", type=integers, default=(4,))
    flags.add_argument("--num_keypoints", type=int, default=512)
    flags.add_argument("--num_workers", type=integers, help="0 (in process), 1 and the cores")
    flags.add_argument("--turns", type=int, default=3)
    return flags


def measure(arguments: argparse.Namespace) -> Result:
    """Prepares with every number of workers and of volumes, turn about."""
    counts = arguments.num_workers or tuple(dict.fromkeys((0, 1, len(usable_cores()))))
    size = (arguments.size, arguments.size, arguments.num_slices)
    with tempfile.TemporaryDirectory() as scratch:
        raw_dirs = {n: write_phantoms(Path(scratch), n, size) for n in arguments.num_volumes}
        plans = [(volumes, count) for volumes in arguments.num_volumes for count in counts]
        turns: dict[tuple[int, int], list[dict[str, float]]] = {plan: [] for plan in plans}
        for turn in range(arguments.turns):
            for volumes, count in plans:
                out = Path(scratch) / f"data_{turn}_{volumes}_{count}"
                facts = prepare(raw_dirs[volumes], out, arguments.num_keypoints, count)
                turns[volumes, count].append(facts)
    table = _table(size, turns)
    numbers = {f"{volumes} volumes, {n} workers": t for (volumes, n), t in turns.items()}
    return Result("preparation", "Preparation", [table], numbers, settings(arguments))


def write_phantoms(folder: Path, num_volumes: int, size: tuple[int, int, int]) -> Path:
    """Draws phantoms; their folder."""
    from data_prep.phantom.subjects import write_subjects

    raw_dir = folder / f"raw_{num_volumes}"
    write_subjects(raw_dir, num_volumes, size=size)
    return raw_dir


def prepare(raw_dir: Path, out: Path, num_keypoints: int, num_workers: int) -> dict[str, float]:
    """The results of `make_side` in a new process."""
    maker = ("benchmarks.preparation:make_side", raw_dir, out, num_keypoints, num_workers)
    with workers({"preparation": maker}) as sides:
        return sides["preparation"].ask("prepare")


def make_side(raw_dir: Path, out: Path, num_keypoints: int, num_workers: int) -> Side:
    """The side that prepares once; it imports before, as the time for that is not measured.

    Its call returns `seconds`, `cpu` seconds of all processes' cores, `slices`, and `peak`, the
    most bytes that one process had in memory.
    """
    from benchmarks.workers import peak_memory
    from data_prep.builder import Options
    from data_prep.prepare import prepare_dataset
    from data_prep.readers import READERS

    def call() -> dict[str, float]:
        with children_peak() as children:
            begin, cpu = time.perf_counter(), _cpu_seconds()
            summary = prepare_dataset(
                READERS["chd"],
                raw_dir,
                out,
                name="phantom",
                options=Options(max_keypoints=num_keypoints),
                num_workers=num_workers,
            )
            seconds, cpu = time.perf_counter() - begin, _cpu_seconds() - cpu
        peak = max(children) if num_workers else peak_memory()
        return {"seconds": seconds, "cpu": cpu, "slices": summary.num_slices, "peak": peak}

    return Side({"prepare": call}, {})


def _cpu_seconds() -> float:
    """CPU seconds of this process and its finished children."""
    return sum(os.times()[:4])


@contextlib.contextmanager
def children_peak() -> Iterator[list[float]]:
    """Looks at this process's children: a list that gets each look's highest peak, in bytes.

    Linux only; elsewhere NaN.
    """
    seen, done = [float("nan")], threading.Event()

    def look() -> None:
        while not done.wait(0.05):
            peaks = [p for child in _children() if (p := _peak_of(child))]
            seen[:] = [max(peaks + [x for x in seen if x == x], default=float("nan"))]

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def _children() -> list[str]:
    found: list[str] = []
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += path.read_text().split()
    return found


def _peak_of(process: str) -> float:
    """Most bytes that a process has had in memory; 0 if it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return 1024.0 * int(line.split()[1])
    return 0.0


def _table(
    size: tuple[int, int, int], turns: dict[tuple[int, int], list[dict[str, float]]]
) -> Table:
    rows = []
    for (volumes, count), facts in turns.items():
        cpu = statistics.median(fact["cpu"] / fact["slices"] for fact in facts)
        rate = statistics.median(fact["slices"] / fact["seconds"] for fact in facts)
        rows.append(
            [
                str(volumes),
                str(count) if count else "0 (in process)",
                f"{rate:.1f}",
                f"{rate / max(count, 1):.1f}",
                f"{1000 * cpu:.1f} ms",
                gigabytes(statistics.median(fact["peak"] for fact in facts)),
            ]
        )
    columns = ["volumes", "workers", "slices/s", "slices/s a worker"]
    columns += ["core time a slice", "largest process"]
    title = f"Volumes of {' x '.join(map(str, size))}"
    stored = gigabytes(2.0 * size[0] * size[1] * size[2])
    return Table(title, columns, rows, [f"A volume of int16 is {stored}."])


if __name__ == "__main__":
    run(parser(), measure)
