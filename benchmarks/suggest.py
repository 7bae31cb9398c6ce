"""Is it worth labelling what `kafjax suggest` suggests? Its choice against random ones.

    python -m benchmarks.suggest --data_dir data --name acdc_small --pretrain runs/pretrain \
        --output chosen --fold 3 --num_labeled 2 --draws 6 \
        --run 'own_finetune:scratch --config.data.patch_size=(96,96)'

Trains a config on M subjects of a fold's training part, those that `kafjax suggest` chooses among
them and some random draws, with the same seeds, and scores each run on the fold's unseen volumes.
Rerun the same command to resume.
"""

import argparse
import itertools
import json
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.flags import integers, make_parser, run, settings
from benchmarks.nnunet import call
from kafjax.data.dataset import SliceDataset, labelled_volumes, open_dataset
from kafjax.data.splits import Split, group_subjects, split_volumes
from kafjax.files import write_text
from kafjax.suggest.suggestions import suggest_typical
from kafjax.workdir.workdir import Workdir

CHOSEN = "suggested"


def choices(
    dataset: SliceDataset, part: Split, workdir: Path, *, num_labeled: int, draws: int
) -> dict[str, tuple[str, ...]]:
    """The subjects to train on: as suggested, and by each draw."""
    subject = group_subjects(part.train)
    suggested = suggest_typical(
        Workdir(workdir), dataset, number=num_labeled, ignore_labels=True, among=part.train
    )
    names = sorted(set(subject.values()))
    found = {CHOSEN: tuple(sorted(typical.subject for typical in suggested))}
    for draw in range(draws):
        drawn = np.random.default_rng(draw).choice(names, num_labeled, replace=False)
        found[f"draw {draw}"] = tuple(sorted(map(str, drawn)))
    return found


def measure(arguments: argparse.Namespace) -> report.Result:
    """Makes the runs that are not there and the table."""
    a = arguments
    dataset = open_dataset(a.data_dir, a.name)
    part = split_volumes(labelled_volumes(dataset), fold=a.fold, num_labeled=None)
    sets = choices(dataset, part, a.pretrain, num_labeled=a.num_labeled, draws=a.draws)
    a.output.mkdir(parents=True, exist_ok=True)
    splits = a.output / "splits.json"
    content = [{"train": names, "val": part.validation} for names in sets.values()]
    write_text(splits, json.dumps(content, indent=1))
    dice: dict[str, list[float]] = {name: [] for name in sets}
    for seed, (number, name) in itertools.product(a.seeds, enumerate(sets)):
        folder = a.output / f"{name.replace(' ', '')}_seed{seed}"
        config, *fields = shlex.split(a.run)
        own = {
            "data.dir": a.data_dir,
            "data.name": a.name,
            "data.splits_file": splits,
            "data.fold": number,
            "seed": seed,
            "every.validation_epochs": 0,
            "checkpoint.select": "last",
        }
        fields += [f"--config.{k}={v}" for k, v in own.items()]
        dice[name].append(score(folder, config, fields))
        print(f"{name}, seed {seed}: {', '.join(sets[name])}: {dice[name][-1]:.3f}", flush=True)
    return report.Result(
        "suggest",
        "What to label: suggested against random",
        [make_table(sets, dice)],
        {"sets": sets, "dice": dice},
        {k: str(v) if isinstance(v, Path) else v for k, v in settings(a).items()},
    )


def score(folder: Path, config: str, fields: Sequence[str]) -> float:
    """Trains and evaluates a run, unless that is done; its pooled Dice."""
    scores = folder / "evaluation.json"
    if not scores.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        log = folder.with_suffix(".txt")
        flags = ["--config", config, *fields, f"--workdir={folder}"]
        call([sys.executable, "-m", "kafjax.main", *flags], log)
        call([sys.executable, "-m", "kafjax.evaluate", f"--workdir={folder}"], log)
    found: dict[str, Any] = json.loads(scores.read_text())
    return float(found["pooled_dice"]["mean"])


def make_table(
    sets: Mapping[str, Sequence[str]], dice: Mapping[str, Sequence[float]]
) -> report.Table:
    """A row for each choice, the mean over seeds, and the suggestion against the draws."""
    means = {name: statistics.fmean(values) for name, values in dice.items()}
    drawn = [mean for name, mean in means.items() if name != CHOSEN]
    rows = [
        [name, ", ".join(sets[name]), *(f"{value:.3f}" for value in values), f"{means[name]:.3f}"]
        for name, values in dice.items()
    ]
    seeds = [f"run {i + 1}" for i in range(len(dice[CHOSEN]))]
    spread = f" ± {statistics.stdev(drawn):.3f}" if len(drawn) > 1 else ""
    better = sum(means[CHOSEN] > mean for mean in drawn)
    note = (
        f"Draws: {statistics.fmean(drawn):.3f}{spread} (standard deviation). Suggested: "
        f"{means[CHOSEN] - statistics.fmean(drawn):+.3f}, better than {better} of {len(drawn)}."
    )
    return report.Table("Pooled Dice", ["choice", "subjects", *seeds, "mean"], rows, [note])


def main() -> None:
    """Runs the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--run", required=True, help="a config with its fields")
    parser.add_argument("--data_dir", type=Path, required=True, help="of the prepared dataset")
    parser.add_argument("--name", required=True, help="of the prepared dataset")
    parser.add_argument("--pretrain", type=Path, required=True, help="workdir of pretraining")
    parser.add_argument("--fold", type=int, default=0, help="from 0")
    parser.add_argument("--num_labeled", type=int, default=2, help="M")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--seeds", type=integers, default=(0,))
    run(parser, measure)


if __name__ == "__main__":
    main()
