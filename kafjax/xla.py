"""How commands set up XLA: before JAX's devices start, which read the flags once.

A library's user, whose process it is, calls these or not.
"""

import importlib.util
import os
from pathlib import Path

_YNNPACK = "--xla_cpu_experimental_ynn_fusion_type"


def set_up_xla() -> None:
    """Leaves out YNNPACK, and keeps compiled programs in the user's cache folder.

    Unless JAX is told of another folder, by JAX_COMPILATION_CACHE_DIR.
    """
    import jax  # which benchmarks that only start others do without

    leave_out_ynnpack()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(home / "kafjax" / "xla"))


def leave_out_ynnpack() -> None:
    """Has XLA for CPU use LLVM and Eigen alone, unless XLA_FLAGS says otherwise.

    Of our networks a training step is then faster and needs less memory, and above all, a program
    from the cache is there in half the time: XLA looks for each of a thousand parts that it gave to
    YNNPACK among all the program's instructions. docs/performance.md has the numbers.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    # A TPU's library reads XLA_FLAGS too, and ends the process at one that it does not know.
    if _YNNPACK not in flags and importlib.util.find_spec("libtpu") is None:
        os.environ["XLA_FLAGS"] = f"{flags} {_YNNPACK}=".strip()
