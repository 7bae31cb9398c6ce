"""Dice against minutes: nnU-Net v2's 2-D configuration and kafjax on the same labelled volumes.

    python -m benchmarks.nnunet --data_dir data --name acdc --raw_dir RAW --output curves \
        --minutes 10,30 --folds 3,4 --num_labeled 2 --python NNUNET/bin/python --nnunet \
        --kafjax scratch own_finetune:scratch \
        --kafjax pretrained 'own_finetune --config.init_from=runs/pretrain_{seed}'
    python -m benchmarks.nnunet --output curves --collect

Each run is a side, a fold, M, a seed and a budget: it trains from its start for that time, so that
its learning rate ends with it. The clock starts with the process: imports and compilation count on
both sides, preparation and prediction on neither. Both predict the fold's unseen volumes from the
raw files onto their own grids, and `kafjax evaluate --predictions` scores them.

nnU-Net (pip install 'kafjax[nnunet]', or any environment that has it, as --python) stops by the
clock. kafjax gets as many steps as fit by the time of a few, and trains again with fewer if it took
over 5 % more; the table has the minutes that both took. `--clock cpu` counts the process's own time
on one core, for a machine that does other work.

A finished run is not repeated; `--collect` writes results.csv, .md and .svg from the finished ones.
"""

import argparse
import itertools
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.curves import collect
from benchmarks.flags import integers
from benchmarks.nnunet_files import Case, find_sources, link_case
from benchmarks.workers import NO_CACHE
from kafjax.config_files import load_config
from kafjax.cores import usable_cores
from kafjax.data.dataset import open_dataset
from kafjax.data.splits import Split
from kafjax.errors import UserError
from kafjax.files import write_text
from kafjax.inference.folders import evaluate_folders
from kafjax.training.preflight import split_run
from kafjax.workdir.metrics import read_metrics
from kafjax.workdir.split import read_split
from kafjax.workdir.workdir import Workdir

NNUNET = "nnunet"
_OVERRUN = 1.05  # of the time, beyond which kafjax trains again, with fewer steps
_ATTEMPTS = 3
_SIDE = Path(__file__).with_name("nnunet_side.py")


@dataclass(frozen=True)
class Run:
    """One point of a curve; `config` is a kafjax config with its fields, none for nnU-Net."""

    side: str
    config: tuple[str, ...]
    minutes: float
    fold: int
    num_labeled: int
    seed: int

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return f"{self.case}_{self.side}_{self.minutes:g}min_seed{self.seed}"

    @property
    def case(self) -> str:
        """The runs that share a split."""
        return f"fold{self.fold}_M{self.num_labeled}"


class Benchmark:
    """Makes the runs of a command line."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.output: Path = arguments.output.absolute()
        self.dataset = open_dataset(arguments.data_dir, arguments.name)
        self.sources = find_sources(self.dataset, arguments.raw_dir)

    def make(self, run: Run) -> None:
        """Trains, predicts and scores one run, unless it is finished."""
        folder = self.output / "runs" / run.name
        done = folder / "result.json"
        asked = self._asked(run)
        if done.exists():
            found = json.loads(done.read_text())["asked"]
            if found != asked:
                raise UserError(f"{folder}: was made by {found}, asked is {asked}; rename the side")
            print(f"{run.name}: finished", flush=True)
            return
        case = self.case(run)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        print(f"{run.name}: training", flush=True)
        train = self.train_nnunet if run.side == NNUNET else self.train_ours
        facts = train(run, case, folder)
        scores = evaluate_folders(
            folder / "predictions", case.labels, classes=self.dataset.classes[1:]
        )
        assert scores is not None
        result = {
            "asked": asked,
            "side": run.side,
            "minutes": run.minutes,
            "fold": run.fold,
            "num_labeled": run.num_labeled,
            "seed": run.seed,
            "dice": scores["pooled_dice"]["mean"],
            "volume_dice": mean_volume_dice(scores),
            "by_class": {n: v for n, v in scores["pooled_dice"].items() if n != "mean"},
            **facts,
            "volumes": {side: list(getattr(case.split, side)) for side in Split._fields},
            "machine": report.machine(),
            "date": report.today(),
        }
        write_text(done, json.dumps(result, indent=1) + "\n")
        print(f"{run.name}: Dice {result['dice']:.3f}, {facts['seconds']:.0f} s", flush=True)

    def train_nnunet(self, run: Run, case: Case, folder: Path) -> dict[str, Any]:
        """Trains nnU-Net and predicts; its report."""
        a = self.arguments
        environment = case.environment(folder / "nnunet")
        if not (case.folder / "preprocessed_once").exists():
            given = ["prepare", "--num_processes", str(len(usable_cores()))]
            call([a.python, str(_SIDE), *given], case.folder / "prepare.txt", environment)
            (case.folder / "preprocessed_once").touch()
        # Background workers augment where there is a core for them.
        workers = len(usable_cores()) - 1 if a.device == "cpu" else len(usable_cores())
        flags = {
            "seconds": 60 * run.minutes,
            "clock": a.clock,
            "num_threads": len(usable_cores()),
            "seed": run.seed,
            "device": a.device,
            "images": case.raw / "imagesTs",
            "output": folder,
            "begin": time.time(),
        }
        given = ["train", *itertools.chain(*((f"--{k}", str(v)) for k, v in flags.items()))]
        environment |= {"nnUNet_n_proc_DA": str(workers)}
        call([a.python, str(_SIDE), *given], folder / "log.txt", environment)
        return json.loads((folder / "report.json").read_text())

    def train_ours(self, run: Run, case: Case, folder: Path) -> dict[str, Any]:
        """Trains kafjax and predicts; its report."""
        for attempt in range(1, _ATTEMPTS + 1):
            shutil.rmtree(folder / "train", ignore_errors=True)
            facts = self._train(run, folder / "train", folder, self.fitting_steps(run))
            self._write_pace(run, facts)  # measured better than by the few timed steps
            if facts["seconds"] <= _OVERRUN * 60 * run.minutes:
                break
            again = ", again" if attempt < _ATTEMPTS else ""
            print(f"{run.name}: took {facts['seconds']:.0f} s{again}", flush=True)
        split = read_split(Workdir(folder / "train"))
        assert split is not None
        if split.names._replace(unlabelled=()) != case.split:
            raise UserError(f"{run.name}: its config trains on other volumes than {case.split}")
        begin = time.time()
        flags = ["--workdir", folder / "train", "--input", case.images]
        flags += ["--output", folder / "predictions", "--data_dir", self.arguments.data_dir]
        flags += shlex.split(self.arguments.predict_flags)
        (folder / "predictions").mkdir()
        call([sys.executable, "-m", "kafjax.predict", *map(str, flags)], folder / "predict.txt")
        facts["prediction_seconds"] = time.time() - begin
        facts["pretraining_minutes"] = pretraining_seconds(Workdir(folder / "train")) / 60
        return facts

    def fitting_steps(self, run: Run) -> int:
        """How many steps fit a run's time, by the pace of the side's last run, or of a few steps.

        Raises `UserError` if none does.
        """
        place = self._pace_file(run)
        found = json.loads(place.read_text()) if place.exists() else {}
        if found.get("asked") != self._asked(run):
            print(f"{run.side}: timing", flush=True)
            with tempfile.TemporaryDirectory(dir=self.output) as folder:
                found = self._write_pace(run, self._train(run, Path(folder, "train"), Path(folder)))
        steps = int((60 * run.minutes - found["rest"]) / found["step"])
        if steps < 1:
            raise UserError(
                f"{run.name}: a step takes {found['step']:.2g} s and all else "
                f"{found['rest']:.0f} s; expected more minutes"
            )
        return steps

    def _write_pace(self, run: Run, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Records the seconds of a step, and of imports, compilation and the checkpoint."""
        step = facts["step_seconds"] or facts["seconds"] / facts["steps"]
        rest = facts["seconds"] - facts["steps"] * step
        pace = {"asked": self._asked(run), "step": step, "rest": rest}
        write_text(self._pace_file(run), json.dumps(pace))
        return pace

    def _pace_file(self, run: Run) -> Path:
        return self.output / f"pace_{run.side}_M{run.num_labeled}.json"

    def _asked(self, run: Run) -> dict[str, Any]:
        return {"config": list(run.config), "clock": self.arguments.clock}

    def _train(
        self, run: Run, workdir: Path, folder: Path, steps: int | None = None
    ) -> dict[str, Any]:
        config, *fields = (part.replace("{seed}", str(run.seed)) for part in run.config)
        own = {
            "data.dir": self.arguments.data_dir,
            "data.name": self.arguments.name,
            "data.fold": run.fold,
            "data.num_labeled": run.num_labeled,
            "seed": run.seed,
        }
        flags = ["--config", config, *fields, *(f"--config.{k}={v}" for k, v in own.items())]
        flags += [f"--workdir={workdir}", f"--report={folder / 'report.json'}"]
        flags += [f"--clock={self.arguments.clock}", f"--begin={time.time()}"]
        flags += [] if steps is None else [f"--num_steps={steps}"]
        call([sys.executable, "-m", "benchmarks.nnunet_ours", *flags], folder / "log.txt", NO_CACHE)
        return json.loads((folder / "report.json").read_text())

    def case(self, run: Run) -> Case:
        """The split's files, as links to the raw ones; made once."""
        config = load_config("own_finetune:scratch")
        config.data.update({"fold": run.fold, "num_labeled": run.num_labeled})
        case = Case(split_run(config, self.dataset), self.output / "cases" / run.case)
        if not (case.folder / "linked").exists():
            shutil.rmtree(case.folder, ignore_errors=True)
            link_case(case, self.sources, self.dataset)
            (case.folder / "linked").touch()
        return case


def call(command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
    """Runs a command with its output in a file; `RuntimeError` with its last lines if it fails."""
    with log.open("w") as stream:
        done = subprocess.run(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            check=False,
        )
    if done.returncode:
        last = "\n".join(log.read_text().splitlines()[-15:])
        raise RuntimeError(f"{shlex.join(command)}\nended with {done.returncode}:\n{last}\n({log})")


def mean_volume_dice(scores: Mapping[str, Any]) -> float:
    """The mean over classes of the mean over volumes, as most publications report it."""
    return statistics.fmean(found["dice"]["mean"] for found in scores["by_class"].values())


def pretraining_seconds(workdir: Workdir) -> float:
    """The time of the runs that a run started from, by their metrics: wall time of their steps."""
    start, seconds = workdir.read_config().get("init_from"), 0.0
    while start:
        before = 0
        for row in read_metrics(start):
            if (pace := row["time"].get("seconds_per_step")) is not None:
                seconds += pace * (row["step"] - before)
                before = row["step"]
        start = Workdir(start).read_config().get("init_from")
    return seconds


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of runs and results")
    parser.add_argument("--collect", action="store_true", help="only the table of finished runs")
    parser.add_argument("--data_dir", type=Path, help="of the prepared dataset")
    parser.add_argument("--name", help="of the prepared dataset")
    parser.add_argument("--raw_dir", type=Path, help="the raw files that it was prepared from")
    parser.add_argument("--minutes", default="10,30,90", help="a run for each")
    parser.add_argument("--folds", type=integers, default=(0,), help="from 0")
    parser.add_argument("--num_labeled", type=integers, default=(2,), help="M")
    parser.add_argument("--seeds", type=integers, default=(0,))
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of nnU-Net")
    parser.add_argument("--nnunet", action="store_true", help="run nnU-Net")
    parser.add_argument("--python", default=sys.executable, help="of nnU-Net's environment")
    parser.add_argument(
        "--kafjax",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "CONFIG"),
        help="a side: its name, and a config with fields as on the command line, {seed} in them",
    )
    parser.add_argument("--predict_flags", default="", help="more flags of kafjax predict")
    return parser.parse_args(argv)


def plan(arguments: argparse.Namespace) -> list[Run]:
    """The runs of a command line, short ones first.

    Raises `UserError` for arguments that do not go together.
    """
    a = arguments
    sides = {name: tuple(shlex.split(config)) for name, config in a.kafjax}
    if missing := [f"--{n}" for n in ("data_dir", "name", "raw_dir") if getattr(a, n) is None]:
        raise UserError(f"expected {', '.join(missing)}, or --collect")
    if NNUNET in sides or len(sides) < len(a.kafjax):
        raise UserError(f"--kafjax: names are {', '.join(n for n, _ in a.kafjax)}, expected others")
    if not sides and not a.nnunet:
        raise UserError("no side: expected --nnunet, --kafjax NAME CONFIG, or both")
    if a.clock == "cpu" and (len(usable_cores()) > 1 or a.device != "cpu"):
        raise UserError(
            f"--clock cpu on {len(usable_cores())} cores and {a.device}: expected one core, as "
            "with taskset -c 0, or --clock wall"
        )
    try:
        minutes = sorted(float(part) for part in a.minutes.split(","))
    except ValueError:
        raise UserError(f"--minutes is {a.minutes!r}, expected numbers, as in 10,30") from None
    everyone = ({NNUNET: ()} if a.nnunet else {}) | sides
    return [
        Run(side, config, time, fold, m, seed)
        for time in minutes
        for m in a.num_labeled
        for seed in a.seeds
        for fold in a.folds
        for side, config in everyone.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; its exit status: 2 for a mistake, 1 where a run failed."""
    arguments = _parse(argv)
    try:
        if not arguments.collect:
            runs = plan(arguments)
            benchmark = Benchmark(arguments)
            for run in runs:
                benchmark.make(run)
        print(collect(arguments.output))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
