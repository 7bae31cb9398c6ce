"""Public names of a package, imported on first use.

Importing `kafjax` or one of its packages is then cheap, and the library parts (models, losses,
assignment, augment) need only JAX and Flax.
"""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def public(
    package: str, groups: Mapping[str, Sequence[str]]
) -> tuple[list[str], Callable[[str], Any]]:
    """A package's `__all__` and `__getattr__` (PEP 562).

    Args:
      package: its `__name__`.
      groups: public names by module, relative to the package, such as '.loop'.
    """
    places = {name: module for module, names in groups.items() for name in names}

    def get(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(places[name], package), name)
        setattr(sys.modules[package], name, value)
        return value

    return sorted(places), get
