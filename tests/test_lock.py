"""One process at a time in a folder."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kafjax.workdir.lock import LockedError, locked

HOLD = """
import pathlib, sys, time
from kafjax.workdir.lock import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def owner(tmp_path: Path):
    """A process that holds the lock of `tmp_path`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "lock")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_told_the_first_ones_host_and_process(owner, tmp_path: Path) -> None:
    expected = f"{os.uname().nodename}.* since "
    with (
        pytest.raises(LockedError, match=f"in use by process {owner.pid} on {expected}"),
        locked(tmp_path / "lock"),
    ):
        pass


def test_the_lock_of_a_killed_process_is_taken_over(owner, tmp_path: Path) -> None:
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    with locked(tmp_path / "lock"):
        assert str(os.getpid()) in (tmp_path / "lock").read_text()
    assert (tmp_path / "lock").read_text() == ""


def test_who_waits_comes_after_the_owner(tmp_path: Path) -> None:
    order = []

    def wait() -> None:
        with locked(tmp_path / "lock", wait=True):
            order.append("second")

    with locked(tmp_path / "lock"):
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(timeout=0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
