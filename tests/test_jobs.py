"""Jobs on slots: order, failures, signals, locks and shards, with jobs that only touch files."""

import os
import re
import signal
import subprocess
import sys
import threading
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


def wait_for(path: Path) -> None:
    end = time.monotonic() + 30
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


def test_shards_wait_for_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [job(tmp_path, "a"), job(tmp_path, "b", "a"), job(tmp_path, "c")]
    later = subprocess.Popen(
        [sys.executable, "-c", f"import time; time.sleep(0.4); {TOUCH}", str(tmp_path / "a")]
    )
    assert run_jobs(jobs, ONE, is_ours=lambda i: i > 0) == Outcome((), None)
    later.wait()
    printed = capsys.readouterr().out
    assert order(printed, "start") == ["c", "b"]
    assert printed.count("waiting  for a, which another shard runs") == 1


# A separate scheduler for the given job numbers; `a` fails and `b` needs it.
SHARD = """
import sys
from pathlib import Path
from tests.test_jobs import ONE, job
from kafjax.study import jobs as module
module._POLL_SECONDS, module._LOOK_SECONDS = 0.01, 0.05
module._GRACE_SECONDS = float(sys.argv[2])
root, ours = Path(sys.argv[1]), set(map(int, sys.argv[3:]))
jobs = [job(root, "a", code="raise SystemExit('no such field')"), job(root, "b", "a")]
jobs += [job(root, "c", "b"), job(root, "d")]
print(module.run_jobs(jobs, ONE, is_ours=ours.__contains__))
"""


def start_shard(root: Path, grace: float, *numbers: int) -> subprocess.Popen[str]:
    arguments = [str(root), str(grace), *map(str, numbers)]
    return subprocess.Popen(
        [sys.executable, "-c", SHARD, *arguments], stdout=subprocess.PIPE, text=True
    )


def test_shards_stop_with_the_name_of_what_failed_elsewhere(tmp_path: Path) -> None:
    """The second of three shards needs what fails in the first, the third what the second has."""
    waiting = [start_shard(tmp_path, 60, 2), start_shard(tmp_path, 60, 1, 3)]
    wait_for(tmp_path / "d")  # is done while its shard waits for a
    first = start_shard(tmp_path, 60, 0)
    third, second, first_said = (p.communicate(timeout=30)[0] for p in (*waiting, first))
    assert "Outcome(failed=('a',), received=None)" in first_said
    assert "Outcome(failed=('b',), received=None)" in second
    assert "it needs a, which failed on " in second
    assert "(status 1): no such field" in second
    assert "waiting  for a, which another shard runs" in second
    assert "Outcome(failed=('c',), received=None)" in third
    assert "it needs b, which failed on " in third
    assert not (tmp_path / "b").exists()


def test_marks_of_failures_hold_until_their_shard_starts_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, needs_bad = job(tmp_path, "a", code="raise SystemExit(3)"), job(tmp_path, "b", "a")
    assert run_jobs([bad, needs_bad], ONE, is_ours=lambda i: i == 0) == Outcome(("a",))
    mark = tmp_path / "a.failed"
    assert mark.exists()
    # The second shard alone finds the mark, and believes it after a time.
    monkeypatch.setattr(module, "_GRACE_SECONDS", 0.2)
    capsys.readouterr()
    assert run_jobs([bad, needs_bad], ONE, is_ours=lambda i: i == 1) == Outcome(("b",))
    assert "waiting  for a" in capsys.readouterr().out
    # Both start again, the second first: it does not fall for the mark of the time before.
    monkeypatch.setattr(module, "_GRACE_SECONDS", 60)
    good = bad._replace(command=job(tmp_path, "a").command)
    later = threading.Timer(0.3, lambda: (mark.unlink(), (tmp_path / "a").touch()))
    later.start()
    assert run_jobs([good, needs_bad], ONE, is_ours=lambda i: i == 1) == Outcome()
    later.join()
    mark.touch()
    assert run_jobs([good, needs_bad], ONE) == Outcome()
    assert not list(tmp_path.glob("*.failed"))


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
