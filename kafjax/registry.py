"""Registries of named objects that users can extend."""

from collections import UserDict
from typing import Any, Self, TypeVar

from kafjax.errors import UserError

T = TypeVar("T")


class Registry(UserDict[str, T]):
    """A dict that refuses existing names instead of silently overwriting them.

    Use `del registry[name]` first to replace an entry on purpose.
    """

    def __setitem__(self, name: str, item: T) -> None:
        if name in self.data:
            raise UserError(
                f"{name!r} is taken, by {self.data[name]}; expected another name than "
                f"{', '.join(self.data)}"
            )
        super().__setitem__(name, item)

    def __ior__(self, other: Any) -> Self:  # type: ignore[override,misc]
        self.update(other)
        return self
