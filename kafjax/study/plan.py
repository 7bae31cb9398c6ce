"""What a study consists of: the rows of a table, and their runs.

A row is a network and its pretraining. It is trained and evaluated on every fold with every number
of labelled volumes M and every seed. A cross-validation is a table of one row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kafjax.study.runs import RunKey, run_config
from kafjax.workdir.workdir import Workdir

SCRATCH = "none"


class Row(NamedTuple):
    """A line of a table, or as many as there are M.

    Attributes:
      name: what the table prints.
      model: of `kafjax.models.MODELS`.
      pretraining: a method of `configs/*_pretrain.py`, or 'none'.
      weights: w1, w2, w3 of the losses; the method's own by default.
      paper: the appendix's mean and standard deviation, as it prints them, by dataset and M.
      beyond: whether the row is not in the appendix.
    """

    name: str
    model: str
    pretraining: str = SCRATCH
    weights: tuple[float, float, float] | None = None
    paper: Mapping[str, Mapping[int, str]] = {}
    beyond: bool = False

    @property
    def workdir(self) -> str:
        """The name of the folder of the row's runs, and with a seed of its pretraining."""
        if self.pretraining == SCRATCH:
            return f"{self.model}_scratch"
        weights = "" if self.weights is None else f"_w{'-'.join(f'{w:g}' for w in self.weights)}"
        return f"{self.model}_{self.pretraining}{weights}"


class Table(NamedTuple):
    """A table of the paper, or one like it.

    Attributes:
      title: what it shows.
      rows: with names that differ.
      num_labeled: values of M by the dataset's name, or its part before the first underscore.
      reference: the name of the row that differences are taken from.
      with_parameters: whether it shows the number of the network's parameters.
      with_folds: whether it shows each fold.
    """

    title: str
    rows: tuple[Row, ...]
    num_labeled: Mapping[str, tuple[int, ...]]
    reference: str
    with_parameters: bool = False
    with_folds: bool = False


@dataclass(frozen=True, kw_only=True)
class Study:
    """The rows of a table, each with the same runs; here all of one config.

    Attributes:
      table: its rows are the study's.
      dataset: the name that is printed, and under which rows have the paper's numbers.
      root: the folder of the study's files.
      runs: of every row, in order.
      base: the config of the runs, except for their fold, M and seed.
    """

    table: Table
    dataset: str
    root: Path
    runs: tuple[RunKey, ...]
    base: Any

    @property
    def num_labeled(self) -> tuple[int, ...]:
        """The values of M of the runs."""
        return tuple(sorted({run.num_labeled for run in self.runs}))

    @property
    def folds(self) -> tuple[int, ...]:
        """The folds of the runs, from 0."""
        return tuple(sorted({run.fold for run in self.runs}))

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the runs."""
        return tuple(sorted({run.seed for run in self.runs}))

    def row_dir(self, row: Row) -> Path:
        """The folder of the row's runs."""
        del row
        return self.root

    def config(self, row: Row, seed: int) -> Any:
        """What the row's runs of a seed have in common."""
        del row, seed
        return self.base

    def parameters(self) -> dict[str, int]:
        """The number of the segmentation network's parameters by row's name, where it is shown."""
        return {}

    def check_workdirs(self, row: Row, seed: int) -> None:
        """Raises `ValueError` where a workdir of the row holds a run of another config."""
        config = self.config(row, seed)
        for run in self.runs:
            if run.seed == seed:
                workdir = Workdir(self.row_dir(row) / run.name)
                workdir.check_config(run_config(config, run).to_dict())
