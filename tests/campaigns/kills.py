"""SIGKILL at random moments of runs and of preparations."""

import collections
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.campaigns.campaign import Tally
from tests.campaigns.cases import (
    EVERY,
    Case,
    differences,
    make_dataset,
    run_undisturbed,
    unreadable,
)
from tests.campaigns.forks import LIMIT, Fork

_KILLS_OF_A_RUN = 10  # which may then end
_AT_ANY_TIME = 0.2  # of the kills; most of a tiny run's time goes by before its first step
_PAUSE = 0.1  # seconds: several steps, a save or a validation


def kills(folder: Path, rng: np.random.Generator, count: int) -> Iterator[Tally]:
    """Kills one run after the other, each again and again; then each is run to its end."""
    killed = Tally(f"SIGKILL in a run: no more than the interval of {EVERY} steps is lost")
    resumed = Tally("the killed runs, resumed, end with every bit of an undisturbed one")
    dataset = make_dataset(folder)
    good = Case("segment", dataset, folder / "good")
    run_undisturbed(good, killed)  # which compiles what all share
    seconds = run_undisturbed(good.beside("again"), killed)
    moments: collections.Counter[str] = collections.Counter()
    kept: list[Path] = []
    for number in range(count):
        if killed.tries >= count:
            break
        case = good.beside(f"run_{number}")
        for _ in range(min(_KILLS_OF_A_RUN, count - killed.tries)):
            reached = case.step()
            if not (moment := _kill(case, rng, seconds)):
                break
            moments[moment] += 1
            killed.expect(*_judge_kill(case, reached))
            kept.append(_keep_listed(case, folder / "kept" / str(len(kept))))
        _resume(case, good, resumed)
    killed.fault += f"; {', '.join(f'{n} {moment}' for moment, n in moments.most_common())}"
    yield killed
    yield resumed
    yield _read_listed(kept, folder / "listed.log")
    yield _preparation_kills(folder, rng, max(1, count // 5))


def _kill(case: Case, rng: np.random.Generator, seconds: float) -> str:
    """Kills a run that takes so many seconds; in what, or nothing if it had ended before."""
    reached = case.step()
    ahead = reached + int(rng.integers(1, 2 * EVERY + 1))
    with case.fork() as run:
        if rng.random() < _AT_ANY_TIME:
            run.wait(limit=float(rng.uniform(0.1, 1.0)) * seconds)
        else:
            run.wait(until=lambda: case.step() >= ahead)
            time.sleep(float(rng.uniform(0, _PAUSE)))
        if run.poll() is not None:
            return ""
        run.send(signal.SIGKILL)
        run.wait()
    if case.step() <= reached:
        return "before a new step"
    return "in a save" if case.saving() else "in steps or validation"


def _judge_kill(case: Case, reached: int) -> tuple[bool, str]:
    """No more steps are lost of those that were logged, then or before, than a save's interval."""
    now, saved = max(case.step(), reached), (case.saved() or [0])[-1]
    return now - saved <= EVERY, f"at step {now} the newest whole checkpoint is of {saved}"


def _resume(case: Case, good: Case, tally: Tally) -> None:
    with case.fork() as run:
        status = run.wait()
    problem = f"ended with {status}: {case.output()}" if status else differences(case, good)
    tally.expect(not problem, f"{case.workdir.name}: {problem}", otherwise="silent")
    shutil.rmtree(case.workdir)


def _keep_listed(case: Case, place: Path) -> Path:
    """The checkpoints that are listed now, in a workdir of their own; their files are shared."""
    for step in case.saved():
        folder = Path("checkpoints", str(step))
        shutil.copytree(case.workdir / folder, place / folder, copy_function=os.link)
    return place


def _read_listed(workdirs: list[Path], log: Path) -> Tally:
    tally = Tally("after each of those kills all listed checkpoints can be read")
    for problem in unreadable(workdirs, log):
        tally.expect(not problem, problem)
    return tally


def _preparation_kills(folder: Path, rng: np.random.Generator, count: int) -> Tally:
    """Kills preparations, with worker processes and without, and finishes each."""
    from data_prep.main import main as prepare

    tally = Tally("SIGKILL in a preparation; resumed, it has the same bytes")
    data = folder / "killed"
    final, expected = data / "phantom/1.0.0", _contents(folder / "data/phantom/1.0.0")
    arguments = ["--dataset", "chd", "--name", "phantom", "--raw_dir", str(folder / "raw")]
    arguments += ["--data_dir", str(data), "--max_keypoints", "32", "--num_workers"]

    def run(workers: int, limit: float = LIMIT) -> int | None:
        """Prepares, and is killed at the limit; the exit status of what ended before."""
        with Fork(lambda: prepare([*arguments, str(workers)]), folder / "preparation.log") as fork:
            return fork.wait(limit=limit)

    seconds = {}
    for workers in (0, 2):
        begin = time.monotonic()
        run(workers)
        seconds[workers] = time.monotonic() - begin
        shutil.rmtree(data, ignore_errors=True)
    for i in range(count):
        workers = 2 * (i % 2)
        run(workers, limit=float(rng.uniform(0, 1)) * seconds[workers])
        early = final.exists() and _contents(final) != expected
        same = run(0) == 0 and _contents(final) == expected
        problem = "an unfinished dataset was in its place" if early else "failed, or other bytes"
        tally.expect(same and not early, f"try {i}: {problem}", otherwise="silent")
        shutil.rmtree(data, ignore_errors=True)
    return tally


def _contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}
