"""Faults and findings in a dataset's files, worded so that its owner can act on them."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kafjax.errors import UserError


@dataclass(frozen=True)
class Fault:
    """One fault: the file or folder, what was found there, and what to do about it.

    A finding is a fault that stops nothing: it is reported, and preparation continues.
    """

    path: Path
    found: str
    remedy: str
    stops: bool = True

    def __str__(self) -> str:
        return f"{self.path}: {self.found}; {self.remedy}"


class DatasetError(UserError):
    """All faults that one pass over a dataset, or a part of it, has found."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__(tuple(faults))
        self.faults = tuple(faults)

    def __str__(self) -> str:
        return "\n".join(map(str, self.faults))


def finding(path: Path, found: str, remedy: str) -> Fault:
    """A fault that stops nothing."""
    return Fault(path, found, remedy, stops=False)


def sort_faults(faults: Iterable[Fault], *, strict: bool = False) -> list[Fault]:
    """Sorts by file and drops duplicates: the frames of one damaged file share its fault.

    With `strict` every finding stops.
    """
    if strict:
        faults = (dataclasses.replace(fault, stops=True) for fault in faults)
    return sorted(set(faults), key=lambda fault: (str(fault.path), fault.found))


def refuse(faults: Sequence[Fault]) -> tuple[Fault, ...]:
    """Raises `DatasetError` with all faults if one of them stops; else returns them."""
    if any(fault.stops for fault in faults):
        raise DatasetError(faults)
    return tuple(faults)


def findings_text(findings: Iterable[Fault]) -> Iterator[str]:
    """A line for each finding; equal findings about files of one name share a line."""
    alike: dict[tuple[str, str, str], list[Fault]] = {}
    for fault in findings:
        alike.setdefault((fault.path.name, fault.found, fault.remedy), []).append(fault)
    for (_, found, remedy), group in alike.items():
        others = f", and {len(group) - 1} others of that name" if len(group) > 1 else ""
        yield f"{group[0].path}{others}: {found}; {remedy}"
