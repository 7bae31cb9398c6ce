"""Fixtures that write files: synthetic volumes, and a dataset prepared from them.

Each process of a parallel test run makes its own, in its own temporary folder.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kafjax.xla import leave_out_ynnpack

# Before JAX starts: tests compile much and compute little. Without optimisations compiling takes
# half of the time, with the older emitters of kernels, and as one part, another third less.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    " --xla_cpu_parallel_codegen_split_count=1"
)
leave_out_ynnpack()
# What one test, or process of a test, has compiled is there for all others.
CACHE = Path(__file__).parents[1] / ".pytest_cache" / "xla"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# In this process, where tests replace parts of the code, nothing is kept for later ones.
os.environ["KAFJAX_PROGRAMS"] = "0"

from kafjax import paths  # noqa: E402
from tests.buckets import BUCKET, Proxy, access, forget_connections, served  # noqa: E402
from tests.shapes import check_signatures  # noqa: E402 - imports JAX

check_signatures()


@pytest.fixture(autouse=True)
def no_bucket_is_named() -> Iterator[None]:
    """A command that was only parsed leaves no bucket for the next one of this process."""
    yield
    paths._copies.clear()


@pytest.fixture(scope="session")
def phantom_raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four phantom subjects, 64 x 64 x 12, in the CHD layout."""
    from data_prep.phantom.subjects import write_subjects

    raw_dir = tmp_path_factory.mktemp("raw")
    write_subjects(raw_dir, 4, size=(64, 64, 12))
    return raw_dir


@pytest.fixture(scope="session")
def phantom_dataset(phantom_raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of `phantom_raw` prepared with K = 64, reach 1: DATA/phantom/1.0.0."""
    from data_prep.builder import Options
    from data_prep.prepare import prepare_dataset
    from data_prep.readers import READERS

    return prepare_dataset(
        READERS["chd"],
        phantom_raw,
        tmp_path_factory.mktemp("data"),
        name="phantom",
        options=Options(max_keypoints=64),
        num_workers=0,
    ).directory


@pytest.fixture(scope="session")
def s3_server() -> Iterator[int]:
    """The port of an S3 server on this machine, with a bucket."""
    with served() as port:
        yield port


@pytest.fixture
def proxy(s3_server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before the server, at which `s3://` is; with a cache of its own."""
    import s3fs

    from kafjax.buckets import store

    proxy = Proxy(s3_server)
    for name, value in access(proxy.port, tmp_path / "cache").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(store, "WAITS", (0.1, 0.1))
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    forget_connections()
    yield proxy
    forget_connections()
    proxy.close()


@pytest.fixture
def bucket_url(proxy: Proxy, request: pytest.FixtureRequest) -> str:
    """A folder of the bucket, for one test."""
    return f"s3://{BUCKET}/{request.node.name}"


# Files that take longest, which a worker should not begin last. xdist would sort them by their
# number of tests without `--no-loadscope-reorder`.
_LONGEST = (
    *("golden", "end_to_end", "auto", "step", "loop", "pretraining", "cross_validation", "models"),
    *("programs", "regions", "augment", "wheel", "unet", "validation", "local_contrast"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Starts with the files that take longest: workers then end together."""
    first = [f"test_{name}.py" for name in _LONGEST]
    items.sort(key=lambda i: first.index(i.path.name) if i.path.name in first else len(first))
