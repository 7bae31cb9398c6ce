"""The scripts of docs/recipes.md in a real SLURM of one node: processes, requeue, an array."""

import filecmp
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kafjax.checkpoint import checkpointer as checkpoint
from kafjax.files import flatten
from tests.runs import (
    OVERRIDES,
    PLAIN,
    ROOT,
    XLA_FLAGS,
    command_environment,
    run_command,
    without_time,
)
from tests.slurm import Cluster, installed, one_node

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not installed(), reason="needs root and Debian's slurm-wlm"),
]

# The plain UNet compiles soonest.
TINY = {**OVERRIDES, **PLAIN, "batch_size": 4, "num_epochs": 1000}
# Long enough for a signal to arrive.
STEPS = 30


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    environment = command_environment(folder / "bin")
    environment["XLA_FLAGS"] = f"{XLA_FLAGS} --xla_force_host_platform_device_count=1"
    with one_node(folder / "daemons", environment) as running:
        yield running


def printed_script(number: int, **changes: str) -> str:
    """The script of that number in docs/recipes.md's section on SLURM, with words replaced."""
    section = (ROOT / "docs" / "recipes.md").read_text().split("## SLURM")[1].split("\n## ")[0]
    script = re.findall(r"```sh\n(.*?)```", section, re.S)[number]
    for old, new in changes.items():
        assert old in script, old
        script = script.replace(old, new)
    return script


def flags(fields: dict[str, object]) -> str:
    return " ".join(f"--config.{name}='{value}'" for name, value in fields.items())


def start_run(
    cluster: Cluster, dataset: Path, workdir: Path, *options: str, num_steps: int = STEPS
) -> tuple[str, Path]:
    """Submits a run of two tasks; its job and its output."""
    fields = {**TINY, "data.dir": dataset.parents[1], "num_steps": num_steps}
    script, output = workdir.with_suffix(".sh"), workdir.with_suffix(".out")
    line = f"--config phantom_pretrain {flags(fields)} --workdir {workdir}"
    script.write_text(printed_script(0, **{"--config chd_pretrain": line}))
    # The command line's options count instead of the script's.
    one_node = ("--nodes=1", "--ntasks-per-node=2", "--gres=none", "--cpus-per-task=1")
    return cluster.submit(script, output, *one_node, *options), output


def test_a_run_of_two_tasks_is_preempted_twice_and_equal_to_an_undisturbed_one(
    cluster: Cluster, phantom_dataset: Path, tmp_path: Path
) -> None:
    job, output = start_run(cluster, phantom_dataset, tmp_path / "preempted")
    wait_for(output, r"step 3/")
    # To the tasks and not to the script, as --signal=TERM@300 does; the script requeues the job.
    cluster.call("scancel", "--signal=TERM", job)
    wait_for(output, "Stopped by a signal")
    restart(cluster, job, 1)
    stopped = wait_for(output, r"from step (\d+)")
    wait_for(output, rf"step {stopped + 3}/")
    # As a scheduler that needs the node: SIGTERM to all, and back into the queue.
    cluster.call("scontrol", "requeue", job)
    restart(cluster, job, 2)
    cluster.wait(job, output)
    stops = [int(step) for step in re.findall(r"from step (\d+)", output.read_text())]
    assert len(set(stops)) == 2 and 3 <= stops[0] < stops[-1] < STEPS, output.read_text()

    undisturbed, output = start_run(cluster, phantom_dataset, tmp_path / "undisturbed")
    cluster.wait(undisturbed, output)
    rows = [without_time(tmp_path / name) for name in ("preempted", "undisturbed")]
    assert [row["step"] for row in rows[0]] == list(range(1, STEPS + 1))
    assert rows[0] == rows[1]
    one, two = (
        flatten(checkpoint.load_variables(tmp_path / name)) for name in ("preempted", "undisturbed")
    )
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert np.asarray(value).tobytes() == np.asarray(two[name]).tobytes(), name


def test_a_run_at_its_time_limit_saves_and_resumes(
    cluster: Cluster, phantom_dataset: Path, tmp_path: Path
) -> None:
    """SLURM sends the script's signal before the limit, up to a minute early."""
    limit = ("--time=3", "--signal=TERM@60")
    job, output = start_run(cluster, phantom_dataset, tmp_path / "run", *limit, num_steps=12_000)
    wait_for(output, "Stopped by a signal")
    restart(cluster, job, 1)
    step = wait_for(output, r"from step (\d+)")
    wait_for(output, rf"step {step + 1}/")
    cluster.call("scancel", job)
    assert step > 0 and "TIME LIMIT" not in output.read_text(), output.read_text()


def wait_for(output: Path, pattern: str, *, seconds: float = 300) -> int:
    """Waits until a job's output matches; returns the number in it, if any."""
    end = time.monotonic() + seconds
    while not (match := re.search(pattern, output.read_text() if output.exists() else "")):
        text = output.read_text() if output.exists() else "no output"
        assert time.monotonic() < end, text
        time.sleep(0.2)
    return int(match[1]) if match.groups() else 0


def restart(cluster: Cluster, job: str, times: int) -> None:
    """Waits until a job is in the queue again, and starts it at once instead of in two minutes."""
    end = time.monotonic() + 120
    while f"Restarts={times} " not in (found := cluster.call("scontrol", "show", "job", job)):
        assert time.monotonic() < end, found
        time.sleep(0.5)
    while "JobState=COMPLETING" in cluster.call("scontrol", "show", "job", job):
        assert time.monotonic() < end
        time.sleep(0.5)
    cluster.call("scontrol", "update", f"jobid={job}", "StartTime=now")


def test_an_array_trains_a_fold_in_each_task(
    cluster: Cluster, phantom_dataset: Path, tmp_path: Path
) -> None:
    fields = {
        "data.dir": phantom_dataset.parents[1],
        "data.patch_size": (32, 32),
        "data.num_folds": 2,
        "model.name": "unet",
        "model.filters": 4,
        "batch_size": 4,
        "num_steps": 1,
    }
    script = tmp_path / "script"
    script.write_text(
        printed_script(
            1,
            **{
                "--config chd_finetune": f"--config phantom_finetune:scratch {flags(fields)}",
                "--config.init_from=runs/chd_pretrain": "",
                "--num_labeled 2,6,10": "--num_labeled 2",
                "runs/chd": str(tmp_path / "folds"),
            },
        )
    )
    outputs = tmp_path / "output_%a"
    job = cluster.submit(script, outputs, "--array=0-1", "--gres=none")
    cluster.wait(job, tmp_path / "output_0")
    for fold in (0, 1):
        text = (tmp_path / f"output_{fold}").read_text()
        assert list((tmp_path / "folds").glob(f"*fold{fold}*")), text + str(
            os.listdir(tmp_path / "folds")
        )


def test_dask_prepares_in_jobs_of_slurm_one_of_which_is_cancelled(
    cluster: Cluster, phantom_raw: Path, phantom_dataset: Path, tmp_path: Path
) -> None:
    """`--cluster slurm`: each worker is a job, and its end changes no byte."""
    data = tmp_path / "data"
    environment = {
        **cluster.environment,
        "DASK_JOBQUEUE__SLURM__INTERFACE": "lo",
        # This SLURM does not know the node's memory.
        "DASK_JOBQUEUE__SLURM__JOB_DIRECTIVES_SKIP": "['--mem']",
        "DASK_JOBQUEUE__SLURM__LOCAL_DIRECTORY": str(tmp_path / "scratch"),
        "DASK_JOBQUEUE__SLURM__LOG_DIRECTORY": str(tmp_path / "logs"),
    }
    output = tmp_path / "output"
    with output.open("wb") as stream:
        running = subprocess.Popen(
            [
                *(sys.executable, "-m", "data_prep.main", "--dataset", "chd", "--name", "phantom"),
                *("--raw_dir", str(phantom_raw), "--data_dir", str(data)),
                *("--max_keypoints", "64", "--cluster", "slurm", "--num_workers", "2"),
            ],
            env=environment,
            cwd=ROOT,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    notes = data / "phantom" / ".1.0.0.preparing" / "volumes"
    end = time.monotonic() + 300
    while running.poll() is None and not list(notes.glob("ct_*.json")):
        assert time.monotonic() < end, output.read_text()
        time.sleep(0.01)
    names = cluster.call("squeue", "--noheader", "--format=%i")
    if jobs := names.split():
        cluster.call("scancel", jobs[0])
    assert running.wait(timeout=300) == 0, output.read_text()
    made = data / "phantom" / "1.0.0"
    files = sorted(path.name for path in phantom_dataset.iterdir())
    assert files == sorted(path.name for path in made.iterdir())
    assert filecmp.cmpfiles(phantom_dataset, made, files, shallow=False) == (files, [], [])
    assert jobs, "no job was there to be cancelled"


def test_outside_of_a_cluster_distributed_is_a_mistake(
    phantom_dataset: Path, tmp_path: Path
) -> None:
    status, output = run_command(phantom_dataset, tmp_path / "w", "--distributed")
    assert status == 2
    assert "--distributed: this is no SLURM" in output
    assert not (tmp_path / "w").exists()
