"""Runs a script on four simulated devices: their number is fixed when JAX starts."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path


def run_on_four_devices(script: str) -> str:
    """What the script prints, in a process of its own.

    Raises:
      AssertionError: the script failed; with its error output.
    """
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4",
    }
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
        env=environment,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout
