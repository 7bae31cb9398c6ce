"""What an experiment consists of: tables of rows, and the jobs that fill them.

A row is a network and its pretraining. It is trained and evaluated on every fold with every number
of labelled volumes M and every seed. A job is one of the users' own commands:

    ROOT/pretrain/kaf_unet_kaf_seed0/                kafjax.main
    ROOT/segment/kaf_unet_kaf/fold0_M2_seed0/        kafjax.cross_validate
    ROOT/logs/                                       what they print

Names of workdirs tell what was run, so that rows and tables with a run in common share it.
"""

import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from kafjax.checkpoint.checkpointer import saved_steps
from kafjax.config_files import load_config
from kafjax.data.dataset_files import find_dataset
from kafjax.data.input_pipeline import SliceDataset
from kafjax.data.splits import subject_of
from kafjax.files import flatten
from kafjax.models import PRETRAINING_HEADS
from kafjax.study.cross_validation import Run, has_trained, is_complete, plan_runs, run_config
from kafjax.study.jobs import Job
from kafjax.training.config_checks import check_fields
from kafjax.workdir.metrics import read_metrics
from kafjax.workdir.workdir import Workdir

SCRATCH = "none"
# Where a method goes on from the encoder of another.
_STAGES = {"glcl": "gcl"}


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


class Work(NamedTuple):
    """How long a job takes, in steps and in batches of validation and evaluation."""

    model: str
    pretraining_steps: int = 0
    finetuning_steps: int = 0
    validation_batches: int = 0


class Planned(NamedTuple):
    """A job, and its work where a network is trained."""

    job: Job
    work: Work | None = None


class Command(NamedTuple):
    """A config file, its variant (after a colon), and what is changed in it, by dotted paths."""

    file: str
    variant: str
    changes: Mapping[str, Any]

    def config(self) -> Any:
        """The run's config; `ValueError` where there is no such file, or a field is refused."""
        config = self._base()
        try:
            config.update_from_flattened_dict(self.changes)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{self}: {error.args[0]}") from None
        try:
            check_fields(config)
        except ValueError as error:
            raise ValueError(f"{self}: {'; '.join(str(error).splitlines())}") from None
        return config

    def _base(self) -> Any:
        return load_config(str(self))

    def __str__(self) -> str:
        return ":".join(filter(None, (self.file, self.variant)))

    def arguments(self) -> list[str]:
        """The same on the command line; what the file says by itself is left out."""
        fields = flatten(self._base().to_dict())
        return [
            *("--config", str(self)),
            *(
                f"--config.{path}={f'{value:g}' if isinstance(value, float) else value}"
                for path, value in self.changes.items()
                if fields.get(path) != value
            ),
        ]


class Experiment(NamedTuple):
    """A table on a dataset.

    Attributes:
      table: its rows are the experiment's.
      dataset: the configs are `configs/DATASET_pretrain.py` and `_finetune.py`.
      root: holds or will hold the runs of this dataset, of any table.
      data_dir: where the prepared dataset is.
      num_labeled: values of M.
      folds: numbers from 0.
      seeds: each pretrains, and trains from that pretraining.
      fold_jobs: whether each fold is a job, and not all folds of a row and a seed together.
    """

    table: Table
    dataset: str
    root: Path
    data_dir: str
    num_labeled: tuple[int, ...]
    folds: tuple[int, ...]
    seeds: tuple[int, ...]
    fold_jobs: bool = True

    def runs(self) -> list[Run]:
        """The runs of every row, in order of M, fold and seed."""
        numbers = itertools.product(self.num_labeled, self.folds, self.seeds)
        return list(itertools.starmap(Run, numbers))

    def row_dir(self, row: Row) -> Path:
        """The folder of the row's runs."""
        return self.root / "segment" / row.workdir

    def segmentation(self, row: Row, seed: int) -> Command:
        """What the row's runs of a seed have in common."""
        if row.pretraining == SCRATCH:
            return self._command("finetune", "scratch", {"model.name": row.model})
        start = {"init_from": str(self._pretraining_dir(row, seed)), "model.name": row.model}
        return self._command("finetune", "", start)

    def pretraining(self, row: Row, seed: int) -> Command:
        """The row's pretraining."""
        changes: dict[str, Any] = {"seed": seed, "model.name": row.model}
        if stage := _earlier(row):
            changes["init_from"] = str(self._pretraining_dir(stage, seed))
        weights = zip(PRETRAINING_HEADS, row.weights or (), strict=False)
        changes |= {f"loss.weights.{name}": float(weight) for name, weight in weights}
        return self._command("pretrain", row.pretraining, changes)

    def plan(self) -> list[Planned]:
        """All jobs, each once, after those that it needs; nothing is run or written.

        Raises:
          ValueError: configs that are refused, workdirs that hold runs of others; all are named.
        """
        rows = list(itertools.product(self.table.rows, self.seeds))
        makers: list[Callable[[], Iterator[Planned]]] = [
            self._preparation,
            *(partial(self._pretraining_jobs, row, seed) for row, seed in rows),
            *(partial(self._segmentation_jobs, row, seed) for row, seed in rows),
        ]
        planned: dict[str, Planned] = {}
        faults: dict[str, None] = {}  # each once, in order
        for make in makers:
            try:
                planned |= {one.job.name: one for one in make()}
            except ValueError as error:
                faults[str(error)] = None
        if faults:
            raise ValueError("\n".join(faults))
        return list(planned.values())

    def check_dataset(self) -> None:
        """Raises `ValueError` where the dataset is missing, and is not one that jobs prepare."""
        if self.dataset not in PHANTOMS:
            find_dataset(self.data_dir, self._data().name)

    def _preparation(self) -> Iterator[Planned]:
        if self.dataset not in PHANTOMS:
            return
        phantoms, data = PHANTOMS[self.dataset], self._data()
        command = (
            *("-m", "data_prep.main", "--dataset", "phantom", "--name", data.name),
            *("--data_dir", self.data_dir, "--raw_dir", f"{self.data_dir}/raw/{data.name}"),
            *("--num_subjects", str(phantoms.num_subjects), "--size", phantoms.size),
            *("--max_keypoints", str(phantoms.max_keypoints)),
        )
        yield Planned(
            self._job(
                f"prepare/{data.name}", command, partial(_is_prepared, self.data_dir, data.name)
            )
        )

    def _pretraining_jobs(self, row: Row, seed: int) -> Iterator[Planned]:
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
        yield Planned(
            self._job(
                _pretraining_name(row, seed),
                arguments,
                partial(is_pretrained, config, workdir),
                needs,
            ),
            Work(row.model, pretraining_steps=min(steps, config.num_steps or steps)),
        )

    def _segmentation_jobs(self, row: Row, seed: int) -> Iterator[Planned]:
        command, root = self.segmentation(row, seed), self.row_dir(row)
        config = command.config()
        runs = plan_runs(config, num_labeled=self.num_labeled, folds=self.folds, seeds=[seed])
        for run in runs:
            Workdir(root / run.name).check_config(run_config(config, run).to_dict())
        needs = self._prepared()
        if row.pretraining != SCRATCH:
            needs = (_pretraining_name(row, seed),)
        for folds in [(fold,) for fold in self.folds] if self.fold_jobs else [self.folds]:
            arguments = (
                *("-m", "kafjax.cross_validate", *command.arguments()),
                *("--folds", _listed(folds), "--num_labeled", _listed(self.num_labeled)),
                *("--seeds", str(seed), "--workdir", str(root)),
            )
            name = f"segment/{row.workdir}_seed{seed}"
            if self.fold_jobs:
                name += f"_fold{folds[0]}"
            ours = [run for run in runs if run.fold in folds]
            yield Planned(
                self._job(name, arguments, partial(_are_complete, config, root, ours), needs),
                self._segmentation_work(row.model, config, ours),
            )

    def _segmentation_work(self, model: str, config: Any, runs: list[Run]) -> Work:
        subjects, slices = self._size()
        every, epochs = config.every.validation_epochs, config.num_epochs
        # The last step validates too, and then the best checkpoint is evaluated.
        times = (math.ceil(epochs / every) if every else 1) + 1
        held_out = subjects / config.data.num_folds * slices
        steps = sum(int(run.num_labeled * slices // config.batch_size) for run in runs) * epochs
        batches = len(runs) * times * math.ceil(held_out / config.batch_size)
        return Work(model, finetuning_steps=steps, validation_batches=batches)

    def _command(self, kind: str, variant: str, changes: Mapping[str, Any]) -> Command:
        return Command(
            f"configs/{self.dataset}_{kind}.py", variant, {"data.dir": self.data_dir, **changes}
        )

    def _job(
        self,
        name: str,
        command: tuple[str, ...],
        is_done: Callable[[], bool],
        needs: tuple[str, ...] = (),
    ) -> Job:
        return Job(
            name, command, self.root / "logs" / f"{name.replace('/', '_')}.log", is_done, needs
        )

    def _prepared(self) -> tuple[str, ...]:
        return (f"prepare/{self._data().name}",) if self.dataset in PHANTOMS else ()

    def _pretraining_dir(self, row: Row, seed: int) -> Path:
        return self.root / "pretrain" / f"{row.workdir}_seed{seed}"

    def _data(self) -> Any:
        return load_config(f"configs/{self.dataset}_finetune.py:scratch").data

    def _size(self) -> tuple[int, float]:
        """Subjects, and slices of each: of the dataset, or about, where it is not there."""
        name = self._data().name
        if _is_prepared(self.data_dir, name):
            return _count(str(find_dataset(self.data_dir, name)))
        if self.dataset in PHANTOMS:
            return PHANTOMS[self.dataset].num_subjects, int(
                PHANTOMS[self.dataset].size.split("x")[2]
            )
        return _NOMINAL.get(name, (0, 0))


def is_pretrained(config: Any, workdir: Path) -> bool:
    """Whether a pretraining run has come to the end that `config` sets, and saved it."""
    if not has_trained(config, workdir):
        return False
    return read_metrics(workdir)[-1]["step"] in saved_steps(workdir)


def _earlier(row: Row) -> Row | None:
    """The row whose pretraining this one's goes on from."""
    method = _STAGES.get(row.pretraining)
    return None if method is None else row._replace(pretraining=method)


def _pretraining_name(row: Row, seed: int) -> str:
    return f"pretrain/{row.workdir}_seed{seed}"


def _are_complete(config: Any, root: Path, runs: list[Run]) -> bool:
    return all(is_complete(run_config(config, run), root / run.name) for run in runs)


def _is_prepared(data_dir: str, name: str) -> bool:
    return any(Path(os.path.expanduser(data_dir)).glob(f"{name}/*/dataset_info.json"))


@functools.cache
def _count(directory: str) -> tuple[int, float]:
    """Subjects of a prepared dataset, and slices of each in the mean."""
    dataset = SliceDataset(Path(directory))
    subjects = len({subject_of(volume) for volume in dataset.volumes})
    return subjects, sum(map(len, dataset.volumes.values())) / subjects


def _listed(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))
