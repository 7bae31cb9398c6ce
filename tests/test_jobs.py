"""Jobs on slots: order, failures, signals, and locks, with jobs that only touch files."""

import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from kafjax.study import jobs as module
from kafjax.study.jobs import Job, Outcome, Slot, find_slots, run_jobs

ONE, TWO = [Slot("a")], [Slot("a"), Slot("b")]
# Notes its start, and is done.
TOUCH = "import pathlib, sys; pathlib.Path(sys.argv[1]).touch()"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.005)
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.05)


def job(root: Path, name: str, *needs: str, code: str = TOUCH) -> Job:
    done = root / name
    return Job(name, ("-c", code, str(done)), root / f"{name}.log", done.exists, needs)


def order(printed: str, what: str) -> list[str]:
    lines = [line.split() for line in printed.splitlines()]
    return [line[2] for line in lines if line[1:2] == [what]]


def test_jobs_follow_what_they_need_and_are_not_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [job(tmp_path, "a"), job(tmp_path, "b", "a"), job(tmp_path, "c", "a", "b")]
    (tmp_path / "a").touch()
    assert run_jobs(jobs, TWO) == Outcome((), None)
    printed = capsys.readouterr().out
    assert order(printed, "start") == order(printed, "done") == ["b", "c"]
    assert "(1 of 2) on a: python -c" in printed
    assert re.search(r"c after 0:0\d:\d\d; 0 left", printed)
    assert (tmp_path / "c.log").read_text() == f"$ {jobs[2]}\n"
    assert run_jobs(jobs, TWO) == Outcome((), None)
    assert "start" not in capsys.readouterr().out


def test_slots_run_beside_each_other_in_their_own_environment(tmp_path: Path) -> None:
    """Each waits for the other to have started."""
    code = """
import os, pathlib, sys, time
done = pathlib.Path(sys.argv[1])
(done.parent / f"seen_{os.environ['WHERE']}").touch()
while len(list(done.parent.glob("seen_*"))) < 2:
    time.sleep(0.01)
done.touch()
"""
    slots = [Slot(name, {"WHERE": name}) for name in "xy"]
    jobs = [job(tmp_path, name, code=code) for name in "ab"]
    assert run_jobs(jobs, slots) == Outcome((), None)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux alone has it")
def test_jobs_stay_on_the_cores_of_their_slot(tmp_path: Path) -> None:
    core = max(os.sched_getaffinity(0))
    code = """
import os, pathlib, sys, time
end = time.monotonic() + 5
while len(os.sched_getaffinity(0)) > 1 and time.monotonic() < end:
    time.sleep(0.01)
pathlib.Path(sys.argv[1]).write_text(str(os.sched_getaffinity(0)))
"""
    run_jobs([job(tmp_path, "a", code=code)], [Slot("one", {}, (core,))])
    assert (tmp_path / "a").read_text() == str({core})


def test_failures_are_named_and_independent_jobs_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [
        job(tmp_path, "bad", code="raise SystemExit('first\\nerror: no such field')"),
        job(tmp_path, "idle", code="pass"),
        job(tmp_path, "needs_bad", "bad"),
        job(tmp_path, "last", "needs_bad"),
        job(tmp_path, "good"),
    ]
    assert run_jobs(jobs, ONE) == Outcome(("bad", "idle", "needs_bad", "last"), None)
    printed = capsys.readouterr().out
    assert f"(status 1): error: no such field [{tmp_path / 'bad.log'}]" in printed
    assert re.search(r"idle after 0:0\d:\d\d \(its work is not done\)", printed)
    assert "needs_bad: not started, it needs bad" in printed
    assert (tmp_path / "good").exists()


# Saves at the first signal; says that it is ready, and takes its time.
SAVES = """
import pathlib, signal, sys, time
done = pathlib.Path(sys.argv[1])
def stop(*_):
    done.with_suffix(".saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
done.with_suffix(".ready").touch()
time.sleep(60)
"""
# Runs that job, and one that waits for it.
PARENT = """
import sys
from pathlib import Path
from tests.test_jobs import ONE, SAVES, job
from kafjax.study.jobs import run_jobs
root = Path(sys.argv[1])
print(run_jobs([job(root, "a", code=SAVES), job(root, "b", "a")], ONE))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on_and_waited_for(tmp_path: Path, number: int) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    wait_for(tmp_path / "a.ready")
    parent.send_signal(number)
    printed, _ = parent.communicate(timeout=30)
    assert f"Outcome(failed=(), received={int(number)})" in printed
    assert order(printed, "stopped") == ["a"]
    assert (tmp_path / "a.saved").exists()
    assert not (tmp_path / "b").exists()


def wait_for(path: Path, *, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.01)


def test_a_job_of_a_killed_parent_is_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It holds its log's lock, and is not started a second time."""
    ends = SAVES.replace("time.sleep(60)", "time.sleep(0.5)\ndone.touch()")
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.replace("code=SAVES", f"code={ends!r}"), str(tmp_path)],
        stdout=subprocess.DEVNULL,
    )
    wait_for(tmp_path / "a.ready")
    parent.kill()
    parent.wait()
    assert run_jobs([job(tmp_path, "a"), job(tmp_path, "b", "a")], ONE) == Outcome((), None)
    printed = capsys.readouterr().out
    assert printed.count("a, which another process runs") == 1
    assert order(printed, "start") == ["b"]


def test_slots_are_devices_or_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(answer: str) -> None:
        run = partial(subprocess.CompletedProcess, [], 0, f"a warning\n{answer}\n", "")
        monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: run())

    monkeypatch.setattr(module, "usable_cores", lambda: [4, 5, 6])
    found("cpu 1")
    assert [slot.cores for slot in find_slots()] == [(4,), (5,), (6,)]
    assert [slot.cores for slot in find_slots(2)] == [(4, 6), (5,)]
    with pytest.raises(ValueError, match="slots is 4, expected 1 to 3, the cores there are"):
        find_slots(4)
    found("gpu 2")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in find_slots()] == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in find_slots()] == ["6", "7"]
    found("tpu 4")
    assert find_slots()[3].environment["TPU_VISIBLE_CHIPS"] == "3"
