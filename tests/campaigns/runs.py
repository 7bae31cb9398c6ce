"""Campaigns of runs that are killed, stopped and resumed, alone and in two processes.

Each is a process of its own, `python -m tests.campaigns.runs NAME SEED COUNT FOLDER`, which imports
all and starts no device: each run is a fork of it, so that a start costs a second. It prints its
tallies as JSON.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.campaigns.campaign import Settings, Tally
from tests.campaigns.kills import kills
from tests.campaigns.resumes import resumes
from tests.campaigns.stops import pairs, signals

KILLS, RESUMES, SIGNALS, PAIRS = 100, 12, 8, 2  # tries by default
_CAMPAIGNS = {"kills": kills, "resumes": resumes, "signals": signals, "pairs": pairs}


def run_kills(settings: Settings) -> Iterator[Tally]:
    """SIGKILL at random moments of a run and of a preparation."""
    yield from _in_own_process("kills", settings, settings.tries(KILLS))


def run_resumes(settings: Settings) -> Iterator[Tally]:
    """Runs stopped at random steps end with the bits of those that were not."""
    yield from _in_own_process("resumes", settings, settings.tries(RESUMES))


def run_signals(settings: Settings) -> Iterator[Tally]:
    """SIGTERM and SIGINT leave a checkpoint of the last step, at once."""
    yield from _in_own_process("signals", settings, settings.tries(SIGNALS))


def run_pairs(settings: Settings) -> Iterator[Tally]:
    """Two processes; one is killed."""
    yield from _in_own_process("pairs", settings, settings.tries(PAIRS))


def _in_own_process(name: str, settings: Settings, count: int) -> list[Tally]:
    folder = settings.folder(name)
    command = [
        sys.executable,
        "-m",
        "tests.campaigns.runs",
        name,
        *map(str, (settings.seed, count, folder)),
    ]
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": os.environ.get(
            "JAX_COMPILATION_CACHE_DIR", str(folder / "xla")
        ),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "OPENBLAS_NUM_THREADS": "1",  # a process with one thread can be forked safely
    }
    with (folder / "tallies.json").open("w+") as output:
        subprocess.run(command, env=environment, stdout=output, check=True)
        output.seek(0)
        return [Tally(**row) for row in json.load(output)]


def _main() -> None:
    name, seed, count, folder = sys.argv[1:]
    import data_prep.main  # noqa: F401 - before any fork
    import kafjax.training.loop  # noqa: F401

    rng = np.random.default_rng([int(seed), *name.encode()])
    rows = []
    begin = time.monotonic()
    for tally in _CAMPAIGNS[name](Path(folder), rng, int(count)):
        tally.seconds, begin = time.monotonic() - begin, time.monotonic()
        rows.append(dataclasses.asdict(tally))
    print(json.dumps(rows))


if __name__ == "__main__":
    _main()
