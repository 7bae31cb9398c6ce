"""The CPU cores that this process may use."""

import os


def usable_cores() -> list[int]:
    """Their numbers; on Linux from the CPU affinity, which batch systems use to divide machines."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
