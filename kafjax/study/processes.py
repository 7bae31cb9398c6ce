"""The processes of a study's jobs: of this machine, or of the workers of a dask cluster.

A job's process holds its log's lock, so that one whose parent was killed is not started again.
"""

import fcntl
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from kafjax.cluster import resources_of

KILLED = 128 + signal.SIGKILL
# For the files of a worker elsewhere to be seen here.
_DISK_SECONDS = 60.0


class Cluster:
    """The workers of a dask cluster, as where jobs run."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._resources = resources_of(client)
        self._session = uuid.uuid4().hex

    def start(
        self, title: str, command: Sequence[str], log: Path, is_done: Callable[[], bool]
    ) -> "_Remote":
        """Queues a job for a worker."""
        arguments = (self._session, title, command, str(log), os.getcwd())
        future = self._client.submit(
            _run_on_worker, *arguments, pure=False, resources=self._resources
        )
        return _Remote(self, is_done, future)

    def stop(self) -> None:
        """Tells all running jobs to save and end, and lets no other one begin."""
        self._client.run(_stop_on_worker, self._session)


class _Remote:
    """A job on a cluster."""

    def __init__(self, cluster: Cluster, is_done: Callable[[], bool], future: Any) -> None:
        self._cluster, self._is_done, self._future = cluster, is_done, future
        self._ended: float | None = None

    def poll(self) -> int | None:
        """The exit status; a success counts when this machine sees its files."""
        if not self._future.done():
            return None
        if self._future.status == "error":
            error = self._future.exception()
            if type(error).__name__ != "KilledWorker":
                raise error
            return KILLED
        status: int = self._future.result()
        self._ended = self._ended or time.monotonic()
        unseen = (
            status == 0 and not self._is_done() and time.monotonic() < self._ended + _DISK_SECONDS
        )
        return None if unseen else status

    def send_signal(self, _: int, /) -> None:
        """Stops all jobs: only that is asked for."""
        self._cluster.stop()

    def terminate(self) -> None:
        """Stops all jobs."""
        self._cluster.stop()


# Of a worker: its processes, and the sessions that were stopped.
_PROCESSES: dict[subprocess.Popen[bytes], str] = {}
_STOPPED: set[str] = set()


def _run_on_worker(session: str, title: str, command: Sequence[str], log: str, folder: str) -> int:
    """Runs a job's command; waits for its process of before, which may outlive a killed worker."""
    file = claim(Path(folder, log), wait=True)
    assert file is not None
    with file:
        if session in _STOPPED:
            return 128 + signal.SIGTERM
        process = open_process(title, command, file, {}, folder)
        _PROCESSES[process] = session
        if session in _STOPPED:  # in the meantime
            process.terminate()
        try:
            return process.wait()
        finally:
            del _PROCESSES[process]


def _stop_on_worker(session: str) -> None:
    _STOPPED.add(session)
    for process, of in list(_PROCESSES.items()):
        if of == session:
            process.terminate()


def open_process(
    title: str,
    command: Sequence[str],
    log: IO[bytes],
    environment: Mapping[str, str],
    folder: str | None = None,
) -> subprocess.Popen[bytes]:
    """Starts a job's command, whose title and output go to its log."""
    log.write(f"$ {title}\n".encode(errors="backslashreplace"))
    log.flush()
    # In a session of its own, so that Ctrl-C at a terminal reaches it once, through us.
    return subprocess.Popen(
        [sys.executable, *command],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, **environment},
        cwd=folder,
        start_new_session=True,
    )


def claim(path: Path, *, wait: bool = False) -> IO[bytes] | None:
    """The log, open to append and locked while it is open.

    None while another process has it, unless it is to be waited for.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    log = path.open("ab")
    try:
        fcntl.flock(log, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        log.close()
        return None
    return log
