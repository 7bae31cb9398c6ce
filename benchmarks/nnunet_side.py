"""nnU-Net v2's 2-D configuration within a time; runs in nnU-Net's own environment.

    python benchmarks/nnunet_side.py prepare --num_processes 1
    python benchmarks/nnunet_side.py train --seconds 600 --output DIR ...

`benchmarks.nnunet` calls both with nnU-Net's folders in the environment. Network, loss,
augmentation, optimiser and inference are nnU-Net's defaults. Two things differ from its trainer:
training ends with the time, over which the learning rate falls by nnU-Net's polynomial, and nothing
is validated. This file imports nothing of kafjax, which that environment does not need.
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.experiment_planning.plan_and_preprocess_api import (
    extract_fingerprint_dataset,
    plan_experiment_dataset,
    preprocess_dataset,
)
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

DATASET = 1
DATASET_NAME = "Dataset001_benchmark"
CONFIGURATION = "2d"
PLANS = "nnUNetPlans"


class TimedTrainer(nnUNetTrainer):
    """Trains until `clock` reaches `seconds`, with the learning rate of the share that has passed.

    Set both before `run_training`; nnU-Net fixes the constructor's arguments.
    """

    clock: Callable[[], float]
    seconds: float

    def run_training(self) -> None:
        """Takes steps until the time is over; then `report` says how many and when."""
        self.on_train_start()
        self.network.train()
        rate = PolyLRScheduler(self.optimizer, self.initial_lr, self.seconds)
        first, losses = 0.0, []
        while (now := self.clock()) < self.seconds:
            rate.step(now)
            losses.append(float(self.train_step(next(self.dataloader_train))["loss"]))
            first = first or self.clock()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.report = {
            "steps": len(losses),
            "first_step_seconds": first,
            "seconds": self.clock(),
            "first_loss": float(np.mean(losses[:10])),
            "last_loss": float(np.mean(losses[-10:])),
            "batch_size": self.batch_size,
            "patch_size": [int(n) for n in self.configuration_manager.patch_size],
        }
        self.on_train_end()


def prepare(num_processes: int) -> None:
    """nnU-Net's fingerprint, plan and preprocessing of the labelled volumes."""
    extract_fingerprint_dataset(DATASET, num_processes=num_processes, show_progress_bar=False)
    plan_experiment_dataset(DATASET)
    preprocess_dataset(
        DATASET,
        configurations=(CONFIGURATION,),
        num_processes=[num_processes],
        show_progress_bar=False,
    )


def train(arguments: argparse.Namespace) -> TimedTrainer:
    """Trains on every preprocessed volume, in the requested time."""
    random.seed(arguments.seed)
    np.random.seed(arguments.seed)  # noqa: NPY002 - nnU-Net draws from the global generators
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.num_threads)
    folder = Path(str(nnUNet_preprocessed), DATASET_NAME)
    plans = {**load_json(str(folder / f"{PLANS}.json")), "continue_training": False}
    trainer = TimedTrainer(
        plans=plans,
        configuration=CONFIGURATION,
        fold="all",
        dataset_json=load_json(str(folder / "dataset.json")),
        device=torch.device(arguments.device),
    )
    trainer.clock, trainer.seconds = make_clock(arguments), arguments.seconds
    trainer.run_training()
    return trainer


def make_clock(arguments: argparse.Namespace) -> Callable[[], float]:
    """Seconds since the process was started, by the wall or of its processor time."""
    if arguments.clock == "cpu":
        return time.process_time
    return lambda: time.time() - arguments.begin


def predict(trainer: TimedTrainer, images: Path, output: Path, device: str) -> None:
    """nnU-Net's default inference: overlapping tiles, averaged over mirrored slices."""
    trainer.set_deep_supervision_enabled(False)
    predictor = nnUNetPredictor(device=torch.device(device), allow_tqdm=False)
    predictor.manual_initialization(
        trainer.network,
        trainer.plans_manager,
        trainer.configuration_manager,
        [trainer.network.state_dict()],
        trainer.dataset_json,
        type(trainer).__name__,
        trainer.inference_allowed_mirroring_axes,
    )
    trainer.network.eval()
    output.mkdir(parents=True, exist_ok=True)
    predictor.predict_from_files_sequential(str(images), str(output))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    preparing = actions.add_parser("prepare")
    preparing.add_argument("--num_processes", type=int, default=1)
    training = actions.add_parser("train")
    training.add_argument("--seconds", type=float, required=True)
    training.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    training.add_argument("--begin", type=float, required=True, help="time.time() at the start")
    training.add_argument("--num_threads", type=int, required=True)
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--device", default="cpu")
    training.add_argument("--images", type=Path, required=True, help="to predict")
    training.add_argument("--output", type=Path, required=True, help="predictions/, report.json")
    return parser.parse_args()


def main() -> None:
    """Runs the command line."""
    arguments = _parse()
    if arguments.action == "prepare":
        prepare(arguments.num_processes)
        return
    trainer = train(arguments)
    begin = time.time()
    predict(trainer, arguments.images, arguments.output / "predictions", arguments.device)
    report: dict[str, Any] = {**trainer.report, "prediction_seconds": time.time() - begin}
    (arguments.output / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
