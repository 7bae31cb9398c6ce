"""XLA setup of the commands, before JAX's devices start, which read the flags once.

Importing kafjax changes nothing; callers opt in.
"""

import importlib.util
import os
from pathlib import Path

_YNNPACK = "--xla_cpu_experimental_ynn_fusion_type"


def set_up_xla() -> None:
    """Disables YNNPACK, and caches compiled programs in the user's cache folder.

    JAX_COMPILATION_CACHE_DIR overrides the folder.
    """
    import jax  # not at the top: benchmarks that only start other processes do not need it

    leave_out_ynnpack()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(home / "kafjax" / "xla"))


def leave_out_ynnpack() -> None:
    """Makes XLA for CPU use only LLVM and Eigen, unless XLA_FLAGS sets the flag.

    A training step of our networks is then faster and needs less memory, and above all, a cached
    program loads in half the time: XLA searches all the program's instructions for each of the
    thousand parts given to YNNPACK. docs/performance.md has the numbers.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    # A TPU's library reads XLA_FLAGS too, and exits at a flag that it does not know.
    if _YNNPACK not in flags and importlib.util.find_spec("libtpu") is None:
        os.environ["XLA_FLAGS"] = f"{flags} {_YNNPACK}=".strip()
