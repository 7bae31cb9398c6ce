"""The stages of `kafjax auto`, each of which a later call of the same command continues.

OUTPUT/plan.py          the plan, a config
OUTPUT/data/own/        the prepared dataset
OUTPUT/pretrain/        the pretraining run's workdir
OUTPUT/finetune/        the fine-tuning run's
OUTPUT/estimate/fold0/  with --estimate: runs that leave labelled subjects out
OUTPUT/predictions/     a label file for each scan, on its grid, and volumes.csv
OUTPUT/report.html      curves, scores, pictures
OUTPUT/log.txt          what the stages print
"""

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.builder import Options
from data_prep.check import survey_dataset
from data_prep.entries import is_scan_name
from data_prep.faults import DatasetError, findings_text, refuse
from data_prep.prepare import prepare_dataset
from kafjax.auto.plan import make_plan
from kafjax.auto.plan_file import Plan, config_of, read_plan, write_plan
from kafjax.auto.probe import NAME, quiet
from kafjax.auto.progress import Progress
from kafjax.auto.request import Request
from kafjax.data.dataset import labelled_volumes, open_dataset, volumes_for_test
from kafjax.errors import UserError
from kafjax.inference.evaluation import evaluate_run
from kafjax.inference.folders import evaluate_folders
from kafjax.inference.prediction import load_volume_predictor, predict_file
from kafjax.inference.prediction_files import list_requests
from kafjax.paths import expand
from kafjax.report.page import report
from kafjax.training.loop import train
from kafjax.training.timing import Stopped
from kafjax.workdir.lock import locked
from kafjax.workdir.preparation import read_preparation
from kafjax.workdir.scores import Scores, read_scores
from kafjax.workdir.workdir import Workdir

_PLAN = "plan.py"


def run_auto(
    request: Request, output: str | os.PathLike[str], *, dry_run: bool = False
) -> int | None:
    """Plans, or takes the plan that is there, and does all stages that are not done.

    Args:
      request: what is asked for.
      output: the folder of everything.
      dry_run: stop after the plan.

    Returns:
      None at the end; the number of a signal that stopped it, after a checkpoint.

    Raises:
      UserError: bad input, all of it at once; a plan of another request; too little time.
    """
    began = time.perf_counter()
    folder = expand(output).resolve()
    request.check(folder)
    plan = read_plan(folder / _PLAN, request)
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    try:
        if plan is None:
            plan = _plan(request, folder, began, num_workers=workers)
        else:
            print(f"Continuing the plan in {folder / _PLAN}.", flush=True)
        if dry_run:
            print(f"Planned only: edit {folder / _PLAN}, or run the command without --dry_run.")
            return None
        with locked(folder / "lock"):
            _Walk(request, plan, folder, workers).run()
    except Stopped as stopped:
        return stopped.number
    return None


def _plan(request: Request, folder: Path, began: float, *, num_workers: int) -> Plan:
    """Surveys the scans, prints and writes the plan. Raises `DatasetError` with all faults."""
    print("Looking at the scans, and timing training on this device.", flush=True)
    reader = request.open_reader()
    with quiet():
        survey, faults = survey_dataset(
            reader,
            Path(request.images),
            num_workers=num_workers,
            subjects=request.read_subjects(),
        )
    for line in findings_text(fault for fault in faults if not fault.stops):
        print(f"note: {line}")
    refuse([fault for fault in faults if fault.stops])
    plan, text = make_plan(survey, request, began=began)
    write_plan(folder / _PLAN, plan, text)
    print(f"\n{text}\n\nThe plan is in {folder / _PLAN}.", flush=True)
    return plan


class _Walk:
    """All stages of a plan in a folder."""

    def __init__(self, request: Request, plan: Plan, folder: Path, num_workers: int):
        self._request = request
        self._plan = plan
        self._folder = folder
        self._num_workers = num_workers
        self._progress = Progress(plan.expected)

    def run(self) -> None:
        """Does what is not done, and says where the results are."""
        stages: dict[str, Callable[[], None]] = {
            "prepare": self._prepare,
            "pretrain": partial(self._train_stage, "pretrain"),
            "finetune": partial(self._train_stage, "finetune"),
            "estimate": self._estimate,
            "evaluate": self._evaluate,
            "predict": self._predict,
            "report": self._report,
        }
        for name, stage in stages.items():
            if name in self._plan.expected:
                self._progress.start(name)
                with self._logged():
                    stage()
        self._progress.finish()
        print(self._summary(), flush=True)

    @contextlib.contextmanager
    def _logged(self) -> Iterator[None]:
        """Sends what is printed to log.txt; the progress keeps the stream that it was made with."""
        with (
            (self._folder / "log.txt").open("a", encoding="utf-8") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            yield

    def _prepare(self) -> None:
        given = dict(self._plan.preparation)
        options = Options(max_keypoints=given.pop("max_keypoints"))
        reader = self._request.open_reader(**given)
        try:
            prepare_dataset(
                reader,
                Path(self._request.images),
                self._folder / "data",
                name=NAME,
                options=options,
                num_workers=self._num_workers,
                subjects=self._request.read_subjects(),
            )
        except DatasetError:
            raise
        except UserError as error:
            _, *lines = str(error).splitlines()
            raise UserError(
                f"{self._folder} was prepared from other files, or by another plan; give another "
                "--output:\n" + "\n".join(lines or [str(error)])
            ) from None

    def _config(self, stage: str) -> Any:
        return config_of(self._folder / _PLAN, stage)

    def _train_stage(self, stage: str) -> None:
        self._train(self._config(stage), self._folder / stage)

    def _train(self, config: Any, workdir: Path, *, first: float = 0.0, share: float = 1.0) -> None:
        """Trains a run that is a fraction of its stage; part of the stage is done."""

        def on_step(step: int, last: int) -> None:
            self._progress.update(first + share * step / last)

        received = train(config, workdir, on_step=on_step)
        if received:
            raise Stopped(received)

    def _fold_workdirs(self) -> list[Path]:
        return [self._folder / "estimate" / f"fold{i}" for i in range(self._plan.folds)]

    def _estimate(self) -> None:
        folds = self._plan.folds
        for i, workdir in enumerate(self._fold_workdirs()):
            config = self._config("finetune")
            config.data.update({"fold": i, "num_folds": folds})
            # As many steps on fewer volumes.
            config.num_epochs = round(config.num_epochs * folds / (folds - 1))
            self._train(config, workdir, first=i / folds, share=1 / folds)
            _score(workdir, "validation")

    def _evaluate(self) -> None:
        for split in self._splits():
            _score(self._folder / "finetune", split)

    def _splits(self) -> list[str]:
        """The splits of the fine-tuning run that have honest scores."""
        dataset = open_dataset(self._folder / "data", NAME)
        held_out = self._config("finetune").data.get("validation")
        tested = set(volumes_for_test(dataset)) & set(labelled_volumes(dataset))
        return ["validation"] * bool(held_out) + ["test"] * bool(tested)

    def _predict(self) -> None:
        target = self._folder / "predictions"
        workdir = self._folder / "finetune"
        preparation = read_preparation(workdir)
        jobs = [
            job
            for folder in self._request.scan_folders()
            for job in list_requests(folder, target, preparation).requests
        ]
        todo = [job for job in jobs if not job.done]
        if todo:
            predictor = load_volume_predictor([workdir])
            for number, job in enumerate(todo, start=len(jobs) - len(todo) + 1):
                predict_file(job, predictor)
                self._progress.update(number / len(jobs))
        values = preparation.get("label_values") or range(len(preparation["classes"]))
        evaluate_folders(target, classes=preparation["classes"][1:], numbers=list(values))

    def _report(self) -> None:
        names = ["pretrain", *(["finetune"] if self._plan.has_labels else [])]
        workdirs = [*(self._folder / name for name in names), *self._fold_workdirs()]
        report(workdirs, self._folder / "report.html")

    def _summary(self) -> str:
        lines = [f"report:      {self._folder / 'report.html'}"]
        if not self._plan.has_labels:
            return "\n".join(["No labels: pretrained only.", *lines])
        target = self._folder / "predictions"
        count = sum(is_scan_name(path.name) for path in target.iterdir())
        lines.append(f"predictions: {count} label files in {target}; volumes in volumes.csv")
        for split in self._splits():
            scores = read_scores(Workdir(self._folder / "finetune"), split)
            lines.append(f"score:       {_words(scores)} ({split})")
        if self._plan.folds:
            of_folds = [read_scores(Workdir(path)) for path in self._fold_workdirs()]
            found = [s["pooled_dice"]["mean"] for s in of_folds if s]
            real = [dice for dice in found if dice is not None]
            mean = statistics.fmean(real) if real else float("nan")
            each = ", ".join(f"{dice:.3f}" for dice in real)
            lines.append(
                f"score:       mean Dice {mean:.3f} over {len(real)} folds ({each}), each of "
                "volumes that its run did not train on"
            )
        elif not self._splits():
            lines.append("score:       none: all labels were trained on; see --estimate")
        return "\n".join(lines)


def _score(workdir: Path, split: str) -> None:
    """Evaluates a run unless it has been."""
    if read_scores(Workdir(workdir), split) is None:
        evaluate_run(workdir, split=split)


def _words(scores: Scores | None) -> str:
    assert scores is not None
    dice = scores["pooled_dice"]["mean"]
    volumes = ", ".join(scores["by_volume"])
    return f"mean Dice {'-' if dice is None else f'{dice:.3f}'} on {volumes}"
