"""A real SLURM of one node on this machine: its daemons, and jobs from the scripts of the docs."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.runs import ROOT, free_address

DAEMONS = ("munged", "slurmctld", "slurmd")
_CONFIG = """\
ClusterName=kafjax
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Cluster:
    """A running SLURM; `environment` is that of its commands."""

    environment: dict[str, str]

    def call(self, *command: str) -> str:
        """A SLURM command's output."""
        done = subprocess.run(
            command, env=self.environment, cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, script: Path, output: Path, *options: str) -> str:
        """Queues a script; returns the job's number."""
        return self.call(
            "sbatch", "--parsable", f"--output={output}", *options, str(script)
        ).strip()

    def states(self, job: str) -> list[str]:
        """The states of a job, one for each element of an array."""
        return re.findall(r"JobState=(\w+)", self.call("scontrol", "show", "job", job))

    def wait(self, job: str, output: Path, *, seconds: float = 900) -> None:
        """Waits until all of a job is complete, and fails with its output if it does not."""
        end = time.monotonic() + seconds
        while set(states := self.states(job)) != {"COMPLETED"}:
            text = output.read_text() if output.exists() else ""
            assert time.monotonic() < end, f"{states}\n{text}"
            assert not {"FAILED", "CANCELLED", "TIMEOUT"} & set(states), f"{states}\n{text}"
            time.sleep(1)


@contextlib.contextmanager
def one_node(folder: Path, environment: dict[str, str]) -> Iterator[Cluster]:
    """Starts SLURM's daemons on the loopback interface, and stops them at the end."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    ports = [free_address().rpartition(":")[2] for _ in range(2)]
    config = folder / "slurm.conf"
    config.write_text(
        _CONFIG.format(
            host=socket.gethostname().split(".")[0], ports=ports, folder=folder, user="root"
        )
    )
    environment = {**environment, "SLURM_CONF": str(config)}
    files = [
        *(
            f"--key-file={key}",
            f"--socket={folder}/munge.socket",
            f"--pid-file={folder}/munged.pid",
        ),
        *(f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed"),
    ]
    started = []
    try:
        for command in (
            ["munged", "--foreground", "--force", *files],
            ["slurmctld", "-D", "-f", str(config)],
            ["slurmd", "-D", "-f", str(config)],
        ):
            with (folder / f"{command[0]}.out").open("wb") as out:
                started.append(
                    subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
                )
            time.sleep(1)
        cluster = Cluster(environment)
        end = time.monotonic() + 60
        while "idle" not in cluster.call("sinfo", "--noheader", "--format=%T"):
            assert time.monotonic() < end, (folder / "slurmd.log").read_text()
            time.sleep(1)
        yield cluster
    finally:
        # What a failed test has left would keep the daemons.
        subprocess.run(["scancel", "--user=root"], env=environment, check=False)
        for process in reversed(started):
            process.terminate()
        for process in reversed(started):
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()


def installed() -> bool:
    """Whether SLURM is here, and may be started."""
    return os.geteuid() == 0 and all(map(shutil.which, DAEMONS))
