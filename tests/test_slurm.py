"""The scripts of docs/recipes.md in a real SLURM of one node: processes, requeue, an array."""

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kafjax.checkpoint import checkpointer as checkpoint
from kafjax.files import flatten
from kafjax.workdir.metrics import read_metrics
from tests.runs import OVERRIDES, PLAIN, ROOT, XLA_FLAGS, command_environment, run_command
from tests.slurm import Cluster, installed, one_node

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not installed(), reason="needs root and Debian's slurm-wlm"),
]

# In float64 two processes equal one of two devices; the plain UNet compiles soonest.
EXACT = "float64"
TINY = {**OVERRIDES, **PLAIN, "batch_size": 4, "model.dtype": EXACT, "num_epochs": 1000}
# Long enough for a signal to arrive.
STEPS = 500


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    environment = {**command_environment(folder / "bin"), "JAX_ENABLE_X64": "1"}
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


def test_a_run_of_two_tasks_is_stopped_requeued_and_equal_to_an_undisturbed_one(
    cluster: Cluster, phantom_dataset: Path, tmp_path: Path
) -> None:
    fields = {**TINY, "data.dir": phantom_dataset.parents[1], "num_steps": STEPS}
    workdir, output = tmp_path / "two", tmp_path / "output"
    script = tmp_path / "script"
    line = f"--config phantom_pretrain {flags(fields)} --workdir {workdir}"
    script.write_text(printed_script(0, **{"--config chd_pretrain": line}))
    # The command line's options count instead of the script's.
    one_node = ("--nodes=1", "--ntasks-per-node=2", "--gres=none", "--cpus-per-task=1")
    job = cluster.submit(script, output, *one_node)
    end = time.monotonic() + 600
    while not (output.exists() and "step 3/" in output.read_text()):
        assert time.monotonic() < end, output.read_text() if output.exists() else "no output"
        time.sleep(0.2)
    # To the tasks and not to the script, as --signal=TERM@300 does.
    cluster.call("scancel", "--signal=TERM", job)
    while "Stopped by a signal" not in output.read_text():
        assert time.monotonic() < end, output.read_text()
        time.sleep(0.2)
    # A requeued job waits for two minutes by default.
    time.sleep(5)
    cluster.call("scontrol", "update", f"jobid={job}", "StartTime=now")
    cluster.wait(job, output)
    text = output.read_text()
    assert re.search(r"from step \d+", text), text
    assert "Restarts=1" in cluster.call("scontrol", "show", "job", job)

    extra = [f"--config.{name}={value}" for name, value in fields.items()]
    status, text = run_command(
        phantom_dataset, tmp_path / "one", *extra, devices=2, JAX_ENABLE_X64="1"
    )
    assert status == 0, text
    steps = [[row["step"] for row in read_metrics(tmp_path / name)] for name in ("one", "two")]
    assert steps[0] == steps[1] == list(range(1, STEPS + 1))
    one, two = (flatten(checkpoint.load_variables(tmp_path / name)) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=1e-6, atol=1e-9, err_msg=name)


def test_an_array_trains_a_fold_in_each_task(
    cluster: Cluster, phantom_dataset: Path, tmp_path: Path
) -> None:
    fields = {
        **{name: value for name, value in TINY.items() if not name.startswith("loss")},
        "data.dir": phantom_dataset.parents[1],
        "num_steps": 1,
    }
    for name in ("model.num_matcher_layers", "model.num_sinkhorn_iterations", "model.embedding"):
        del fields[name]
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


def test_outside_of_a_cluster_distributed_is_a_mistake(
    phantom_dataset: Path, tmp_path: Path
) -> None:
    status, output = run_command(phantom_dataset, tmp_path / "w", "--distributed")
    assert status == 2
    assert "--distributed: this is no SLURM" in output
    assert not (tmp_path / "w").exists()
