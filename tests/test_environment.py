"""What a process says that it runs on."""

import json
import os
import platform
import socket
from pathlib import Path

import jax
import numpy as np

import kafjax
from kafjax.workdir.environment import describe_environment, write_environment


def test_environment_has_versions_and_devices_and_names_nobody(tmp_path: Path) -> None:
    write_environment(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["environment.json"]
    text = (tmp_path / "environment.json").read_text()
    found = json.loads(text)
    assert found == describe_environment()
    expected = {"kafjax": kafjax.__version__, "jax": jax.__version__, "numpy": np.__version__}
    expected |= {"python": platform.python_version(), "devices": f"{jax.device_count()} x cpu"}
    assert found == found | expected
    assert socket.gethostname() not in text
    assert os.path.expanduser("~") not in text
