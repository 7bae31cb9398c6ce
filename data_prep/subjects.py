"""A table of subjects: which volumes show one patient, so that a split keeps them together.

    volume,subject
    anna_2019,anna
    anna_2021,anna

CSV or TSV. A volume is named by its file, its case or its split; those that the table lacks are
subjects by their own names.
"""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from data_prep.entries import file_stem
from data_prep.faults import Fault
from data_prep.folder import FIRST_CHANNEL
from data_prep.volumes import Source
from kafjax.errors import UserError
from kafjax.files import read_text

_COLUMNS = ("volume", "subject")


def read_subjects(path: Path) -> dict[str, str]:
    """Subjects by the volumes' names as the table has them.

    Raises `UserError` with every line that is wrong; `OSError` if the file cannot be read.
    """
    lines = read_text(path).splitlines()
    delimiter = "\t" if lines and "\t" in lines[0] else ","
    rows = csv.reader(lines, delimiter=delimiter)
    header = [name.strip().lower() for name in next(rows, [])]
    if missing := [name for name in _COLUMNS if name not in header]:
        raise UserError(f"{path}: has no column {' and '.join(missing)}; expected volume,subject")
    places = [header.index(name) for name in _COLUMNS]
    table: dict[str, str] = {}
    faults = []
    for number, row in enumerate(rows, start=2):
        if not any(cell.strip() for cell in row):
            continue
        volume, subject = (row[i].strip() if i < len(row) else "" for i in places)
        if not volume or not subject:
            faults.append(f"{path}, line {number}: expected a volume and its subject")
        elif table.setdefault(volume, subject) != subject:
            faults.append(f"{path}, line {number}: {volume} was of {table[volume]} before")
    if faults:
        raise UserError("\n".join(faults))
    return table


def with_subjects(
    sources: Sequence[Source], table: Mapping[str, str], raw_dir: Path
) -> tuple[list[Source], list[Fault]]:
    """The volumes with their subjects, and a fault for each name that is none of theirs."""
    faults = [
        Fault(raw_dir, f"holds no volume {name!r}", "correct the table of subjects")
        for name in table.keys() - set().union(*map(_names, sources))
    ]
    named = [
        replace(source, subject=next((table[n] for n in _names(source) if n in table), None))
        for source in sources
    ]
    return named, faults


def subjects_of(sources: Iterable[Source]) -> dict[str, str]:
    """Subjects by the volumes' ids, where they are given."""
    return {source.id: source.subject for source in sources if source.subject is not None}


def _names(source: Source) -> set[str]:
    """All that a volume may be called."""
    names = {source.id, source.case or source.id}
    if source.frame is None:
        stem = file_stem(source.image)
        names |= {source.image.name, stem, stem.removesuffix(FIRST_CHANNEL)}
    return names
