"""Runs a table of the paper on a dataset, and collects what it found.

    kafjax experiment --table table1 --dataset chd
    kafjax experiment --table table1 --dataset phantom --small

The table's jobs are `kafjax.main` and `kafjax.cross_validate` commands, which are printed and can
be repeated by hand. One runs on each local device, or each core of a CPU. What is complete, for
this table or another, is not run again, and what was stopped goes on. `--shard 2/8` takes every
8th job, from the 2nd on, of a workdir that machines share. `--rows 1-3,5` takes a part of the
table, beside the row that differences are from. `--plan` tells what there is to do,
`--collect` makes the table of what there is, and neither runs anything.

    runs/experiments/chd/table1.{md,csv,png,svg}    the table, with standard errors
    runs/experiments/chd/{pretrain,segment,logs}/   the runs (`kafjax.study.plan`)

`--small` is for CPUs: DATASET_small's configs, and two folds by default.
Exit status: 0 complete, 1 a job failed, 2 a mistake in the command, 128 + signal when stopped.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from kafjax.config_files import load_config
from kafjax.errors import UserError
from kafjax.study.plan import Experiment, Planned, Table

_SMALL_FOLDS = (0, 1)


def make_experiment(
    table: Table,
    dataset: str,
    *,
    workdir: str = "runs/experiments",
    data_dir: str = "data",
    small: bool = False,
    rows: Sequence[int] | None = None,
    num_labeled: Sequence[int] | None = None,
    folds: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
) -> Experiment:
    """A table on a dataset, with the defaults of both.

    Args:
      table: as a file of `configs/tables/` has it.
      dataset: `configs/DATASET_pretrain.py` and `_finetune.py` are shipped, or lie in this folder.
      workdir: its folder DATASET holds or will hold the runs.
      data_dir: where the prepared dataset is.
      small: take DATASET_small.
      rows: numbers of the table's rows from 1; all by default. The reference row is always there.
      num_labeled: values of M; the table's by default.
      folds: numbers from 0; all of the config's by default, two where it is small.
      seeds: the config's by default.

    Raises:
      ValueError: there is no such dataset or row, or the table has no M for it.
    """
    if rows is not None:
        table = _with_rows(table, rows)
    name = f"{dataset}_small" if small else dataset
    config = load_config(f"configs/{name}_finetune.py:scratch")
    if num_labeled is None:
        base = name.split("_")[0]
        if base not in table.num_labeled:
            raise UserError(f"the table has no M for {base}; expected --num_labeled, as in 2,6")
        num_labeled = table.num_labeled[base]
    if folds is None:
        folds = _SMALL_FOLDS if small else range(config.data.num_folds)
    return Experiment(
        table=table,
        dataset=name,
        root=Path(workdir) / name,
        data_dir=data_dir,
        num_labeled=tuple(num_labeled),
        folds=tuple(folds),
        seeds=tuple([config.seed] if seeds is None else seeds),
        # Small ones spend their time on starting; large ones should keep many devices busy.
        fold_jobs=not small,
    )


def _with_rows(table: Table, numbers: Sequence[int]) -> Table:
    total = len(table.rows)
    if unknown := [n for n in numbers if not 1 <= n <= total]:
        raise UserError(
            f"--rows: found {', '.join(map(str, unknown))}, expected numbers from 1 to {total}"
        )
    kept = (
        row for i, row in enumerate(table.rows, 1) if i in numbers or row.name == table.reference
    )
    return table._replace(rows=tuple(kept))


def parse_shard(text: str) -> tuple[int, int]:
    """Of '2/8' the first job, from 0, and the step; `ValueError` for other text."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--shard: found {text!r}, expected 1/N to N/N")
    return int(match[1]) - 1, int(match[2])


def format_plan(
    planned: Sequence[Planned], step_seconds: tuple[float, float, float] | None = None
) -> str:
    """The jobs, what is done, and how much work is left for each network.

    Args:
      planned: of `Experiment.plan`.
      step_seconds: of a step of pretraining, one of fine-tuning and a batch of validation, on one
        device; with them the hours are told.
    """
    lines: list[str] = []
    left: dict[str, list[int]] = {}
    for job, work in planned:
        is_done = job.is_done()
        lines.append(f"{'done' if is_done else 'to do':<6} {job.name}\n       {job}")
        if work is None or is_done:
            continue
        model, *counts = work
        left[model] = [a + b for a, b in zip(left.get(model, (0, 0, 0)), counts, strict=True)]
    lines.append("")
    for model, counts in left.items():
        what = ("steps of pretraining", "steps of training with labels", "batches of validation")
        told = ", ".join(f"{n:,} {name}" for n, name in zip(counts, what, strict=True))
        if step_seconds is not None:
            seconds = sum(n * s for n, s in zip(counts, step_seconds, strict=True))
            told += f": {seconds / 3600:.1f} device hours"
        lines.append(f"to do for {model}, about: {told}")
    if not left:
        lines.append("nothing is left to do but the table")
    return "\n".join(lines)
