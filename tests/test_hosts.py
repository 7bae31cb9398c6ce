"""A run on two hosts that only a network joins: equal to one process, and what a cut cable does."""

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from kafjax.checkpoint import checkpointer as checkpoint
from kafjax.errors import TRY_AGAIN
from kafjax.files import flatten
from tests.hosts import ADDRESSES, Hosts, possible, two_hosts
from tests.runs import PLAIN, run_command, start_command, without_time

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not possible(), reason="needs root and Debian's iproute2"),
]

HEARTBEAT = 10
STEPS = 16
EXACT = {"JAX_ENABLE_X64": "1"}  # two processes then equal one of two devices
EXTRA = (
    *(f"--config.{field}={value}" for field, value in PLAIN.items()),
    "--config.model.dtype=float64",
    "--config.batch_size=4",
    "--config.every.checkpoint=2",
    f"--config.num_steps={STEPS}",
)


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with two_hosts() as made:
        yield made


def run_on_both(
    hosts: Hosts, dataset: Path, workdir: Path, *, at_step_5: Callable[[], None] = lambda: None
) -> tuple[list[int], list[str], float]:
    """Exit statuses, outputs, and the seconds from step 5 to the end of the later process."""
    together = [
        start_command(
            dataset,
            workdir,
            *EXTRA,
            f"--coordinator={ADDRESSES[0]}:12345",
            "--num_processes=2",
            f"--process_id={i}",
            f"--heartbeat_seconds={HEARTBEAT}",
            prefix=hosts.enter(i),
            **EXACT,
        )
        for i in range(2)
    ]
    try:
        lines, since = "", time.monotonic()
        assert together[0].stdout is not None
        for line in together[0].stdout:
            lines += line
            if line.startswith("step 5/"):
                since = time.monotonic()
                at_step_5()
                break
        outputs = [process.communicate(timeout=300)[0] for process in together]
    finally:
        for process in together:
            process.kill()
    outputs[0] = lines + outputs[0]
    return [process.returncode for process in together], outputs, time.monotonic() - since


@pytest.fixture(scope="module")
def undisturbed(
    hosts: Hosts, phantom_dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    statuses, outputs, _ = run_on_both(hosts, phantom_dataset, workdir)
    assert statuses == [0, 0], outputs
    return workdir


def bits(workdir: Path) -> dict[str, bytes]:
    return {
        name: np.asarray(value).tobytes()
        for name, value in flatten(checkpoint.load_variables(workdir)).items()
    }


def test_the_hosts_are_apart(hosts: Hosts) -> None:
    command = ["bash", "-c", f"exec 3<>/dev/tcp/{ADDRESSES[0]}/22222"]
    listener = [
        *hosts.enter(0),
        "python3",
        "-c",
        f"import socket; s = socket.create_server(('{ADDRESSES[0]}', 22222)); print(1, flush=True);"
        "s.accept(); s.accept()",
    ]
    server = subprocess.Popen(listener, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None and server.stdout.readline() == "1\n"
        assert subprocess.run([*hosts.enter(1), *command], timeout=30).returncode == 0
        hosts.plug("down")
        assert subprocess.run([*hosts.enter(1), *command], timeout=30).returncode != 0
    finally:
        hosts.plug("up")
        server.kill()
        server.communicate()


def test_two_hosts_train_as_one_process(
    undisturbed: Path, phantom_dataset: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "alone"
    status, output = run_command(phantom_dataset, alone, *EXTRA, devices=2, **EXACT)
    assert status == 0, output
    one, two = (flatten(checkpoint.load_variables(w)) for w in (alone, undisturbed))
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=1e-6, atol=1e-9, err_msg=name)
    rows = [without_time(w) for w in (alone, undisturbed)]
    assert len(rows[0]) == STEPS
    for a, b in zip(*rows, strict=True):
        assert a == pytest.approx(b, rel=1e-6)


def test_a_cable_cut_for_five_seconds_changes_nothing(
    hosts: Hosts, undisturbed: Path, phantom_dataset: Path, tmp_path: Path
) -> None:
    def cut() -> None:
        hosts.plug("down")
        time.sleep(5)
        hosts.plug("up")

    statuses, outputs, _ = run_on_both(hosts, phantom_dataset, tmp_path / "run", at_step_5=cut)
    assert statuses == [0, 0], outputs
    assert without_time(tmp_path / "run") == without_time(undisturbed)
    assert bits(tmp_path / "run") == bits(undisturbed)


def test_a_cable_cut_for_good_ends_both_which_then_resume(
    hosts: Hosts, undisturbed: Path, phantom_dataset: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    try:
        statuses, outputs, seconds = run_on_both(
            hosts, phantom_dataset, workdir, at_step_5=lambda: hosts.plug("down")
        )
    finally:
        hosts.plug("up")
    print(statuses, seconds, *outputs, sep="\n")
    assert statuses == [TRY_AGAIN, TRY_AGAIN], outputs
    for output in outputs:
        assert "error: another process of the run has ended; start all" in output
    assert seconds < 2 * HEARTBEAT + 10

    statuses, outputs, _ = run_on_both(hosts, phantom_dataset, workdir)
    assert statuses == [0, 0], outputs
    assert "from step 4" in outputs[0]
    assert without_time(workdir) == without_time(undisturbed)
    assert bits(workdir) == bits(undisturbed)
