"""The environment of a process: versions of libraries that affect its numbers, and its devices.

    WORKDIR/environment.json    of the run's last start
    kafjax --version            the same for a bug report, without the devices

It names neither the machine nor the user, so it can be published with the numbers.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
from collections import Counter
from pathlib import Path

import kafjax
from kafjax.cores import usable_cores
from kafjax.files import write_text

_LIBRARIES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets"),
    *("ml-collections", "numpy", "scipy", "matplotlib"),
)
# Reported if installed: for accelerators, raw volumes and the release's weights.
_EXTRAS = (
    *("jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu", "opencv-python-headless"),
    *("opencv-python", "nibabel", "tensorflow", "tensorflow-cpu", "torch"),
)

Environment = dict[str, str]


def describe_environment(*, devices: bool = True) -> Environment:
    """This process's environment, by name; `devices` imports JAX and starts its devices."""
    versions = {name: _version(name) for name in (*_LIBRARIES, *_EXTRAS)}
    environment = {
        "kafjax": kafjax.__version__,
        "python": platform.python_version(),
        **{name: version for name, version in versions.items() if version or name in _LIBRARIES},
        "system": _system(),
        "processor": _processor(),
        "processors": str(len(usable_cores())),
    }
    if devices:
        import jax  # slow to import

        kinds = Counter(device.device_kind for device in jax.devices())
        environment["devices"] = ", ".join(f"{number} x {kind}" for kind, number in kinds.items())
        environment["processes"] = str(jax.process_count())
    return environment


def write_environment(workdir: str | os.PathLike[str]) -> None:
    """Records this process's environment in a run's workdir."""
    from kafjax.workdir.workdir import Workdir  # imports JAX, which --version avoids

    text = json.dumps(describe_environment(), indent=2) + "\n"
    write_text(Workdir(workdir).environment_file, text)


def _version(library: str) -> str:
    """The installed version; empty if not installed."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _system() -> str:
    release = platform.mac_ver()[0]
    with contextlib.suppress(OSError):
        release = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    return " ".join(filter(None, (platform.system(), platform.machine(), release)))


def _processor() -> str:
    """The CPU's kind."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
