"""A bucket on this machine for tests: moto's S3 server, and a proxy that cuts connections."""

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

BUCKET = "bucket"
_ACCESS = {
    "AWS_MAX_ATTEMPTS": "1",  # kafjax tries again by itself
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_CONFIG_FILE": os.devnull,
}


class Proxy:
    """Forwards connections to a port, and cuts the next `cuts` of them in the middle of a body.

    Attributes:
      cuts: how many connections are still to be cut.
      upwards: whether in what is sent, else in what comes back.
      after: bytes that pass first.
      port: of the proxy.
    """

    def __init__(self, target: int):
        self._target = target
        self.cuts, self.upwards, self.after = 0, False, 0
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = self._server.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                for upwards, pair in ((True, (near, far)), (False, (far, near))):
                    threading.Thread(target=self._pass, args=(*pair, upwards), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, upwards: bool) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while part := source.recv(1 << 16):
                passed += len(part)
                if self.cuts and upwards == self.upwards and passed > self.after:
                    self.cuts -= 1
                    sink.sendall(part[: len(part) // 2])
                    break
                sink.sendall(part)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        """Takes no more connections."""
        self._server.close()


@contextlib.contextmanager
def served() -> Iterator[int]:
    """Moto's server with an empty bucket; its port."""
    pytest.importorskip("s3fs")
    boto3 = pytest.importorskip("boto3")
    server_of = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel("ERROR")
    server = server_of.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        aws_access_key_id="key",
        aws_secret_access_key="secret",
        region_name="us-east-1",
    ).create_bucket(Bucket=BUCKET)
    try:
        yield port
    finally:
        server.stop()


def access(port: int, cache: Path) -> dict[str, str]:
    """The environment in which `s3://` is the server at a port."""
    return {**_ACCESS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "KAFJAX_CACHE": str(cache)}


def forget_connections() -> None:
    """Makes fsspec read the environment again."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


def write_files(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def texts(folder: Path) -> dict[str, str]:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): p.read_text() for p in files}


def move_to_machine(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("KAFJAX_CACHE", str(cache))
