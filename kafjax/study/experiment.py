"""Runs a table of the paper on a dataset, and collects what it found.

    kafjax experiment --table table1 --dataset chd
    kafjax experiment --table table1 --dataset phantom --small

The table's jobs are `kafjax.main` and `kafjax.cross_validate` commands, which are printed and can
be repeated by hand. One runs on each local device, or each core of a CPU; with `--cluster`, on the
workers of a dask cluster that share the disk. What is complete, for this table or another, is not
run again, and what was stopped resumes. `--rows 1-3,5` takes a part of the table, plus the row that
differences are from. `--plan` lists what is left to do, `--collect` makes the table of the runs
that are complete, and neither runs anything.

    runs/experiments/chd/table1.{md,csv,json,png,svg}    the table (`kafjax.study.results`)
    runs/experiments/chd/pretrain/kaf_unet_kaf_seed0/    runs of kafjax.main
    runs/experiments/chd/segment/kaf_unet_kaf/           runs of kafjax.cross_validate
    runs/experiments/chd/logs/                           what they print

The names of workdirs state what was run, so that rows and tables with a run in common share it.

`--small` is for CPUs: DATASET_small's configs, and two folds by default. `--set` changes fields of
all configs, or of one kind, as in `--set finetune.num_epochs=34`; runs that are there must have the
same.
Exit status: 0 complete, 1 a job failed, 2 a mistake in the command, 128 + signal when stopped.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kafjax.checkpoint.checkpointer import saved_steps
from kafjax.config_files import load_config
from kafjax.data.dataset import SliceDataset
from kafjax.data.dataset_files import find_dataset
from kafjax.data.splits import subject_of
from kafjax.errors import UserError
from kafjax.models import PRETRAINING_HEADS
from kafjax.paths import data_folder, expand
from kafjax.study.config_command import ConfigCommand, changes_of
from kafjax.study.jobs import Job
from kafjax.study.plan import SCRATCH, Row, Study, Table
from kafjax.study.runs import RunKey, are_complete, has_trained, listed, plan_runs
from kafjax.training.describe import count_parameters
from kafjax.training.preflight import with_classes
from kafjax.workdir.metrics import read_metrics
from kafjax.workdir.workdir import Workdir

_SMALL_FOLDS = (0, 1)
# The method whose encoder another one starts from.
_STAGES = {"glcl": "gcl"}


class Phantoms(NamedTuple):
    """A dataset of synthetic subjects that is prepared where it is missing."""

    num_subjects: int
    size: str
    max_keypoints: int


PHANTOMS = {
    "phantom": Phantoms(10, "64x64x24", 64),
    "phantom_small": Phantoms(10, "48x48x16", 24),
}
# Subjects, and slices of each, for a plan without the dataset: ACDC's two frames have about 9.5
# each, CHD's volumes 130 to 340.
_NOMINAL = {"acdc": (100, 19), "chd": (68, 235)}
# What jobs take, in the order of --step_seconds.
_WORK = ("steps of pretraining", "steps of training with labels", "batches of validation")


@dataclass(frozen=True, kw_only=True)
class Experiment(Study):
    """A table on a dataset, whose configs are `configs/DATASET_pretrain.py` and `_finetune.py`.

    Attributes:
      data_dir: where the prepared dataset is.
      fold_jobs: whether each fold is a job, and not all folds of a row and a seed together.
      changes: of all configs, by dotted path; after `pretrain.` or `finetune.`, of theirs.
    """

    data_dir: str
    fold_jobs: bool
    changes: Mapping[str, Any] = field(default_factory=dict)

    def row_dir(self, row: Row) -> Path:
        """The folder of the row's runs, which rows with the same network and pretraining share."""
        return self.root / "segment" / row.workdir

    def config(self, row: Row, seed: int) -> Any:
        """What the row's runs of a seed have in common."""
        return self.segmentation(row, seed).config()

    def segmentation(self, row: Row, seed: int) -> ConfigCommand:
        """What the row's runs of a seed have in common."""
        if row.pretraining == SCRATCH:
            return self._command("finetune", "scratch", {"model.name": row.model})
        start = {"init_from": str(self._pretraining_dir(row, seed)), "model.name": row.model}
        return self._command("finetune", "", start)

    def pretraining(self, row: Row, seed: int) -> ConfigCommand:
        """The row's pretraining."""
        changes: dict[str, Any] = {"seed": seed, "model.name": row.model}
        if stage := _earlier(row):
            changes["init_from"] = str(self._pretraining_dir(stage, seed))
        weights = zip(PRETRAINING_HEADS, row.weights or (), strict=False)
        changes |= {f"loss.weights.{name}": float(weight) for name, weight in weights}
        return self._command("pretrain", row.pretraining, changes)

    def parameters(self) -> dict[str, int]:
        """By row's name; none where the dataset, which knows the number of classes, is missing."""
        counts: dict[str, int] = {}
        for row in self.table.rows:
            if row.model not in counts:
                try:
                    config = with_classes(self.config(row, self.seeds[0]))
                except UserError:
                    return {}
                counts[row.model] = sum(count_parameters(config).values())
        return {row.name: counts[row.model] for row in self.table.rows}

    def plan(self) -> list[Job]:
        """All jobs, each once, after those that it needs; nothing is run or written.

        Raises:
          ValueError: configs that are refused, workdirs that hold runs of others; all are named.
        """
        rows = list(itertools.product(self.table.rows, self.seeds))
        makers: list[Callable[[], Iterator[Job]]] = [
            self._preparation,
            *(partial(self._pretraining_jobs, row, seed) for row, seed in rows),
            *(partial(self._segmentation_jobs, row, seed) for row, seed in rows),
        ]
        planned: dict[str, Job] = {}
        faults: dict[str, None] = {}  # each once, in order
        for make in makers:
            try:
                planned |= {job.name: job for job in make()}
            except UserError as error:
                faults[str(error)] = None
        if faults:
            raise UserError("\n".join(faults))
        return list(planned.values())

    def check_dataset(self) -> None:
        """Raises `ValueError` where the dataset is missing, and is not one that jobs prepare."""
        if self.dataset not in PHANTOMS:
            find_dataset(self.data_dir, self.base.data.name)

    def _preparation(self) -> Iterator[Job]:
        if self.dataset not in PHANTOMS:
            return
        phantoms, name = PHANTOMS[self.dataset], self.base.data.name
        command = (
            *("-m", "data_prep.main", "--dataset", "phantom", "--name", name),
            *("--data_dir", self.data_dir, "--raw_dir", f"{self.data_dir}/raw/{name}"),
            *("--num_subjects", str(phantoms.num_subjects), "--size", phantoms.size),
            *("--max_keypoints", str(phantoms.max_keypoints)),
        )
        yield self._job(f"prepare/{name}", command, partial(_is_prepared, self.data_dir, name))

    def _pretraining_jobs(self, row: Row, seed: int) -> Iterator[Job]:
        if row.pretraining == SCRATCH:
            return
        needs = self._prepared()
        if stage := _earlier(row):
            yield from self._pretraining_jobs(stage, seed)
            needs = (_pretraining_name(stage, seed),)
        command, workdir = self.pretraining(row, seed), self._pretraining_dir(row, seed)
        config = command.config()
        Workdir(workdir).check_config(config.to_dict())
        subjects, slices = self._size()
        steps = config.num_epochs * int(subjects * slices // config.batch_size)
        arguments = ("-m", "kafjax.main", *command.arguments(), "--workdir", str(workdir))
        is_done = partial(is_pretrained, config, workdir)
        work = {row.model: (min(steps, config.num_steps or steps), 0, 0)}
        yield self._job(_pretraining_name(row, seed), arguments, is_done, needs, work)

    def _segmentation_jobs(self, row: Row, seed: int) -> Iterator[Job]:
        self.check_workdirs(row, seed)
        root, config = self.row_dir(row), self.config(row, seed)
        is_scratch = row.pretraining == SCRATCH
        needs = self._prepared() if is_scratch else (_pretraining_name(row, seed),)
        for folds in [(fold,) for fold in self.folds] if self.fold_jobs else [self.folds]:
            name = f"segment/{row.workdir}_seed{seed}"
            if self.fold_jobs:
                name += f"_fold{folds[0]}"
            command = (
                *("-m", "kafjax.cross_validate", *self.segmentation(row, seed).arguments()),
                *("--folds", listed(folds), "--num_labeled", listed(self.num_labeled)),
                *("--seeds", str(seed), "--workdir", str(root)),
            )
            runs = [run for run in self.runs if run.seed == seed and run.fold in folds]
            is_done = partial(are_complete, config, root, runs)
            work = {row.model: self._segmentation_work(config, runs)}
            yield self._job(name, command, is_done, needs, work)

    def _segmentation_work(self, config: Any, runs: Sequence[RunKey]) -> tuple[int, int, int]:
        subjects, slices = self._size()
        every, epochs = config.every.validation_epochs, config.num_epochs
        # The last step validates too, and then the best checkpoint is evaluated.
        times = (math.ceil(epochs / every) if every else 1) + 1
        held_out = subjects / config.data.num_folds * slices
        steps = sum(int(run.num_labeled * slices // config.batch_size) for run in runs) * epochs
        return 0, steps, len(runs) * times * math.ceil(held_out / config.batch_size)

    def _job(
        self,
        name: str,
        command: tuple[str, ...],
        is_done: Callable[[], bool],
        needs: tuple[str, ...] = (),
        work: Mapping[str, tuple[int, ...]] = {},
    ) -> Job:
        log = self.root / "logs" / f"{name.replace('/', '_')}.log"
        return Job(name, command, log, is_done, needs, work)

    def _command(self, kind: str, variant: str, changes: Mapping[str, Any]) -> ConfigCommand:
        file = f"configs/{self.dataset}_{kind}.py" + (f":{variant}" if variant else "")
        asked = changes_of(self.changes, kind)
        return ConfigCommand(file, {"data.dir": self.data_dir, **asked, **changes})

    def _prepared(self) -> tuple[str, ...]:
        return (f"prepare/{self.base.data.name}",) if self.dataset in PHANTOMS else ()

    def _pretraining_dir(self, row: Row, seed: int) -> Path:
        return self.root / "pretrain" / f"{row.workdir}_seed{seed}"

    def _size(self) -> tuple[int, float]:
        """Subjects, and slices of each: of the dataset, or about, where it is missing."""
        name = self.base.data.name
        if _is_prepared(self.data_dir, name):
            return _count(str(find_dataset(self.data_dir, name)))
        if phantoms := PHANTOMS.get(self.dataset):
            return phantoms.num_subjects, int(phantoms.size.split("x")[2])
        return _NOMINAL.get(name, (0, 0))


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
    changes: Mapping[str, Any] | None = None,
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
      changes: of all configs, by dotted path, as in {"model.dtype": "bfloat16"}; after `pretrain.`
        or `finetune.`, of theirs.

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
    if folds is None and small:
        folds = _SMALL_FOLDS
    return Experiment(
        table=table,
        dataset=name,
        root=expand(workdir) / name,
        runs=plan_runs(config, num_labeled=num_labeled, folds=folds, seeds=seeds),
        base=config,
        data_dir=data_dir,
        # Small ones spend their time on starting; large ones should keep many devices busy.
        fold_jobs=not small,
        changes=changes or {},
    )


def _with_rows(table: Table, numbers: Sequence[int]) -> Table:
    total = len(table.rows)
    if unknown := [n for n in numbers if not 1 <= n <= total]:
        raise UserError(
            f"--rows: found {listed(unknown, ', ')}, expected numbers from 1 to {total}"
        )
    kept = (
        row for i, row in enumerate(table.rows, 1) if i in numbers or row.name == table.reference
    )
    return table._replace(rows=tuple(kept))


def format_plan(jobs: Sequence[Job], step_seconds: tuple[float, float, float] | None = None) -> str:
    """The jobs, what is done, and how much work is left for each network.

    Args:
      jobs: of `Experiment.plan`.
      step_seconds: of a step of pretraining, one of fine-tuning and a batch of validation, on one
        device, to print hours.
    """
    lines: list[str] = []
    left: dict[str, Any] = {}
    for job in jobs:
        is_done = job.is_done()
        lines.append(f"{'done' if is_done else 'to do':<6} {job.name}\n       {job}")
        for model, counts in {} if is_done else job.work.items():
            left[model] = left.get(model, 0) + np.array(counts)
    lines.append("")
    for model, counts in left.items():
        work = ", ".join(f"{n:,} {name}" for n, name in zip(counts, _WORK, strict=True))
        if step_seconds is not None:
            work += f": {np.dot(counts, step_seconds) / 3600:.1f} device hours"
        lines.append(f"to do for {model}, about: {work}")
    if not left:
        lines.append("nothing is left to do but the table")
    return "\n".join(lines)


def is_pretrained(config: Any, workdir: Path) -> bool:
    """Whether a pretraining run has come to the end that `config` sets, and saved it."""
    if not has_trained(config, workdir):
        return False
    return read_metrics(workdir)[-1]["step"] in saved_steps(workdir)


def _earlier(row: Row) -> Row | None:
    """The row from whose pretraining this one's starts."""
    method = _STAGES.get(row.pretraining)
    return None if method is None else row._replace(pretraining=method)


def _pretraining_name(row: Row, seed: int) -> str:
    return f"pretrain/{row.workdir}_seed{seed}"


def _is_prepared(data_dir: str, name: str) -> bool:
    return any(data_folder(data_dir, name).glob(f"{name}/*/dataset_info.json"))


@functools.cache
def _count(directory: str) -> tuple[int, float]:
    """Subjects of a prepared dataset, and slices of each in the mean."""
    dataset = SliceDataset(Path(directory))
    subjects = len({subject_of(volume) for volume in dataset.volumes})
    return subjects, sum(map(len, dataset.volumes.values())) / subjects
