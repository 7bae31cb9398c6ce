"""Trains and evaluates a segmentation config on every fold with every number of labelled volumes.

    kafjax cross-validate --config chd_finetune --folds 0-4 \
        --num_labeled 2,6,10 [--seeds 0,1,2] --workdir DIR [--collect] [--config.x=...]

    DIR/fold0_M2_seed0/                 a run like any other, with its evaluation
    DIR/cross_validation.{csv,md,json}  mean Dice, pooled over the pixels of a fold: a row for each
                                        M, a column for each fold (Fold 1 is fold 0), mean and
                                        standard deviation over folds (`kafjax.study.results`)

as the appendix's table 3; with several seeds a cell is their mean, and `{seed}` in
`--config.init_from` stands for each run's own. A run that has trained to its end and is evaluated
is not run again, and one that was stopped resumes. One process runs all, one after the other; what
was compiled once is taken from JAX's persistent compilation cache (`kafjax.xla.set_up_xla`), also
when started again. Folds can be given to several machines; `--collect` then makes the table of what
is there and runs nothing.
"""

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax

from kafjax.data.dataset import open_dataset
from kafjax.errors import UserError
from kafjax.inference.evaluation import evaluate_run
from kafjax.paths import expand
from kafjax.study.plan import Row, Study, Table
from kafjax.study.results import write_results
from kafjax.study.runs import complete_scores, find_runs, plan_runs, run_config
from kafjax.training.loop import train
from kafjax.training.preflight import open_run_split, run_epoch
from kafjax.workdir.lock import LockedError, locked
from kafjax.workdir.workdir import Workdir


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
        first run starts, except for what only training finds.
      FloatingPointError: see `kafjax.training.loop.train`.
    """
    study = _make_study(config, workdir, num_labeled=num_labeled, folds=folds, seeds=seeds)
    if collect and not study.root.is_dir():
        raise UserError(f"{study.root}: no such folder; expected the workdir of a cross-validation")
    if not collect:
        _check_splits(study)
        try:
            with _stopping_at_signals():
                received = _run_missing(study)
        except _Stopped as stopped:
            received = stopped.number
        if received:
            return received
    print(_update_tables(study), flush=True)
    return None


def _make_study(config: Any, workdir: str | os.PathLike[str], **numbers: Any) -> Study:
    """The table of one row."""
    row = Row("", config.model.name)
    study = Study(
        table=Table("Cross-validation", (row,), {}, reference=row.name, with_folds=True),
        dataset=config.data.name,
        root=expand(workdir),
        runs=plan_runs(config, **numbers),
        base=config,
    )
    for seed in study.seeds:
        study.check_workdirs(row, seed)
    return study


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


def _check_splits(study: Study) -> None:
    """Raises `ValueError` listing everything wrong with the M and folds in this dataset."""
    config = study.base
    dataset = open_dataset(config.data.dir, config.data.name)
    faults: dict[str, None] = {}  # each once, in order
    for run in study.runs:
        try:
            split = open_run_split(run_config(config, run), Workdir(study.root / run.name), dataset)
            run_epoch(config, dataset, split.names)
        except UserError as error:
            faults[f"fold {run.fold}, M = {run.num_labeled}: {error}"] = None
    if faults:
        raise UserError("; ".join(faults))


def _run_missing(study: Study) -> int | None:
    """Trains and evaluates the runs that are not complete; the number of the signal that stops."""
    for i, run in enumerate(study.runs, start=1):
        workdir, config = study.root / run.name, run_config(study.base, run)
        if complete_scores(config, workdir):
            continue
        print(f"Run {i} of {len(study.runs)}: {workdir}", flush=True)
        try:
            received = train(config, workdir)
        except LockedError as error:
            print(f"{error}; left to that process", flush=True)
            continue
        if received:
            return received
        evaluate_run(workdir)
        # Each run's programs would stay in memory, until Linux has no mappings left for a process
        # and XLA crashes, after some 14 runs. The next run finds its programs on disk.
        jax.clear_caches()
        _update_tables(study)
    return None


def _update_tables(study: Study) -> str:
    """Writes the tables of these runs and of those that other processes have run here."""
    with locked(study.root / "lock", wait=True):  # so that no process overwrites newer rows
        known = sorted({*study.runs, *find_runs(study.base, study.root)})
        suffixes = (".csv", ".md", ".json")
        return write_results(
            replace(study, runs=tuple(known)), "cross_validation", suffixes=suffixes
        )
