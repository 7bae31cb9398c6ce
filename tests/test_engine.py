"""Preparation and studies on a dask cluster: two workers on loopback, one killed in the middle."""

import contextlib
import filecmp
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep import main as prepare
from data_prep.builder import Options
from data_prep.prepare import prepare_dataset
from data_prep.readers import READERS
from data_prep.workers import WorkerDied, map_in_processes
from kafjax import errors
from kafjax.cluster import open_cluster
from kafjax.study.jobs import Outcome, run_jobs
from tests.test_jobs import job, order, wait_for


@contextlib.contextmanager
def two_workers() -> Iterator[Any]:
    with open_cluster("local", [{"WHERE": "first"}, {"WHERE": "second"}]) as client:
        client.wait_for_workers(2, timeout=180)
        yield client


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with two_workers() as client:
        yield client


@pytest.mark.parametrize("place", ["here", "tcp://127.0.0.1:9"])
def test_a_place_without_a_cluster_is_one_line(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kafjax.cluster._ANSWER_SECONDS", 0.2)
    where = ("--raw_dir", str(tmp_path), "--data_dir", str(tmp_path))
    assert prepare.main(["--dataset", "chd", *where, "--cluster", place]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: --cluster") and message.count("\n") == 1


def test_missing_dask_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with (
        pytest.raises(errors.UserError, match=r"pip install 'kafjax\[cluster\]'"),
        open_cluster("local", [{}]),
    ):
        pass


def work(path: Path) -> int:
    """Kills its worker the first time, or each time; else its square."""
    if path.name == "bad":
        raise ValueError("a bad job")
    if path.name in ("once", "always") and not path.exists():
        if path.name == "once":
            path.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.2)
    return os.getpid()


@pytest.mark.slow
def test_jobs_of_killed_workers_move_on_and_what_kills_is_named(
    client: Any, tmp_path: Path
) -> None:
    names = ("a", "once", "bad", "b", "always", "c")
    jobs = {name: tmp_path / name for name in names}
    results = dict(map_in_processes(work, jobs, num_workers=0, client=client))
    assert results.keys() == jobs.keys()
    assert {type(results[name]) for name in ("a", "once", "b", "c")} == {int}
    assert isinstance(results["bad"], ValueError)
    assert isinstance(results["always"], WorkerDied)


@pytest.mark.slow
def test_a_worker_killed_in_a_preparation_changes_no_byte(
    client: Any, phantom_raw: Path, tmp_path: Path
) -> None:
    def prepared(folder: str, client: Any = None) -> Path:
        return prepare_dataset(
            READERS["chd"],
            phantom_raw,
            tmp_path / folder,
            name="phantom",
            options=Options(max_keypoints=64),
            num_workers=0,
            client=client,
        ).directory

    # As soon as a first shard is there.
    code = """
import os, pathlib, signal, sys, time
notes = pathlib.Path(sys.argv[1]) / "phantom" / ".1.0.0.preparing" / "volumes"
while not list(notes.glob("ct_*.json")):
    time.sleep(0.001)
os.kill(int(sys.argv[2]), signal.SIGKILL)
"""
    victim = next(iter(client.run(os.getpid).values()))
    killer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "two"), str(victim)])
    one, two = prepared("one"), prepared("two", client)
    assert killer.wait(timeout=30) == 0
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    assert filecmp.cmpfiles(one, two, names, shallow=False) == (names, [], [])


# Counts to three; notes each number and who its worker is, and starts where it was stopped.
COUNTS = """
import os, pathlib, sys, time
done = pathlib.Path(sys.argv[1])
notes = done.with_suffix(".notes")
notes.touch()
for number in range(len(notes.read_text().split()), 3):
    time.sleep(1)
    with notes.open("a") as stream:
        stream.write(f"{number}\\n")
done.with_suffix(".worker").write_text(os.environ["WHERE"])
done.touch()
"""


@pytest.mark.slow
@pytest.mark.parametrize("with_children", [False, True])
def test_a_job_of_a_killed_worker_loses_nothing(
    client: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], with_children: bool
) -> None:
    """A job whose process died with its worker resumes; one that still runs is waited for."""
    code = """
import os, pathlib, signal, sys, time
import psutil
root = pathlib.Path(sys.argv[1])
while not (root / "a.notes").exists() or not (root / "a.notes").read_text():
    time.sleep(0.01)
for pid in map(int, sys.argv[3:]):
    worker = psutil.Process(pid)
    children = [c for c in worker.children() if str(root / "a") in c.cmdline()]
    if children:
        worker.kill()
        if sys.argv[2] == "True":
            children[0].kill()
"""
    workers = [str(pid) for pid in client.run(os.getpid).values()]
    killer = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), str(with_children), *workers]
    )
    jobs = [
        job(tmp_path, "a", code=COUNTS),
        job(tmp_path, "b", code=COUNTS),
        job(tmp_path, "bad", code="raise SystemExit('error: no such field')"),
        job(tmp_path, "c", "a", "b", code=COUNTS),
        job(tmp_path, "d", "bad"),
    ]
    assert run_jobs(jobs, [], client=client) == Outcome(("bad", "d"), None)
    assert killer.wait(timeout=30) == 0
    printed = capsys.readouterr().out
    assert "(status 1): error: no such field" in printed and "it needs bad" in printed
    for name in "abc":
        assert (tmp_path / f"{name}.notes").read_text() == "0\n1\n2\n"
        assert (tmp_path / f"{name}.worker").read_text() in ("first", "second")
    # Once by its killed worker, and once more by the other.
    assert (tmp_path / "a.log").read_text().count("$ python") == 2
    assert order(printed, "start")[-1] == "c"


PARENT = """
import sys
from pathlib import Path
from tests.test_engine import two_workers
from tests.test_jobs import SAVES, job
from kafjax.study.jobs import run_jobs
if __name__ == "__main__":
    root = Path(sys.argv[1])
    with two_workers() as client:
        jobs = [job(root, name, code=SAVES) for name in ("a", "b", "c")]
        print(run_jobs(jobs, [], client=client))
"""


@pytest.mark.slow
def test_a_signal_stops_the_jobs_of_all_workers_and_starts_no_other(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    wait_for(tmp_path / "a.ready", seconds=180)
    wait_for(tmp_path / "b.ready", seconds=180)
    parent.send_signal(signal.SIGTERM)
    printed, _ = parent.communicate(timeout=60)
    assert f"Outcome(failed=(), received={int(signal.SIGTERM)})" in printed
    assert (tmp_path / "a.saved").exists() and (tmp_path / "b.saved").exists()
    assert not (tmp_path / "c.ready").exists()
