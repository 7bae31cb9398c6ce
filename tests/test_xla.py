"""How XLA is set up, in processes of their own, since JAX reads its flags once."""

import os
import subprocess
import sys

import pytest

COMPILE = """
from kafjax.xla import leave_out_ynnpack, set_up_xla
{call}
import jax, numpy as np
compiled = jax.jit(lambda a: a @ a).lower(np.ones((256, 256), np.float32)).compile()
print("ynn" in compiled.as_text(), jax.config.jax_compilation_cache_dir)
"""


@pytest.mark.parametrize(
    ("call", "flags", "expected"),
    [
        ("", "", "True None"),
        ("leave_out_ynnpack()", "", "False None"),
        ("set_up_xla()", "", "False {cache}/kafjax/xla"),
        (
            "leave_out_ynnpack()",
            "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT",
            "True None",
        ),
    ],
    ids=["not", "without YNNPACK", "as commands do", "as the user says"],
)
def test_xla_is_set_up(tmp_path, call: str, flags: str, expected: str) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE.format(call=call)],
        env={**kept, "XLA_FLAGS": flags, "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.strip() == expected.format(cache=tmp_path)


RESTART = """
import os, sys
from pathlib import Path
from kafjax.xla import use_huge_pages
{before}
use_huge_pages(Path(sys.argv[1]))
print(os.environ.get("GLIBC_TUNABLES"), sys.argv[2])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="pages of Linux")
@pytest.mark.parametrize(
    ("pages", "tunables", "before", "expected"),
    [
        ("always [madvise] never", None, "", "glibc.malloc.hugetlb=1"),
        (
            "always [madvise] never",
            "glibc.pthread.rseq=1",
            "",
            "glibc.pthread.rseq=1:glibc.malloc.hugetlb=1",
        ),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", "", "glibc.malloc.hugetlb=0"),
        ("[always] madvise never", None, "", "None"),
        ("always madvise [never]", None, "", "None"),
        ("always [madvise] never", None, "import jax", "None"),
        (None, None, "", "None"),
    ],
)
def test_a_command_starts_again_for_huge_pages(tmp_path, pages, tunables, before, expected) -> None:
    setting = tmp_path / "enabled"
    if pages:
        setting.write_text(pages)
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    if tunables:
        environment["GLIBC_TUNABLES"] = tunables
    done = subprocess.run(
        [sys.executable, "-c", RESTART.format(before=before), str(setting), "two words"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.strip() == f"{expected} two words"
