"""Two hosts on this machine: network namespaces with an address each, joined by a cable."""

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

# Of the block for documentation (RFC 5737), which is nobody's.
ADDRESSES = ("192.0.2.1", "192.0.2.2")


class Hosts:
    """Both namespaces, by number."""

    def __init__(self) -> None:
        self._names = tuple(f"kafjax{os.getpid()}h{i}" for i in range(2))

    def enter(self, number: int) -> list[str]:
        """The words before a command that runs it on a host."""
        return ["ip", "netns", "exec", self._names[number]]

    def plug(self, state: str) -> None:
        """Cuts the cable ('down') or mends it ('up')."""
        _ip("-n", self._names[0], "link", "set", "cable", state)

    def _build(self) -> None:
        for name, address in zip(self._names, ADDRESSES, strict=True):
            _ip("netns", "add", name)
            # A host finds its own address by its name, as the collectives of JAX on CPU do.
            files = Path("/etc/netns") / name
            files.mkdir(parents=True)
            hosts = f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n"
            (files / "hosts").write_text(hosts)
        first, second = self._names
        _ip("-n", first, "link", "add", "cable", "type", "veth", "peer", "cable", "netns", second)
        for name, address in zip(self._names, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                _ip("-n", name, "link", "set", device, "up")

    def _remove(self) -> None:
        for name in self._names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Makes the namespaces, and removes them at the end."""
    hosts = Hosts()
    try:
        hosts._build()
        yield hosts
    finally:
        hosts._remove()


def possible() -> bool:
    """Whether this process may make network namespaces."""
    return os.geteuid() == 0 and shutil.which("ip") is not None
