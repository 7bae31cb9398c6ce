"""Trains and evaluates a segmentation config on every fold with every number of labelled volumes.

    kafjax cross-validate --config chd_finetune --folds 0-4 \
        --num_labeled 2,6,10 [--seeds 0,1,2] --workdir DIR [--collect] [--config.x=...]

    DIR/fold0_M2_seed0/                 a run like any other, with its evaluation
    DIR/cross_validation.{csv,md,json}  mean Dice, pooled over the pixels of a fold: a row for each
                                        M, a column for each fold (Fold 1 is fold 0), mean and
                                        standard deviation over folds

as the appendix's table 3; with several seeds a cell is their mean, and the JSON has each, and
`{seed}` in `--config.init_from` stands for each run's own. A run that has trained to its end and is
evaluated is not run again, and one that was stopped goes on. One process runs all, one after the
other; what was compiled once is taken from JAX's persistent compilation cache
(`kafjax.xla.set_up_xla`), also when started again. Folds can be given to several
machines; `--collect` then makes the table of what is there and runs nothing.
"""

import contextlib
import copy
import csv
import io
import itertools
import json
import math
import os
import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from kafjax.data.input_pipeline import open_dataset, steps_per_epoch
from kafjax.errors import UserError
from kafjax.files import write_text
from kafjax.inference.evaluation import Results, evaluate_run
from kafjax.training.loop import train
from kafjax.training.preflight import open_run_split
from kafjax.workdir.lock import LockedError, locked
from kafjax.workdir.metrics import read_metrics
from kafjax.workdir.scores import read_scores
from kafjax.workdir.workdir import Workdir

_STEM = "cross_validation"
_NAME = re.compile(r"fold(?P<fold>\d+)_M(?P<M>\d+)_seed(?P<seed>\d+)")


class Run(NamedTuple):
    """One run: M, the fold from 0, and the seed of initial values and data order."""

    num_labeled: int
    fold: int
    seed: int

    @property
    def name(self) -> str:
        """The name of the run's workdir, as in `fold0_M2_seed0`."""
        return f"fold{self.fold}_M{self.num_labeled}_seed{self.seed}"


class Row(NamedTuple):
    """The table's line of one M; None where a run is missing.

    Attributes:
      num_labeled: M.
      folds: the mean Dice of each fold, itself the mean over seeds.
      mean: over folds.
      std: over folds, numpy's (ddof 0), as the appendix has it.
    """

    num_labeled: int
    folds: tuple[float | None, ...]
    mean: float | None
    std: float | None


def cross_validate(
    config: Any,
    workdir: str | os.PathLike[str],
    *,
    num_labeled: Sequence[int],
    folds: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
    collect: bool = False,
) -> int | None:
    """Runs what is not complete below `workdir`, and writes the table after each run.

    Args:
      config: of a segmentation run; its fold, M and seed are replaced.
      workdir: holds or will hold a workdir for each run.
      num_labeled: values of M.
      folds: numbers from 0; all by default.
      seeds: the config's by default.
      collect: only write and print the table, with empty cells for what is missing.

    Returns:
      None when all is done; a signal's number when one stopped it. A run that was in training is
      then saved.

    Raises:
      ValueError: config, dataset, numbers and workdirs do not fit each other; known before the
        first run starts, but for what only training finds.
      FloatingPointError: see `kafjax.training.loop.train`.
    """
    root = Path(workdir)
    runs = plan_runs(config, num_labeled=num_labeled, folds=folds, seeds=seeds)
    for run in runs:
        Workdir(root / run.name).check_config(run_config(config, run).to_dict())
    if collect and not root.is_dir():
        raise UserError(f"{root}: no such folder; expected the workdir of a cross-validation")
    if not collect:
        _check_splits(config, root, runs)
        try:
            with _stopping_at_signals():
                received = _run_missing(config, root, runs)
        except _Stopped as stopped:
            received = stopped.number
        if received:
            return received
    print(_update_tables(config, root, runs), flush=True)
    return None


def plan_runs(
    config: Any,
    *,
    num_labeled: Sequence[int],
    folds: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Run]:
    """The runs by M, fold and seed; arguments and errors as `cross_validate`."""
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
            f"folds: found {_listed(unknown)}, expected 0 to {num_folds - 1}: "
            f"config.data.num_folds is {num_folds}"
        )
    if too_few := [m for m in num_labeled if m < 1]:
        faults.append(f"num_labeled: found {_listed(too_few)}, expected 1 or more")
    if faults:
        raise UserError("; ".join(faults))
    return list(itertools.starmap(Run, itertools.product(num_labeled, folds, seeds)))


def run_config(config: Any, run: Run) -> Any:
    """A copy of the config with the run's M, fold and seed, also for `{seed}` in `init_from`."""
    own = copy.deepcopy(config)
    own.data.num_labeled, own.data.fold, own.seed = run
    if own.get("init_from"):
        own.init_from = own.init_from.replace("{seed}", str(run.seed))
    return own


def is_complete(config: Any, workdir: Path) -> bool:
    """Whether the run has trained to the end that `config` sets, and is evaluated."""
    return has_trained(config, workdir) and read_scores(Workdir(workdir)) is not None


def has_trained(config: Any, workdir: Path) -> bool:
    """Whether the metrics of a run of any task reach the end that `config` sets."""
    end = config.num_steps or math.inf
    # The last step is always logged, with its epoch.
    return any(
        row["step"] >= end or row.get("epoch", 0) >= config.num_epochs
        for row in read_metrics(workdir)
    )


def collect_results(config: Any, root: Path, runs: Sequence[Run]) -> dict[Run, Results]:
    """The scores of the complete runs; `ValueError` names those that are damaged or another's."""
    found = {
        run: read_scores(Workdir(root / run.name))
        for run in runs
        if has_trained(run_config(config, run), root / run.name)
    }
    return {run: scores for run, scores in found.items() if scores is not None}


def find_runs(config: Any, root: Path) -> list[Run]:
    """The runs of the config below `root`, whoever planned them, in order of M, fold and seed."""
    runs = []
    for path in root.glob("fold*_M*_seed*"):
        if not (match := _NAME.fullmatch(path.name)):
            continue
        run = Run(int(match["M"]), int(match["fold"]), int(match["seed"]))
        with contextlib.suppress(ValueError):  # of another config
            workdir = Workdir(path)
            workdir.read_config()
            workdir.check_config(run_config(config, run).to_dict())
            runs.append(run)
    return sorted(runs)


def tabulate(runs: Sequence[Run], dice: Mapping[Run, float | None]) -> list[Row]:
    """The table of runs whose M, folds and seeds are all combined, with the Dice of those known.

    A cell needs all of its seeds, mean and standard deviation need all folds: those of fewer runs
    would not compare with other rows.
    """
    seeds = list(dict.fromkeys(run.seed for run in runs))
    rows = []
    for m in dict.fromkeys(run.num_labeled for run in runs):
        cells = tuple(_mean([dice.get(Run(m, f, seed)) for seed in seeds]) for f in _folds(runs))
        known = [cell for cell in cells if cell is not None]
        std = float(np.std(known)) if len(known) == len(cells) else None
        rows.append(Row(m, cells, _mean(cells), std))
    return rows


def format_markdown(folds: Sequence[int], rows: Sequence[Row]) -> str:
    """The table as the appendix prints it: 0.3085 in a fold's cell, 0.392(.062) at the end."""
    lines = [_header(folds, "Mean/Std"), ["---"] * (len(folds) + 2)]
    for row in rows:
        cells = ["" if cell is None else f"{cell:.4f}" for cell in row.folds]
        lines.append([str(row.num_labeled), *cells, mean_and_std(row.mean, row.std)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def format_csv(folds: Sequence[int], rows: Sequence[Row]) -> str:
    """The table with all digits, mean and standard deviation in columns of their own."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(_header(folds, "Mean", "Std"))
    writer.writerows([row.num_labeled, *row.folds, row.mean, row.std] for row in rows)
    return stream.getvalue()


def write_tables(root: Path, runs: Sequence[Run], results: Mapping[Run, Results]) -> str:
    """Writes `cross_validation.csv`, `.md` and `.json`, each whole or not at all.

    Returns:
      The Markdown, which ends with the names of the runs that are missing, if any.
    """
    folds = _folds(runs)
    rows = tabulate(runs, {run: found["pooled_dice"]["mean"] for run, found in results.items()})
    missing = [run.name for run in runs if run not in results]
    markdown = format_markdown(folds, rows)
    if chance := [found["chance"] for found in results.values() if found["chance"] is not None]:
        markdown += (
            f"\nChance, pixels drawn with the frequencies of classes: {np.mean(chance):.3f}\n"
        )
    if chosen := sorted({found["checkpoint"] for found in results.values()}):
        markdown += f"\nCheckpoint of each run: {' or '.join(chosen)}.\n"
    if missing:
        markdown += f"\nMissing, {len(missing)} of {len(runs)} runs: {', '.join(missing)}\n"
    fields = ("step", "checkpoint", "pooled_dice", "chance", "by_class")
    document = {
        "folds": folds,
        "rows": [row._asdict() for row in rows],
        "runs": [
            {"workdir": run.name, **run._asdict(), **{name: found[name] for name in fields}}
            for run, found in results.items()
        ],
        "missing": missing,
    }
    texts = {
        "csv": format_csv(folds, rows),
        "md": markdown,
        "json": json.dumps(document, indent=2) + "\n",
    }
    for suffix, text in texts.items():
        write_text(root / f"{_STEM}.{suffix}", text)
    return markdown


def parse_numbers(text: str) -> list[int]:
    """The numbers of '2,6,10' or '0-2,4' in order, each once; `ValueError` for other text."""
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        found = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if not found:
            raise UserError(f"found {text!r}, expected numbers as in 2,6,10 or 0-4")
        numbers.update(found)
    return sorted(numbers)


class _Stopped(BaseException):
    """A signal came while nothing was in training."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def _stopping_at_signals() -> Iterator[None]:
    """Raises `_Stopped` at SIGTERM and Ctrl-C; in training `train` notes the first of them."""

    def stop(number: int, _: Any) -> None:
        raise _Stopped(number)

    before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_splits(config: Any, root: Path, runs: Sequence[Run]) -> None:
    """Raises `ValueError` with all that is wrong with the M and folds in this dataset."""
    dataset = open_dataset(config.data.dir, config.data.name)
    faults: dict[str, None] = {}  # each once, in order
    for run in runs:
        try:
            split = open_run_split(run_config(config, run), Workdir(root / run.name), dataset)
            steps_per_epoch(dataset, config.batch_size, split.names.train)
        except UserError as error:
            faults[f"fold {run.fold}, M = {run.num_labeled}: {error}"] = None
    if faults:
        raise UserError("; ".join(faults))


def _run_missing(config: Any, root: Path, runs: Sequence[Run]) -> int | None:
    """Trains and evaluates the runs that are not complete; the number of the signal that stops."""
    for i, run in enumerate(runs, start=1):
        workdir, own = root / run.name, run_config(config, run)
        if is_complete(own, workdir):
            continue
        print(f"Run {i} of {len(runs)}: {workdir}", flush=True)
        try:
            received = train(own, workdir)
        except LockedError as error:
            print(f"{error}; left to that process", flush=True)
            continue
        if received:
            return received
        evaluate_run(workdir)
        # Each run's programs would stay in memory, until Linux has no mappings left for a process
        # and XLA crashes, after some 14 runs. The next run finds its programs on disk.
        jax.clear_caches()
        _update_tables(config, root, runs)
    return None


def _update_tables(config: Any, root: Path, runs: Sequence[Run]) -> str:
    """Writes the tables of these runs and of those that other processes have run here."""
    with locked(root / "lock", wait=True):  # so that no process writes what it read before another
        known = sorted({*runs, *find_runs(config, root)})
        return write_tables(root, known, collect_results(config, root, known))


def _folds(runs: Sequence[Run]) -> list[int]:
    return sorted({run.fold for run in runs})


def _header(folds: Sequence[int], *last: str) -> list[str]:
    return ["Sample M", *(f"Fold {fold + 1}" for fold in folds), *last]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def mean_and_std(mean: float | None, std: float | None) -> str:
    """As the appendix prints them, 0.392(.062); nothing where one is missing."""
    if mean is None or std is None:
        return ""
    return f"{mean:.3f}({f'{std:.3f}'.removeprefix('0')})"


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
