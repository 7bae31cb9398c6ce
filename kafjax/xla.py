"""XLA setup of the commands, before JAX's devices start, which read the flags once.

Importing kafjax changes nothing; callers opt in.
"""

import importlib.util
import os
from pathlib import Path

_YNNPACK = "--xla_cpu_experimental_ynn_fusion_type"


def set_up_xla() -> None:
    """Disables YNNPACK, and caches compiled programs in the user's cache folder.

    JAX_COMPILATION_CACHE_DIR overrides the folder. KAFJAX_PROGRAMS=0 traces at each start.
    """
    # Not at the top: benchmarks that only start other processes do not need JAX.
    import jax

    from kafjax.programs import keep_programs

    leave_out_ynnpack()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(home / "kafjax" / "xla"))
    options = jax.config.values
    cache = options["jax_enable_compilation_cache"] and options["jax_compilation_cache_dir"]
    if cache and os.environ.get("KAFJAX_PROGRAMS") != "0":
        keep_programs(Path(cache) / "programs")


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
