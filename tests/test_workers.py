"""Jobs in processes: results, errors, and the name of the job a killed process held."""

import os
import signal

import pytest

from data_prep.workers import WorkerDied, map_in_processes


def work(job):
    if job == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if job == "exit":
        os._exit(7)
    if job == "raise":
        raise ValueError("a bad job")
    return job, os.getpid()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_job_gives_its_result_or_its_error(num_workers):
    jobs = {name: name for name in ("a", "b", "raise", "c")}
    results = dict(map_in_processes(work, jobs, num_workers=num_workers))
    assert results.keys() == jobs.keys()
    assert isinstance(results["raise"], ValueError)
    assert "bad job" in results["raise"].__notes__[0]  # the traceback, for a report
    here = [results[name][1] == os.getpid() for name in "abc"]
    assert here == [num_workers == 0] * 3
    assert [results[name][0] for name in "abc"] == list("abc")


def test_a_dead_worker_is_reported_with_its_job_and_replaced():
    jobs = {"ct_1": "a", "ct_2": "kill", "ct_3": "exit", "ct_4": "b", "ct_5": "c"}
    results = dict(map_in_processes(work, jobs, num_workers=1))
    assert isinstance(results["ct_2"], WorkerDied)
    assert "memory" in str(results["ct_2"])
    assert isinstance(results["ct_3"], WorkerDied)
    assert "exit status 7" in str(results["ct_3"])
    assert [results[f"ct_{i}"][0] for i in (1, 4, 5)] == ["a", "b", "c"]


def test_closing_the_iterator_ends_the_workers():
    results = map_in_processes(work, {str(i): str(i) for i in range(5)}, num_workers=1)
    _, (_, pid) = next(results)
    results.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_no_jobs_start_no_worker():
    assert list(map_in_processes(work, {}, num_workers=2)) == []
