"""What a report reads of workdirs: runs, as far as their files are there and whole.

A folder of `kafjax.cross_validate` stands for its runs.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kafjax.errors import UserError
from kafjax.files import read_checked
from kafjax.workdir.metrics import read_metrics
from kafjax.workdir.scores import SPLITS, read_scores
from kafjax.workdir.workdir import Workdir, name_runs

Fields = dict[str, Any]

CROSS_VALIDATION = "cross_validation.json"


class Run(NamedTuple):
    """What a workdir holds, as far as it can be read.

    Attributes:
      name: short, different from that of other runs.
      number: its place on the page, from 0, which sets its colour.
      workdir: where it is.
      config: fields of the config.
      metrics: lines of metrics.jsonl.
      evaluations: by split, what evaluation wrote.
      preparation: how the dataset was prepared; empty where it is not noted.
      environment: of the last start; empty where it is not noted.
      faults: a line for each file that is there and cannot be read.
    """

    name: str
    number: int
    workdir: Path
    config: Fields
    metrics: list[Fields]
    evaluations: dict[str, Fields]
    preparation: Fields
    environment: Fields
    faults: list[str]

    @property
    def task(self) -> str:
        """As the config has it."""
        return str(self.config.get("task"))


def read_runs(workdirs: Sequence[Path]) -> list[Run]:
    """Reads workdirs, in order; `ValueError` with all folders that hold no run."""
    configs, faults = [], []
    for workdir in workdirs:
        try:
            configs.append(Workdir(workdir).read_config())
        except (UserError, OSError) as error:
            faults.append(str(error))
    if faults:
        raise UserError("; ".join(faults))
    names = name_runs(workdirs)
    return [
        _read_run(name, number, workdir, config)
        for number, (name, workdir, config) in enumerate(zip(names, workdirs, configs, strict=True))
    ]


def mean_dice(evaluation: Fields) -> dict[str, float]:
    """The mean Dice over classes of each volume of an evaluation that has any."""
    values = {
        volume: [found["dice"] for found in classes.values() if found["dice"] is not None]
        for volume, classes in evaluation["by_volume"].items()
    }
    return {volume: sum(dice) / len(dice) for volume, dice in values.items() if dice}


def expand(workdirs: Sequence[Path]) -> tuple[list[Path], list[tuple[Path, Fields]]]:
    """Puts the runs of cross-validations in their place.

    Returns:
      Workdirs, each once, and for each cross-validation its folder and its table.

    Raises:
      ValueError: a table is damaged.
    """
    places, tables = [], []
    for workdir in workdirs:
        path = workdir / CROSS_VALIDATION
        if Workdir(workdir).config_file.exists() or not path.exists():
            places.append(workdir)
            continue
        document, faults = _read_json(path, ("folds", "rows", "missing"))
        if faults:
            raise UserError(faults[0])
        tables.append((workdir, document))
        runs = [path for path in workdir.iterdir() if Workdir(path).config_file.exists()]
        places += sorted(runs, key=_by_numbers)
    return list(dict.fromkeys(places)), tables


def _by_numbers(path: Path) -> list[tuple[int, str]]:
    """Orders M2 before M10."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(part) if part.isdecimal() else -1, part) for part in parts]


def _read_run(name: str, number: int, workdir: Path, config: Fields) -> Run:
    folder = Workdir(workdir)
    evaluations: dict[str, Fields] = {}
    faults: list[str] = []
    for split in SPLITS:
        try:
            if found := read_scores(folder, split):
                evaluations[split] = found
        except UserError as error:
            faults.append(str(error))
    try:
        metrics = read_metrics(workdir)
    except UserError as error:
        metrics = []
        faults.append(f"{folder.metrics_file}: damaged ({error})")
    preparation, wrong = _read_json(folder.preparation_file)
    environment, wrong_too = _read_json(folder.environment_file)
    faults += wrong + wrong_too
    return Run(
        name, number, workdir, config, metrics, evaluations, preparation, environment, faults
    )


def _read_json(path: Path, needed: Sequence[str] = ()) -> tuple[Fields, list[str]]:
    """A file's fields, none where there is no file, and what is wrong with it."""
    if not path.exists():
        return {}, []
    try:
        found = read_checked(path)
    except ValueError as error:
        return {}, [f"{path}: damaged ({error})"]
    if missing := [name for name in needed if name not in found]:
        return {}, [f"{path}: damaged (no {', '.join(missing)})"]
    return found, []
