"""Tables of things by name to which users add their own."""

from collections import UserDict
from typing import Any, Self, TypeVar

from kafjax.errors import UserError

T = TypeVar("T")


class Registry(UserDict[str, T]):
    """A dict that refuses a name that is taken: what has it would be lost without a word.

    `del registry[name]` makes room on purpose.
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
