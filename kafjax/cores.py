"""The cores of the CPU that this process may use."""

import os


def usable_cores() -> list[int]:
    """Their numbers; on Linux those of the affinity, by which batch systems share out machines."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
