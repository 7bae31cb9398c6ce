"""A function in a process of its own, which a test may kill."""

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

LIMIT = 300.0  # seconds, for what should not take ten


@dataclasses.dataclass
class Fork:
    """A function in a process of its own, with its output in a file."""

    function: Callable[[], int]
    log: Path
    devices: int = 1

    def __enter__(self) -> "Fork":
        sys.stdout.flush()
        self.status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            self._work()
        return self

    def _work(self) -> None:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={self.devices}"
        output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        sys.stdout = sys.stderr = os.fdopen(output, "w", buffering=1)
        status = 1
        try:
            status = self.function()
        except KeyboardInterrupt:
            status = 130
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status

    def wait(self, until: Callable[[], bool] = lambda: False, limit: float = LIMIT) -> int | None:
        """Waits for its end, or until something holds."""
        end = time.monotonic() + limit
        while self.poll() is None and not until() and time.monotonic() < end:
            time.sleep(0.005)
        return self.status

    def send(self, number: int) -> None:
        """Sends a signal if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def __exit__(self, *_: object) -> None:
        self.send(signal.SIGKILL)
        if self.status is None:
            os.waitpid(self.pid, 0)
