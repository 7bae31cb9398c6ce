"""How fast are records read into batches on the device, and does the accelerator wait for them?

Reads, decodes, draws a neighbour, normalises, cuts and batches pairs as pretraining does; records
are in the system's cache of files. Without --data_dir, phantoms are drawn and prepared first. With
--bucket their records are also read from an S3 server on this machine (moto), which has no latency.
"""

import argparse
import contextlib
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.flags import integers, make_parser, run, settings
from benchmarks.report import Result, Table
from kafjax.cores import usable_cores

# What the release's on-the-fly input takes with about 50 keypoints; see docs/performance.md.
RELEASE_NOTE = (
    "The authors' release augments and finds keypoints while training, which took 0.1 to 0.4 s of "
    "a core for a pair of 512 x 512 slices when it was measured (not in this run)."
)


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    flags = make_parser(__doc__)
    flags.add_argument("--data_dir", type=Path, help="prepared data, in place of phantoms")
    flags.add_argument("--name", default="phantom", help="of the dataset")
    flags.add_argument("--size", type=int, default=512, help="pixels, both edges")
    flags.add_argument("--num_slices", type=int, default=20, help="of each of two phantoms")
    flags.add_argument("--num_keypoints", type=int, default=512, help="of the phantoms' records")
    flags.add_argument("--batch_size", type=int, default=32, help="pairs")
    flags.add_argument("--num_batches", type=int, default=6, help="timed in each turn")
    flags.add_argument("--threads", type=integers, help="1, 2, 4, ... to the cores by default")
    flags.add_argument("--step_seconds", type=float, default=0.32, help="the accelerator takes")
    flags.add_argument("--turns", type=int, default=5)
    flags.add_argument("--bucket", action="store_true", help="also from a bucket, next to the disk")
    return flags


def measure(arguments: argparse.Namespace) -> Result:
    """Reads with every number of threads, turn about, alone and before an accelerator."""
    from kafjax.data.dataset import open_dataset

    with tempfile.TemporaryDirectory() as scratch:
        data_dir = arguments.data_dir or prepare_phantoms(Path(scratch), arguments)
        dataset = open_dataset(data_dir, arguments.name)
        threads = arguments.threads or _powers_to(len(usable_cores()))
        turns: dict[int, list[dict[str, float]]] = {n: [] for n in threads}
        for _ in range(arguments.turns):
            for n in threads:
                turns[n].append(read(dataset, arguments, n))
        waits = {n: wait_share(dataset, arguments, n) for n in threads}
        rates = bucket_rates(Path(data_dir), arguments) if arguments.bucket else {}
    medians = {
        n: {name: statistics.median(turn[name] for turn in all_turns) for name in all_turns[0]}
        for n, all_turns in turns.items()
    }
    table = _table(arguments, medians, waits)
    numbers = {"threads": {n: {"turns": turns[n], "wait_share": waits[n]} for n in threads}}
    tables = [table, *([_bucket_table(rates)] if rates else [])]
    return Result("input", "Input", tables, {**numbers, "bucket": rates}, settings(arguments))


def _table(
    arguments: argparse.Namespace, medians: dict[int, dict[str, float]], waits: dict[int, float]
) -> Table:
    first = next(iter(medians.values()))["wall"]
    columns = ["threads", "core time a pair", "pairs/s", "of the first's rate", "accelerator waits"]
    rows = [
        [
            str(n),
            f"{1000 * facts['cpu']:.1f} ms",
            f"{1 / facts['wall']:.1f}",
            f"{first / facts['wall']:.2f}x",
            f"{waits[n]:.1%}",
        ]
        for n, facts in medians.items()
    ]
    accelerator = (
        f"The accelerator is one that takes {arguments.step_seconds} s for a batch of "
        f"{arguments.batch_size} pairs, with {len(usable_cores())} cores."
    )
    size = arguments.size
    return Table(f"Pairs of {size} x {size} slices", columns, rows, [accelerator, RELEASE_NOTE])


def prepare_phantoms(folder: Path, arguments: argparse.Namespace) -> Path:
    """Draws and prepares two phantoms; the data folder."""
    from data_prep.builder import Options
    from data_prep.phantom.subjects import write_subjects
    from data_prep.prepare import prepare_dataset
    from data_prep.readers import READERS

    write_subjects(folder / "raw", 2, size=(arguments.size, arguments.size, arguments.num_slices))
    options = Options(max_keypoints=arguments.num_keypoints)
    prepare_dataset(
        READERS["chd"],
        folder / "raw",
        folder / "data",
        name=arguments.name,
        options=options,
        num_workers=0,
    )
    return folder / "data"


def read(dataset: Any, arguments: argparse.Namespace, num_threads: int) -> dict[str, float]:
    """Seconds a pair from records to the device: `wall`, and `cpu` of all threads."""
    import jax

    batches = _batches(dataset, arguments, num_threads)
    jax.block_until_ready(jax.device_put(next(batches)))
    # The buffer is full by then: its pairs are read before the clock starts.
    for _ in range(2):
        next(batches)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(arguments.num_batches):
        jax.block_until_ready(jax.device_put(next(batches)))
    pairs = arguments.num_batches * arguments.batch_size
    times = {
        "wall": (time.perf_counter() - wall) / pairs,
        "cpu": (time.process_time() - cpu) / pairs,
    }
    batches.close()
    return times


def wait_share(dataset: Any, arguments: argparse.Namespace, num_threads: int) -> float:
    """The share of its time for which an accelerator of `step_seconds` a batch waits."""
    batches = _batches(dataset, arguments, num_threads)
    next(batches)
    waited = 0.0
    for _ in range(arguments.num_batches):
        time.sleep(arguments.step_seconds)  # the accelerator computes, the host is free
        begin = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - begin
    batches.close()
    return waited / (waited + arguments.num_batches * arguments.step_seconds)


def bucket_rates(data_dir: Path, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Records/s of each turn, by source: without decoding, by eight threads."""
    from kafjax.data.dataset import open_dataset

    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as cache, _bucket(data_dir, Path(cache)) as url:
        for _ in range(arguments.turns):
            shutil.rmtree(Path(cache) / "records", ignore_errors=True)
            for source, place in (("disk", data_dir), ("bucket", url), ("bucket, again", url)):
                reader = open_dataset(place, arguments.name).reader
                begin = time.perf_counter()
                with ThreadPoolExecutor(8) as threads:
                    number = sum(map(bool, threads.map(reader.__getitem__, range(len(reader)))))
                rates.setdefault(source, []).append(number / (time.perf_counter() - begin))
    return rates


@contextlib.contextmanager
def _bucket(data_dir: Path, cache: Path) -> Iterator[str]:
    """The URL of a copy of the data on a server that is a process of its own."""
    import fsspec

    from kafjax.buckets import copy_of, send

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    os.environ.update(
        AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}",
        AWS_ACCESS_KEY_ID="key",
        AWS_SECRET_ACCESS_KEY="secret",
        AWS_DEFAULT_REGION="us-east-1",
        KAFJAX_CACHE=str(cache),
    )
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        fsspec.filesystem("s3").mkdir("bucket")
        copy = copy_of("s3://bucket/data")
        shutil.copytree(data_dir, copy)
        send(copy)
        shutil.rmtree(copy)
        yield "s3://bucket/data"
    finally:
        server.terminate()
        server.wait()


def _bucket_table(rates: dict[str, list[float]]) -> Table:
    rows = [
        [source, f"{statistics.median(turns):.0f}", f"{min(turns):.0f} to {max(turns):.0f}"]
        for source, turns in rates.items()
    ]
    note = "Eight threads, not decoded; the second time from the cache on this machine."
    return Table("Records from a bucket", ["source", "records/s", "range"], rows, [note])


def _batches(dataset: Any, arguments: argparse.Namespace, num_threads: int) -> Any:
    from kafjax.data.batches import BatchOptions, pretraining_batches

    options = BatchOptions(
        batch_size=arguments.batch_size,
        patch_size=(arguments.size, arguments.size),
        seed=0,
        num_threads=num_threads,
    )
    return pretraining_batches(dataset, options)


def _powers_to(limit: int) -> tuple[int, ...]:
    """1, 2, 4, ... below the limit, and the limit."""
    return (*(2**i for i in range(limit.bit_length()) if 2**i < limit), limit)


if __name__ == "__main__":
    run(parser(), measure)
