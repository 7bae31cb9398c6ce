"""What a process runs on: versions of the libraries that its numbers depend on, and its devices.

    WORKDIR/environment.json    of the run's last start

It names neither the machine nor its user, so that it can be published with the numbers.
"""

import importlib.metadata
import json
import os
import platform
from collections import Counter

import jax

import kafjax
from kafjax.files import write_text
from kafjax.workdir.workdir import Workdir

_LIBRARIES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets"),
    *("ml-collections", "numpy", "scipy", "matplotlib"),
)

Environment = dict[str, str]


def describe_environment() -> Environment:
    """What this process runs on, by name; starts JAX's devices."""
    kinds = Counter(device.device_kind for device in jax.devices())
    return {
        "kafjax": kafjax.__version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _LIBRARIES},
        "system": f"{platform.system()} {platform.machine()}",
        "processors": str(os.cpu_count()),
        "devices": ", ".join(f"{number} x {kind}" for kind, number in kinds.items()),
        "processes": str(jax.process_count()),
    }


def write_environment(workdir: str | os.PathLike[str]) -> None:
    """Notes in a run's workdir what this process runs on."""
    write_text(
        Workdir(workdir).environment_file, json.dumps(describe_environment(), indent=2) + "\n"
    )
