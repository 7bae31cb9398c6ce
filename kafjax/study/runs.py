"""The runs of a study: a segmentation config with a fold, a number M and a seed.

ROOT/fold0_M2_seed0/    the workdir of such a run
"""

import contextlib
import copy
import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kafjax.errors import UserError
from kafjax.workdir.metrics import read_metrics
from kafjax.workdir.scores import Scores, read_scores
from kafjax.workdir.workdir import Workdir

_NAME = re.compile(r"fold(?P<fold>\d+)_M(?P<M>\d+)_seed(?P<seed>\d+)")


class RunKey(NamedTuple):
    """What tells the runs of a config apart.

    Attributes:
      num_labeled: M, the number of labelled volumes.
      fold: from 0.
      seed: of initial values and data order.
    """

    num_labeled: int
    fold: int
    seed: int

    @property
    def name(self) -> str:
        """The name of the run's workdir, as in `fold0_M2_seed0`."""
        return f"fold{self.fold}_M{self.num_labeled}_seed{self.seed}"


def plan_runs(
    config: Any,
    *,
    num_labeled: Sequence[int],
    folds: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
) -> tuple[RunKey, ...]:
    """Every combination, in order of M, fold and seed.

    Args:
      config: of a segmentation run.
      num_labeled: values of M.
      folds: numbers from 0; all by default.
      seeds: the config's by default.

    Raises:
      ValueError: the config is not of a segmentation, or there is no such fold or M.
    """
    if config.task != "segment" or "fold" not in config.data:
        raise UserError(
            f"config.task is {config.task!r}, expected 'segment', of a config with data.fold as "
            "chd_finetune"
        )
    num_folds = config.data.num_folds
    folds = range(num_folds) if folds is None else folds
    seeds = [config.seed] if seeds is None else seeds
    faults = []
    if unknown := [fold for fold in folds if not 0 <= fold < num_folds]:
        faults.append(
            f"folds: found {listed(unknown, ', ')}, expected 0 to {num_folds - 1}: "
            f"config.data.num_folds is {num_folds}"
        )
    if too_few := [m for m in num_labeled if m < 1]:
        faults.append(f"num_labeled: found {listed(too_few, ', ')}, expected 1 or more")
    if faults:
        raise UserError("; ".join(faults))
    numbers = itertools.product(*(sorted(set(given)) for given in (num_labeled, folds, seeds)))
    return tuple(itertools.starmap(RunKey, numbers))


def run_config(config: Any, run: RunKey) -> Any:
    """A copy of the config with the run's M, fold and seed, also for `{seed}` in `init_from`."""
    own = copy.deepcopy(config)
    own.data.num_labeled, own.data.fold, own.seed = run
    if own.get("init_from"):
        own.init_from = own.init_from.replace("{seed}", str(run.seed))
    return own


def find_runs(config: Any, root: Path) -> list[RunKey]:
    """The runs of the config below `root`, whoever planned them, in order of M, fold and seed."""
    runs = []
    for path in root.glob("fold*_M*_seed*"):
        if not (match := _NAME.fullmatch(path.name)):
            continue
        run = RunKey(int(match["M"]), int(match["fold"]), int(match["seed"]))
        with contextlib.suppress(UserError):  # of another config
            workdir = Workdir(path)
            workdir.read_config()
            workdir.check_config(run_config(config, run).to_dict())
            runs.append(run)
    return sorted(runs)


def has_trained(config: Any, workdir: Path) -> bool:
    """Whether the metrics of a run of any task reach the end that `config` sets."""
    end = config.num_steps or math.inf
    # The last step is always logged, with its epoch.
    return any(
        row["step"] >= end or row.get("epoch", 0) >= config.num_epochs
        for row in read_metrics(workdir)
    )


def complete_scores(config: Any, workdir: Path) -> Scores | None:
    """The scores of a run that has trained to the end that `config` sets; None before that.

    Raises:
      ValueError: the scores are damaged, or another run's.
    """
    return read_scores(Workdir(workdir)) if has_trained(config, workdir) else None


def are_complete(config: Any, root: Path, runs: Sequence[RunKey]) -> bool:
    """Whether the runs of a config below `root` have trained to their end and have scores."""
    return all(complete_scores(run_config(config, run), root / run.name) for run in runs)


def parse_numbers(flag: str, text: str | None) -> list[int] | None:
    """The numbers of a flag's '2,6,10' or '0-2,4' in order, each once; None without a text.

    Raises:
      ValueError: another text; the message names the flag.
    """
    if text is None:
        return None
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        found = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if not found:
            raise UserError(f"--{flag}: found {text!r}, expected numbers as in 2,6,10 or 0-4")
        numbers.update(found)
    return sorted(numbers)


def listed(numbers: Sequence[int], separator: str = ",") -> str:
    """Numbers as flags and messages have them."""
    return separator.join(map(str, numbers))
