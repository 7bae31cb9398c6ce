"""Does an archive of ten thousand volumes prepare, open and grow at a flat price?

Small volumes of noise, as NIfTI files in a folder, go through the commands' own reader. Each part
runs in a process of its own.
"""

import argparse
import contextlib
import io
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.flags import make_parser, run, settings
from benchmarks.preparation import children_peak
from benchmarks.report import Result, Table
from benchmarks.workers import Side, peak_memory, workers

NUM_SLICES = 10
SIZE = 32
_PARTS = ("prepare", "open_dataset", "first_batch", "check", "prepare_again")


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    flags = make_parser(__doc__)
    flags.add_argument("--num_volumes", type=int, default=10_000)
    flags.add_argument("--num_added", type=int, default=100)
    flags.add_argument("--num_workers", type=int, default=2)
    return flags


def measure(arguments: argparse.Namespace) -> Result:
    """Prepares, opens, checks and prepares again with a few more volumes."""
    total, added = arguments.num_volumes, arguments.num_added
    with tempfile.TemporaryDirectory() as scratch:
        raw, data = Path(scratch) / "raw", Path(scratch) / "data"
        write_volumes(raw, range(total))
        time.sleep(3)  # what just changed would be read again
        numbers = {}
        for part in _PARTS:
            if part == "prepare_again":
                write_volumes(raw, range(total, total + added))
            with workers(
                {part: ("benchmarks.archive:make_side", raw, data, arguments.num_workers)}
            ) as side:
                numbers[part] = side[part].ask(part)
    return Result(
        "archive", "An archive", _tables(numbers, total, added), numbers, settings(arguments)
    )


def write_volumes(folder: Path, numbers: range) -> None:
    """Volumes of noise, as old as if they had lain there for a day."""
    import nibabel as nib

    folder.mkdir(exist_ok=True)
    day_ago = time.time() - 24 * 3600
    for number in numbers:
        values = np.random.default_rng(number).integers(0, 1000, (SIZE, SIZE, NUM_SLICES), np.int16)
        path = folder / f"case_{number:05d}.nii.gz"
        nib.save(nib.Nifti1Image(values, np.diag([1.0, 1.0, 3.0, 1.0])), path)
        os.utime(path, (day_ago, day_ago))


def make_side(raw: Path, data: Path, num_workers: int) -> Side:
    """The parts; a process calls one."""
    from data_prep import check, prepare
    from data_prep.main import main

    def command(*more: str) -> dict[str, Any]:
        """Runs `kafjax prepare`; notes when every hundredth volume was read and prepared."""
        ends: list[list[float]] = []
        counts: list[int] = []  # of volumes
        plain = prepare.map_in_processes

        def noting(function: Any, jobs: Any, **options: Any) -> Any:
            ends.append([time.perf_counter()])
            counts.append(len(jobs))
            for i, result in enumerate(plain(function, jobs, **options), 1):
                if i % 100 == 0 or i == len(jobs):
                    ends[-1].append(time.perf_counter())
                yield result

        prepare.map_in_processes = check.map_in_processes = noting
        where = ("--raw_dir", str(raw), "--data_dir", str(data), "--max_keypoints", "16")
        arguments = ("--dataset", "folder", "--name", "archive", "--intensity", "zscore", *where)
        begin, out = time.perf_counter(), io.StringIO()
        with children_peak() as children, contextlib.redirect_stdout(out):
            status = main([*arguments, "--num_workers", str(num_workers), *more])
        if status:
            raise RuntimeError(f"preparation ended with status {status}")
        seconds = time.perf_counter() - begin
        passes = [list(np.diff(of_pass)) for of_pass in ends]
        peaks = {"peak": peak_memory(), "largest_worker": max(children)}
        rest = seconds - sum(map(sum, passes))
        return {"seconds": seconds, "passes": passes, "volumes": counts, "rest": rest, **peaks}

    def opened() -> dict[str, Any]:
        from kafjax.data import open_dataset

        before, begin = peak_memory(), time.perf_counter()
        dataset = open_dataset(data, "archive")
        seconds = time.perf_counter() - begin
        facts = {"volumes": len(dataset.volumes), "records": len(dataset.reader)}
        return {"seconds": seconds, "imports": before, "peak": peak_memory(), **facts}

    def first_batch() -> dict[str, Any]:
        from kafjax.data import BatchOptions, open_dataset, pretraining_batches

        begin = time.perf_counter()
        dataset = open_dataset(data, "archive")
        options = BatchOptions(batch_size=32, patch_size=(SIZE, SIZE), seed=0)
        next(iter(pretraining_batches(dataset, options)))
        return {"seconds": time.perf_counter() - begin, "peak": peak_memory()}

    calls = {
        "prepare": command,
        "open_dataset": opened,
        "first_batch": first_batch,
        "check": lambda: command("--check"),
        "prepare_again": lambda: command("--overwrite"),
    }
    return Side(calls, {})


def rates(seconds: list[float], total: int) -> list[float]:
    """Volumes a second of each thousand, or tenth, of seconds between every hundredth volume."""
    together = max(1, round(min(1000, total / 10) / 100))
    parts = [seconds[i : i + together] for i in range(0, len(seconds), together)]
    return [100 * len(part) / sum(part) for part in parts if len(part) == together]


def _tables(numbers: dict[str, Any], total: int, added: int) -> list[Table]:
    reading, writing = (rates(part, total) for part in numbers["prepare"]["passes"])
    rows = [
        [f"{i} of {len(reading)}", f"{one:.0f}", f"{two:.0f}"]
        for i, (one, two) in enumerate(zip(reading, writing, strict=True), 1)
    ]
    flat = [f"Medians: {statistics.median(reading):.0f} and {statistics.median(writing):.0f}."]
    title = f"Preparation of {total} volumes of {SIZE} x {SIZE} x {NUM_SLICES}, volumes a second"
    parts = [
        [
            name.replace("_", " "),
            f"{facts['seconds']:.1f} s",
            f"{facts['rest']:.1f} s" if "rest" in facts else "",
            f"{facts['peak'] / 1e6:.0f} MB",
            f"{facts['largest_worker'] / 1e6:.0f} MB" if "largest_worker" in facts else "",
        ]
        for name, facts in numbers.items()
    ]
    again = f"The second preparation has {added} volumes more."
    return [
        Table(title, ["part", "checked", "prepared"], rows, flat),
        Table(
            "The whole",
            ["", "seconds", "without volumes", "peak", "largest worker"],
            parts,
            [again],
        ),
    ]


if __name__ == "__main__":
    run(parser(), measure)
