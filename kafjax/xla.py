"""XLA and memory setup of the commands, before JAX's devices start, which read the flags once.

Importing kafjax changes nothing; callers opt in.
"""

import importlib.util
import os
import sys
from pathlib import Path

_YNNPACK = "--xla_cpu_experimental_ynn_fusion_type"
# As GLIBC_TUNABLES.
HUGE_PAGES = "glibc.malloc.hugetlb=1"
_PAGES_OF_SYSTEM = Path("/sys/kernel/mm/transparent_hugepage/enabled")


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


def use_huge_pages(setting: Path = _PAGES_OF_SYSTEM) -> None:
    """Starts this command again with huge pages for large pieces of memory, if that is a gain.

    XLA for CPU maps a step's temporaries anew at each step; in pages of 4 KB a sixth of the step
    goes into page faults. glibc reads its variable only when a program starts, so a command calls
    this first. Nothing happens if JAX has been imported, under a debugger, where the system uses
    huge pages without being asked or never, and where GLIBC_TUNABLES already says how to allocate.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if "jax" in sys.modules or sys.gettrace() is not None or "glibc.malloc" in tunables:
        return
    if not sys.executable or not _asks_for_huge_pages(setting):
        return
    environment = {**os.environ, "GLIBC_TUNABLES": f"{tunables}:{HUGE_PAGES}".lstrip(":")}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _asks_for_huge_pages(setting: Path) -> bool:
    """Whether this system gives huge pages only on request, and its C library can request them."""
    try:
        library, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        since = tuple(map(int, version.split(".")[:2]))
        return library == "glibc" and since >= (2, 35) and "[madvise]" in setting.read_text()
    except (OSError, ValueError, AttributeError):  # no Linux, or not this C library
        return False
