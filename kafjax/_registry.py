"""A registry: things by name, none of which takes another's name by accident."""

import collections
from typing import TypeVar

T = TypeVar("T")


class Registry(collections.UserDict[str, T]):
    """A dict in which a name is given once; remove it first to give it to another.

    Raises:
      ValueError: the name is taken.
    """

    def __setitem__(self, name: str, value: T) -> None:
        if name in self:
            raise ValueError(
                f"{name!r} is registered already, as {self[name]!r}; expected a new name"
            )
        super().__setitem__(name, value)
