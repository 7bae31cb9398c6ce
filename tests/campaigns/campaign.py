"""What a campaign of faults counts, and its table.

Each try ends in one of four ways. `caught`: refused or mended as it must be, with the file named.
`harmless`: the damage changed nothing that is read, bit for bit, such as the time in a gzip header.
`silent`: wrong data was accepted. `unclear`: noticed, but not as required: a traceback, a
message that does not name the file, too late.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np


@dataclasses.dataclass
class Tally:
    """The counts of one fault; `wrong` has a line for each silent or unclear try."""

    fault: str
    caught: int = 0
    harmless: int = 0
    silent: int = 0
    unclear: int = 0
    wrong: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    @property
    def tries(self) -> int:
        """All that was tried."""
        return self.caught + self.harmless + self.silent + self.unclear

    def add(self, outcome: str, what: str = "") -> None:
        """Counts one try; `what` says what was wrong if it was silent or unclear."""
        setattr(self, outcome, getattr(self, outcome) + 1)
        if outcome in ("silent", "unclear"):
            self.wrong.append(f"{outcome}: {what}")

    def expect(self, holds: bool, what: str, *, otherwise: str = "unclear") -> None:
        """Counts a try as caught if something holds, else as `otherwise`."""
        self.add("caught" if holds else otherwise, what)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a campaign runs: `count` tries (None: its own number), in the folder `scratch`."""

    seed: int
    count: int | None
    scratch: Path

    def generator(self, name: str) -> np.random.Generator:
        """The random numbers of a campaign, which depend on seed and name alone."""
        return np.random.default_rng([self.seed, *name.encode()])

    def tries(self, usual: int) -> int:
        """How many tries, if a campaign usually has so many."""
        return usual if self.count is None else self.count

    def folder(self, name: str) -> Path:
        """A new folder in the scratch folder."""
        folder = self.scratch / name
        folder.mkdir(parents=True)
        return folder


Campaign = Callable[[Settings], Iterable[Tally]]

_COLUMNS = ("fault", "tries", "caught", "harmless", "silent", "unclear", "seconds")


def as_markdown(tallies: Sequence[Tally]) -> str:
    """The table, and under it what was wrong."""
    rows = [_COLUMNS, ("---", *["---:"] * (len(_COLUMNS) - 1))]
    rows += [tuple(map(_cell, (getattr(tally, c) for c in _COLUMNS))) for tally in tallies]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    wrong = [f"- {tally.fault}: {what}" for tally in tallies for what in tally.wrong]
    return "\n".join([*lines, "", *(wrong or ["Nothing was wrong."])])


def as_json(tallies: Sequence[Tally]) -> list[dict[str, Any]]:
    """The rows of the table as plain values, with what was wrong."""
    return [{**dataclasses.asdict(tally), "tries": tally.tries} for tally in tallies]


def _cell(value: Any) -> str:
    return f"{value:.0f}" if isinstance(value, float) else str(value)
