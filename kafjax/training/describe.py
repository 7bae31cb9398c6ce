"""The network of a config as a table of modules and parameter counts."""

from typing import Any

import flax
import numpy as np

from kafjax.tasks.base import HEADS_OF_TASKS, network_shapes

# Each KAF layer of the release has an unused matching projection 256 -> 256 and an unused dustbin
# score; the appendix's table 1 counts them (docs/method.md section 5).
_RELEASE_UNUSED_PER_KAF = 256 * 256 + 256 + 1


def count_parameters(config: Any) -> dict[str, int]:
    """Parameters by module path, two names deep, of a run's network."""
    shapes = network_shapes(config)
    counts: dict[str, int] = {}
    for path, leaf in flax.traverse_util.flatten_dict(shapes["params"]).items():
        module = "/".join(path[:-1][:3] if "kaf" in path else path[:-1][:2])
        counts[module] = counts.get(module, 0) + int(np.prod(leaf.shape))
    return counts


def describe(config: Any) -> str:
    """A printable table of the config's network, and how the paper's numbers follow from it."""
    counts = count_parameters(config)
    total = sum(counts.values())
    width = max(map(len, counts))
    lines = [
        f"{config.model.name}, {HEADS_OF_TASKS[config.task]}, {config.model.filters} filters",
        "",
    ]
    lines += [f"{module:<{width}}  {count:>12,}" for module, count in counts.items()]
    lines += ["-" * (width + 14), f"{'total':<{width}}  {total:>12,}"]
    num_kaf = sum(module.endswith("/kaf") for module in counts)
    if num_kaf:
        unused = num_kaf * _RELEASE_UNUSED_PER_KAF
        lines += [
            "",
            "The paper's release instantiates, and never uses, a matching projection and a dustbin",
            f"score in each KAF layer: {num_kaf} x {_RELEASE_UNUSED_PER_KAF:,} = {unused:,} more. "
            "With them, as the appendix counts,",
            f"{total:,} + {unused:,} = {total + unused:,}.",
        ]
    return "\n".join(lines)
