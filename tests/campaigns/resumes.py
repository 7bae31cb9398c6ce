"""Runs that are stopped and resumed, on as many devices and on others."""

import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.campaigns.campaign import Tally
from tests.campaigns.cases import Case, differences, make_dataset, run_undisturbed, stop_at
from tests.campaigns.forks import Fork

DEVICES = (1, 2, 8)
_AFTER, _DRIFT = 20, 1e-5  # steps, after which parameters may be so far apart, relative


def resumes(folder: Path, rng: np.random.Generator, count: int) -> Iterator[Tally]:
    """Each task, on each number of devices: stopped twice and run again."""
    dataset = make_dataset(folder)
    combinations = [(task, n) for n in DEVICES for task in ("pretrain", "segment")]
    for i, (task, devices) in enumerate(combinations):
        tries = count // len(combinations) + (i < count % len(combinations))
        if not tries:
            continue
        tally = Tally(f"resume exactly: {task}, {devices} devices")
        good = Case(task, dataset, folder / f"good_{task}_{devices}")
        run_undisturbed(good, tally, devices)
        for number in range(tries):
            case = good.beside(f"resumed_{task}_{devices}_{number}")
            stops = _choose_stops(good, rng)
            for step in stops:
                stop_at(case, step, devices, signal.SIGTERM)
            with case.fork(devices) as run:
                status = run.wait()
            problem = f"ended with {status}: {case.output()}" if status else differences(case, good)
            tally.expect(not problem, f"stopped at {stops}: {problem}", otherwise="silent")
        yield tally
    yield _other_devices(folder, dataset)


def _choose_stops(good: Case, rng: np.random.Generator) -> list[int]:
    """Two steps to stop after: any, and the last of an epoch, which validation follows."""
    steps = range(1, good.step() - 1)
    ends = [int(row["step"]) for row in good.rows() if "epoch" in row and row["epoch"] % 1 == 0]
    end = int(rng.choice([step for step in ends if step in steps]))
    return sorted((int(rng.choice([step for step in steps if step != end])), end))


def _other_devices(folder: Path, dataset: Path) -> Tally:
    """Stopped on two devices 20 steps or more before the end, and resumed on one and on eight.

    In float64: an untrained network amplifies float32 rounding beyond any useful bound.
    """
    tally = Tally(f"resume on another number of devices: parameters within {_DRIFT:g}")
    good = Case("pretrain", dataset, folder / "good_other", {"model.dtype": "float64"})
    run_undisturbed(good, tally, devices=2)
    for devices in (1, 8):
        case = good.beside(f"other_{devices}")
        # A run ends a few steps after the signal.
        stop_at(case, good.step() - _AFTER - 6, 2, signal.SIGTERM)
        stopped = case.step()
        with case.fork(devices) as run:
            status = run.wait()
        if status or not 0 < stopped <= good.step() - _AFTER:
            tally.add("unclear", f"stopped at {stopped}, ended with {status}: {case.output()}")
            continue
        problem = drift(case, good)
        tally.expect(not problem, f"on {devices} devices: {problem}", otherwise="silent")
    return tally


def drift(a: Case, b: Case) -> str:
    """How far the last parameters and the metrics of two runs are apart, or nothing."""
    from kafjax.checkpoint.checkpointer import load_variables

    def compare() -> int:
        import jax

        jax.config.update("jax_enable_x64", True)
        trees = (load_variables(case.workdir, step=case.saved()[-1])["params"] for case in (a, b))
        # Biases before batch norm have no gradient but rounding: nothing to be relative to.
        alike = jax.tree.map(lambda x, y: np.allclose(x, y, rtol=_DRIFT, atol=1e-12), *trees)
        apart = sum(not same for same in jax.tree.leaves(alike))
        print(f"{apart} arrays of parameters differ")
        return int(apart > 0)

    rows = [case.rows() for case in (a, b)]
    if len(rows[0]) != len(rows[1]):
        return f"{len(rows[0])} and {len(rows[1])} metrics are logged"
    for one, two in zip(*rows, strict=True):
        if one.keys() != two.keys() or not np.allclose(list(one.values()), list(two.values())):
            return f"other metrics are logged at step {one['step']}"
    with Fork(compare, a.workdir.with_suffix(".log")) as comparing:
        return "" if comparing.wait() == 0 else a.output()
