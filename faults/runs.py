"""Runs and preparations that are killed, stopped and resumed, alone and in two processes.

A campaign is a process of its own, `python -m faults.runs NAME SEED COUNT FOLDER`, which imports
all and starts no device: each run is a fork of it, so that a start costs a second. It prints its
tallies as JSON. What a run has reached is read of its files, as after a crash.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from faults import tiny
from faults.campaign import Settings, Tally
from tests.runs import PLAIN

KILLS, RESUMES, SIGNALS, PAIRS = 100, 12, 8, 2  # tries by default
DEVICES = (1, 2, 8)
EVERY = 3  # steps between checkpoints
_DRIFT = 1e-5  # of parameters, relative
HEARTBEAT = 10  # seconds, of jax.distributed
_LIMIT = 300.0  # seconds, for what should not take ten


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
    """Two processes of which one is killed."""
    yield from _in_own_process("pairs", settings, settings.tries(PAIRS))


def _in_own_process(name: str, settings: Settings, count: int) -> list[Tally]:
    folder = settings.folder(name)
    command = [sys.executable, "-m", "faults.runs", name, *map(str, (settings.seed, count, folder))]
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with (folder / "tallies.json").open("w+") as output:
        subprocess.run(command, env=environment, stdout=output, check=True)
        output.seek(0)
        return [Tally(**row) for row in json.load(output)]


@dataclasses.dataclass
class Fork:
    """A function in a process of its own, with its output in a file."""

    function: Callable[[], int]
    log: Path
    devices: int = 1

    def __enter__(self) -> "Fork":
        sys.stdout.flush()
        self.status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            self._work()
        return self

    def _work(self) -> None:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={self.devices}"
        output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        sys.stdout = sys.stderr = os.fdopen(output, "w", buffering=1)
        status = 1
        try:
            status = self.function()
        except KeyboardInterrupt:
            status = 130
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status

    def wait(self, until: Callable[[], bool] = lambda: False, limit: float = _LIMIT) -> int | None:
        """Waits for its end, or until something holds."""
        end = time.monotonic() + limit
        while self.poll() is None and not until() and time.monotonic() < end:
            time.sleep(0.005)
        return self.status

    def send(self, number: int) -> None:
        """Sends a signal if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def __exit__(self, *_: object) -> None:
        self.send(signal.SIGKILL)
        if self.status is None:
            os.waitpid(self.pid, 0)


@dataclasses.dataclass(frozen=True)
class Case:
    """A tiny run: its task, workdir and what differs from the tiny config."""

    task: str
    dataset: Path
    workdir: Path
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> Any:
        """Of the run: two epochs or more, and a validation in each where there are labels."""
        make = {"pretrain": tiny.pretraining_config, "segment": tiny.segmentation_config}[self.task]
        fields: dict[str, Any] = {
            "every.checkpoint": EVERY,
            "every.log": 1,
            "every.picture": 0,
            "batch_size": 8,
        }
        if self.task == "segment":
            fields |= {"every.validation_epochs": 1, "model.num_classes": 8}
        else:
            fields |= PLAIN
        return make(self.dataset, **{**fields, "num_epochs": 5, **self.overrides})

    def train(self, address: str | None = None, index: int = 0, count: int = 1) -> int:
        """Trains, in this process, as `kafjax.main` does; the exit status."""
        import jax

        from kafjax.train import train

        jax.config.update("jax_enable_x64", self.config.model.dtype == "float64")
        if address is not None:
            jax.distributed.initialize(address, count, index, heartbeat_timeout_seconds=HEARTBEAT)
        received = train(self.config, self.workdir)
        return 128 + received if received else 0

    def fork(self, devices: int = 1, **options: Any) -> Fork:
        """The run in a process of its own."""
        log = self.workdir.with_suffix(".log")
        return Fork(lambda: self.train(**options), log, devices)

    def step(self) -> int:
        """The last step that metrics.jsonl has."""
        return max((row["step"] for row in self.rows()), default=0)

    def rows(self) -> list[dict[str, Any]]:
        """The metrics without times."""
        from kafjax.metrics import read_metrics

        rows = read_metrics(self.workdir)
        return [{name: x for name, x in row.items() if name != "time"} for row in rows]

    def saved(self) -> list[int]:
        """The steps that are listed as checkpoints."""
        folder = self.workdir / "checkpoints"
        steps = folder.iterdir() if folder.is_dir() else ()
        return sorted(int(path.name) for path in steps if path.name.isdigit())

    def begun(self) -> list[int]:
        """The steps of checkpoints that are there or were being written."""
        folder = self.workdir / "checkpoints"
        names = [path.name.split(".")[0] for path in folder.iterdir()] if folder.is_dir() else []
        return sorted(int(name) for name in names if name.isdigit())

    def description(self, step: int) -> dict[str, Any]:
        """What a checkpoint says of itself, with a hash of each array."""
        path = self.workdir / "checkpoints" / str(step) / "meta" / "metadata"
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def output(self) -> str:
        """The last lines that its processes printed."""
        return self.workdir.with_suffix(".log").read_text()[-600:]


def differences(a: Case, b: Case) -> str:
    """How the last checkpoints and the metrics of two runs differ, or nothing."""
    steps = [case.saved()[-1:] for case in (a, b)]
    if steps[0] != steps[1] or not steps[0]:
        return f"last steps {steps}"
    one, two = (case.description(steps[0][0]) for case in (a, b))
    arrays = [name for name in one["hashes"] if one["hashes"][name] != two["hashes"].get(name)]
    if arrays or one["hashes"].keys() != two["hashes"].keys():
        return f"{len(arrays)} arrays differ, such as {arrays[:3]}"
    if one["data"] != two["data"] or one["metrics"] != two["metrics"]:
        return "other metrics are saved"
    rows = [case.rows() for case in (a, b)]
    return "" if rows[0] == rows[1] else "other metrics are logged"


def unreadable(case: Case) -> str:
    """Which of the listed checkpoints cannot be read, in a process of its own."""
    from kafjax.checkpoint import load_variables

    def read_all() -> int:
        for step in case.saved():
            load_variables(case.workdir, step=step)
        return 0

    with Fork(read_all, case.workdir.with_suffix(".log")) as reader:
        status = reader.wait()
    return "" if status == 0 else f"a listed checkpoint is unreadable: {case.output()}"


def _make_dataset(folder: Path, number: int = 6) -> Path:
    return tiny.make_dataset(tiny.make_phantoms(folder / "raw", number), folder / "data")


def _undisturbed(case: Case, tally: Tally, devices: int = 1) -> float:
    """Runs to the end, twice so that the second is without compilation; the second's seconds."""
    seconds = 0.0
    for _ in range(2):
        shutil.rmtree(case.workdir, ignore_errors=True)
        begin = time.monotonic()
        with case.fork(devices) as run:
            if run.wait() != 0:
                tally.add("unclear", f"undisturbed, it ended with {run.status}: {case.output()}")
        seconds = time.monotonic() - begin
    return seconds


def kills(folder: Path, rng: np.random.Generator, count: int) -> Iterator[Tally]:
    """Kills one run after the other at random moments; each is resumed until it is complete."""
    tally = Tally("SIGKILL in a run: steps, saves, validation")
    dataset = _make_dataset(folder)
    good = Case("segment", dataset, folder / "good")
    seconds = _undisturbed(good, tally)
    number, done = 0, 0
    while done < count:
        case = Case("segment", dataset, folder / f"run_{number}")
        number += 1
        begun = 0
        for _ in range(10):  # a run that is killed ten times may then end
            reached = case.step()
            with case.fork() as run:
                run.wait(limit=float(rng.uniform(0.1, 1.0)) * seconds)
                ended = run.status
                run.send(signal.SIGKILL)
            if ended is not None:
                break
            done += 1
            begun = max(begun, *case.begun(), 0)
            tally.expect(*_judge_kill(case, reached, begun))
            if done == count:
                break
        with case.fork() as run:
            status = run.wait()
        problem = f"ended with {status}: {case.output()}" if status else differences(case, good)
        tally.expect(not problem, f"run {number}: {problem}", otherwise="silent")
        shutil.rmtree(case.workdir)
    yield tally
    yield _preparation_kills(folder, rng, max(1, count // 5))


def _judge_kill(case: Case, reached: int, begun: int) -> tuple[bool, str]:
    """Every listed step can be read, and no more than an interval and a save in work are lost.

    Steps go on while a checkpoint is written, here at a few milliseconds each; the next one waits
    for it.
    """
    if problem := unreadable(case):
        return False, problem
    now, saved = max(case.step(), reached), (case.saved() or [0])[-1]
    holds = now - max(saved, begun) <= EVERY and now - saved <= 2 * EVERY
    return holds, f"at step {now} the newest checkpoint is of {saved}, the newest begun of {begun}"


def _preparation_kills(folder: Path, rng: np.random.Generator, count: int) -> Tally:
    from data_prep.main import main as prepare

    tally = Tally("SIGKILL in a preparation")
    raw, good, data = folder / "raw", folder / "data/phantom/1.0.0", folder / "killed"
    arguments = ["--dataset", "chd", "--name", "phantom", "--raw_dir", str(raw)]
    arguments += ["--data_dir", str(data), "--max_keypoints", "32", "--num_workers", "2"]
    expected = {path.name: path.read_bytes() for path in good.iterdir()}
    for i in range(count):
        shutil.rmtree(data, ignore_errors=True)
        with Fork(lambda: prepare(arguments), folder / "preparation.log") as run:
            run.wait(limit=float(rng.uniform(0.05, 3.0)))
        final = data / "phantom" / "1.0.0"
        if final.exists() and {p.name: p.read_bytes() for p in final.iterdir()} != expected:
            tally.add("silent", f"try {i}: an unfinished dataset is in its place")
            continue
        with Fork(lambda: prepare(arguments), folder / "preparation.log") as run:
            status = run.wait()
        same = status == 0 and {p.name: p.read_bytes() for p in final.iterdir()} == expected
        tally.expect(same, f"try {i}: status {status}, or other bytes", otherwise="silent")
    return tally


def resumes(folder: Path, rng: np.random.Generator, count: int) -> Iterator[Tally]:
    """Each task, on each number of devices: stopped at random steps and run again."""
    dataset = _make_dataset(folder)
    combinations = [(task, n) for n in DEVICES for task in ("pretrain", "segment")]
    for i, (task, devices) in enumerate(combinations):
        tries = count // len(combinations) + (i < count % len(combinations))
        if not tries:
            continue
        tally = Tally(f"resume exactly: {task}, {devices} devices")
        good = Case(task, dataset, folder / f"good_{task}_{devices}")
        _undisturbed(good, tally, devices)
        last = good.step()
        for number in range(tries):
            case = Case(task, dataset, folder / f"resumed_{task}_{devices}_{number}")
            stops = sorted(rng.choice(np.arange(1, last - 1), 2, replace=False).tolist())
            for step in stops:
                _stop_at(case, step, devices, signal.SIGTERM)
            with case.fork(devices) as run:
                status = run.wait()
            problem = f"ended with {status}: {case.output()}" if status else differences(case, good)
            tally.expect(not problem, f"stopped at {stops}: {problem}", otherwise="silent")
        yield tally
    yield _other_devices(folder, dataset)


def _other_devices(folder: Path, dataset: Path) -> Tally:
    """Stopped on two devices 20 steps before the end, and resumed on one and on eight.

    In float64: an untrained network amplifies float32 rounding beyond any useful bound.
    """
    tally = Tally(f"resume on another number of devices: parameters within {_DRIFT:g}")
    good = Case("pretrain", dataset, folder / "good_other", {"model.dtype": "float64"})
    with good.fork(devices=2) as run:
        run.wait()
    for devices in (1, 8):
        case = dataclasses.replace(good, workdir=folder / f"other_{devices}")
        _stop_at(case, good.step() - 20, 2, signal.SIGTERM)
        stopped = case.step()
        with case.fork(devices) as run:
            status = run.wait()
        if status or not 0 < stopped <= good.step() - 10:
            tally.add("unclear", f"stopped at {stopped}, ended with {status}: {case.output()}")
            continue
        problem = drift(case, good)
        tally.expect(not problem, f"on {devices} devices: {problem}", otherwise="silent")
    return tally


def drift(a: Case, b: Case) -> str:
    """How far the last parameters and the metrics of two runs are apart, or nothing."""
    from kafjax.checkpoint import load_variables

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


def _stop_at(case: Case, step: int, devices: int, number: int, **options: Any) -> tuple[Any, float]:
    """Sends a signal when the step is logged; exit status and seconds until the end."""
    with case.fork(devices, **options) as run:
        run.wait(until=lambda: case.step() >= step)
        begin = time.monotonic()
        run.send(number)
        return run.wait(), time.monotonic() - begin


def signals(folder: Path, rng: np.random.Generator, count: int) -> Iterator[Tally]:
    """With jax.distributed and without: the status is the signal's, and no step is lost."""
    dataset = _make_dataset(folder)
    warm = Tally("")  # compiles what the runs share, whatever their length
    _undisturbed(Case("segment", dataset, folder / "good", {"num_epochs": 1}), warm)
    for number in (signal.SIGTERM, signal.SIGINT):
        for distributed in (False, True):
            tally = Tally(f"{number.name} {'with' if distributed else 'without'} jax.distributed")
            tally.wrong += warm.wrong
            for i in range(max(1, count // 4)):
                name = f"{number.name}_{distributed}_{i}"
                case = Case("segment", dataset, folder / name, {"num_epochs": 40})
                options = {"address": _free_address()} if distributed else {}
                step = int(rng.integers(1, 12))
                status, seconds = _stop_at(case, step, 1, number, **options)
                tally.expect(*_judge_stop(case, status, 128 + number, seconds))
            yield tally


def _judge_stop(case: Case, status: Any, expected: int, seconds: float) -> tuple[bool, str]:
    now, saved = case.step(), (case.saved() or [0])[-1]
    what = f"status {status}, {seconds:.1f} s, step {now}, checkpoint {saved}: {case.output()}"
    return status == expected and seconds < 6 and saved == now and not unreadable(case), what


def pairs(folder: Path, rng: np.random.Generator, count: int) -> Iterator[Tally]:
    """Two processes on this machine: one is killed, the other ends; both together go on."""
    dataset = _make_dataset(folder)
    tally = Tally("two processes, one killed: the other ends; both again: exact")
    good = Case("pretrain", dataset, folder / "good")
    with _pair(good) as both:
        problem = [run.wait() for run in both]
    if any(problem):
        tally.add("unclear", f"the undisturbed pair ended with {problem}: {good.output()}")
    for i in range(count):
        case = Case("pretrain", dataset, folder / f"pair_{i}")
        victim, step = i % 2, int(rng.integers(2, max(3, good.step() - 2)))
        status, seconds = _kill_one(case, victim, step)
        ended = status not in (None, 0) and seconds <= HEARTBEAT + 10
        tally.expect(ended, f"the other ended with {status} after {seconds:.0f} s")
        with _pair(case) as both:
            statuses = [run.wait() for run in both]
        problem_now = f"{statuses}: {case.output()}" if any(statuses) else differences(case, good)
        tally.expect(not problem_now, problem_now, otherwise="silent")
    yield tally


def _kill_one(case: Case, victim: int, step: int) -> tuple[int | None, float]:
    """How the other of two processes ends, and after how many seconds."""
    with _pair(case) as both:
        both[0].wait(until=lambda: case.step() >= step)
        both[victim].send(signal.SIGKILL)
        begin = time.monotonic()
        return both[1 - victim].wait(limit=HEARTBEAT + 60), time.monotonic() - begin


@contextlib.contextmanager
def _pair(case: Case) -> Iterator[tuple[Fork, Fork]]:
    options: dict[str, Any] = {"address": _free_address(), "count": 2}
    with case.fork(**options, index=0) as first, case.fork(**options, index=1) as second:
        yield first, second


def _free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def _main() -> None:
    name, seed, count, folder = sys.argv[1:]
    campaign = {"kills": kills, "resumes": resumes, "signals": signals, "pairs": pairs}[name]
    import kafjax.train  # noqa: F401 - before any fork

    rng = np.random.default_rng([int(seed), *name.encode()])
    rows = []
    begin = time.monotonic()
    for tally in campaign(Path(folder), rng, int(count)):
        tally.seconds, begin = time.monotonic() - begin, time.monotonic()
        rows.append(dataclasses.asdict(tally))
    print(json.dumps(rows))


if __name__ == "__main__":
    _main()
