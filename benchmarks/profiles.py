"""Which kernels a step spends its time in, from JAX's and PyTorch's profilers."""

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Kernel(NamedTuple):
    """A kind of kernel: seconds a step, and its share of all kernels' time."""

    name: str
    seconds: float
    share: float


def top_kernels(events: Iterable[tuple[str, float]], steps: int, count: int = 10) -> list[Kernel]:
    """The kinds of kernels that take longest, of (name, seconds) of each launch in `steps` steps.

    Kernels of one kind differ in the number at their end alone, as XLA's fusions do.
    """
    totals: Counter[str] = Counter()
    for name, seconds in events:
        totals[re.sub(r"([._]\d+)+$", "", name)] += seconds  # type: ignore[assignment]
    whole = sum(totals.values())
    return [
        Kernel(name, seconds / steps, seconds / whole)
        for name, seconds in totals.most_common(count)
    ]


def profile_jax(step: Callable[[], Any], steps: int = 2) -> list[Kernel]:
    """Top kernels of calls of a JAX step on a GPU; empty if its profiler reports none."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                step()
        (path,) = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(path)).planes
        return top_kernels(device_events(planes), steps)


def device_events(planes: Iterable[Any]) -> Iterator[tuple[str, float]]:
    """(name, seconds) of each kernel on a GPU's streams."""
    for plane in planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if line.name.startswith("Stream"):
                yield from ((event.name, event.duration_ns / 1e9) for event in line.events)


def profile_torch(step: Callable[[], Any], steps: int = 2) -> list[Kernel]:
    """Top kernels of calls of a PyTorch step on a GPU; none where there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        return []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
    events = (
        (event.key, event.self_device_time_total / 1e6)
        for event in profiler.key_averages()
        if event.self_device_time_total
    )
    return top_kernels(events, steps)
