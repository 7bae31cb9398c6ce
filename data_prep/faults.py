"""What is wrong with a dataset's files, said so that its owner can mend it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kafjax.errors import UserError


@dataclass(frozen=True)
class Fault:
    """One fault: the file or folder, what was found there, and what to do about it."""

    path: Path
    found: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.path}: {self.found}; {self.remedy}"


class DatasetError(UserError):
    """All faults that one pass over a dataset, or a part of it, has found."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__(tuple(faults))
        self.faults = tuple(faults)

    def __str__(self) -> str:
        return "\n".join(map(str, self.faults))
