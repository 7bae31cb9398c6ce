"""Cross-validation: the appendix's table, which runs are run, signals, and the command."""

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections
import pytest
from jax.experimental.compilation_cache import compilation_cache

from kafjax.checkpoint.checkpointer import saved_metrics
from kafjax.configs import phantom_finetune, phantom_pretrain, phantom_scratch
from kafjax.study import cross_validation as module
from kafjax.study.cross_validation import cross_validate
from kafjax.study.plan import Row, Study, Table
from kafjax.study.results import Results, draw, format_csv, format_markdown, tabulate
from kafjax.study.runs import RunKey, parse_numbers, plan_runs, run_config
from kafjax.training import loop as train_module
from kafjax.workdir.scores import describe_run
from kafjax.workdir.workdir import Workdir
from tests.test_loop import steps_of

ROOT = Path(__file__).parents[1]

# The appendix's table 3: CHD, then ACDC. The mean it prints for CHD, M = 15, is not that of its own
# folds, which is 0.708; all else agrees, with numpy's standard deviation of ddof 0.
SLIP = {"0.712(.035)": "0.708(.035)"}
TABLE = """\
2 0.3085 0.3292 0.4649 0.4405 0.4178 0.392(.062)
6 0.5370 0.6527 0.6707 0.7076 0.6119 0.636(.058)
10 0.6382 0.6797 0.7252 0.7326 0.6900 0.693(.034)
15 0.6668 0.6892 0.7519 0.7458 0.6844 0.712(.035)
20 0.6738 0.7204 0.7629 0.7766 0.7051 0.728(.038)
30 0.7291 0.7324 0.8001 0.8014 0.7093 0.754(.039)
51 0.7385 0.7594 0.8148 0.8234 0.8048 0.788(.033)
2 0.7975 0.7027 0.7510 0.7097 0.7458 0.741(.034)
6 0.8827 0.8941 0.8620 0.8596 0.8682 0.873(.013)
10 0.9101 0.9086 0.8919 0.8709 0.8914 0.895(.014)
15 0.9175 0.9076 0.9140 0.8932 0.9091 0.908(.008)
20 0.9173 0.9152 0.9168 0.9101 0.9143 0.915(.003)
30 0.9224 0.9232 0.9252 0.9162 0.9187 0.921(.003)
80 0.9313 0.9285 0.9336 0.9255 0.9328 0.930(.003)
"""


def results_of(dice: dict[RunKey, float | None], missing: tuple[RunKey, ...] = ()) -> Results:
    """A table of one row whose runs have this Dice."""
    row = Row("", "unet")
    study = Study(
        table=Table("Folds", (row,), {}, reference="", with_folds=True),
        dataset="chd",
        root=Path("runs"),
        runs=tuple(sorted({*dice, *missing})),
        base=None,
    )
    scores = {
        run: {"pooled_dice": {"mean": value}, "chance": None, "checkpoint": "last"}
        for run, value in dice.items()
    }
    return tabulate(study, {"": scores})


@pytest.mark.parametrize("line", TABLE.splitlines())
def test_means_and_deviations_are_those_of_the_appendix(line: str) -> None:
    m, *dice, summary = line.split()
    found = format_markdown(
        results_of({RunKey(int(m), fold, 0): float(x) for fold, x in enumerate(dice)})
    )
    header, _, row = [line for line in found.splitlines() if line.startswith("|")]
    assert header == ("| M | Fold 1 | Fold 2 | Fold 3 | Fold 4 | Fold 5 | Dice | n | Mean(Std) |")
    cells = row.strip("| ").split(" | ")
    assert cells[:6] == [m, *dice]
    assert cells[7:] == ["5", SLIP.get(summary, summary)]


def test_cells_are_means_over_seeds_and_empty_without_all_runs() -> None:
    runs = [RunKey(m, fold, seed) for m in (2, 6) for fold in (0, 3) for seed in (0, 1)]
    dice = {run: run.num_labeled / 10 + run.fold / 100 + run.seed / 1000 for run in runs}
    del dice[RunKey(6, 3, 1)]
    results = results_of(dice, missing=(RunKey(6, 3, 1),))
    two, six = results.lines
    names = ("fold1", "fold4", "mean", "std_over_folds")
    assert [two[name] for name in names] == pytest.approx([0.2005, 0.2305, 0.2155, 0.015])
    assert [six[name] for name in names] == [pytest.approx(0.6005), None, None, None]
    first, second = csv.DictReader(format_csv(results.lines).splitlines())
    assert [float(first[name]) for name in names] == [two[name] for name in names]
    assert [second[name] for name in ("M", *names)] == ["6", str(six["fold1"]), "", "", ""]
    assert (first["checkpoint"], first["model"]) == ("last", "unet")
    text = format_markdown(results)
    assert "| 6 | 0.6005 |  |  | 3 of 4 |  |\n" in text
    assert "Missing, 1 of 8 runs:\n\n- fold3_M6_seed1\n" in text


def test_a_run_without_a_dice_leaves_the_mean_empty_and_is_named() -> None:
    results = results_of({RunKey(2, 0, 0): 0.5, RunKey(2, 1, 0): None, RunKey(2, 2, 0): 0.7})
    (line,) = results.lines
    assert [line[f"fold{n}"] for n in (1, 2, 3)] == [0.5, None, 0.7]
    assert (line["mean"], line["std_over_folds"], line["n"]) == (None, None, 3)
    text = format_markdown(results)
    assert "| 2 | 0.5000 |  | 0.7000 | 3 |\n" in text
    assert "no Dice, 1 of 3 runs:\n\n- fold1_M2_seed0\n" in text
    assert "Missing" not in text
    assert [row["mean"] for row in csv.DictReader(format_csv(results.lines).splitlines())] == [""]
    draw(results)


def test_numbers_are_lists_and_ranges() -> None:
    assert parse_numbers("folds", None) is None
    assert parse_numbers("folds", "10,2,6") == [2, 6, 10]
    assert parse_numbers("folds", "0-2, 4,1") == [0, 1, 2, 4]
    for text in ("", "x", "4-2", "-1", "1,,2", "1.5"):
        with pytest.raises(
            ValueError, match=r"--folds: found .*, expected numbers as in 2,6,10 or 0-4"
        ):
            parse_numbers("folds", text)


def tiny_config(dataset: Path, **overrides: Any) -> ml_collections.ConfigDict:
    """One labelled volume of 12 slices, two folds, two steps, validated at the end."""
    config = phantom_scratch.get_config()
    fields = {
        "model.name": "unet",
        "model.filters": 4,
        "batch_size": 4,
        "num_steps": 2,
        "data.dir": str(dataset.parents[1]),
        "data.num_folds": 2,
        "every.validation_epochs": 0,
        "every.picture": 0,
    }
    config.update_from_flattened_dict(fields | overrides)
    return config


def test_all_mistakes_are_found_before_the_first_run(phantom_dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(phantom_dataset)
    wrong = r"folds: found 2, 3, expected 0 to 1: .*; num_labeled: found 0, expected 1 or more"
    with pytest.raises(ValueError, match=wrong):
        cross_validate(config, tmp_path, folds=[1, 2, 3], num_labeled=[2, 0])
    with pytest.raises(ValueError, match=r"fold 0, M = 3: .* 1 to 2, .*; fold 1, M = 3: "):
        cross_validate(config, tmp_path, num_labeled=[1, 3])
    with pytest.raises(ValueError, match=r"config.task is 'pretrain', expected 'segment'"):
        cross_validate(phantom_pretrain.get_config(), tmp_path, num_labeled=[2])
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        cross_validate(config, tmp_path / "nowhere", num_labeled=[2], collect=True)
    assert list(tmp_path.iterdir()) == []


class Runs:
    """Stands in for `train` and `evaluate_run`: notes the calls, and leaves what they leave."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.calls: list[str] = []
        self.trained: Callable[[str], int | None] = lambda name: None
        self.evaluated: Callable[[str], None] = lambda name: None
        monkeypatch.setattr(module, "train", self._train)
        monkeypatch.setattr(module, "evaluate_run", self._evaluate)

    def _train(self, config: Any, workdir: Path) -> int | None:
        self.calls.append(f"train {workdir.name}")
        if received := self.trained(workdir.name):
            return received
        workdir.mkdir(exist_ok=True)
        (workdir / "config.json").write_text(json.dumps(config.to_dict()))
        row = {"step": config.num_steps, "epoch": config.num_steps / 3}
        (workdir / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        return None

    def _evaluate(self, workdir: Path) -> None:
        self.calls.append(f"evaluate {workdir.name}")
        self.evaluated(workdir.name)
        config = json.loads((workdir / "config.json").read_text())
        dice = 0.5 + config["data"]["fold"] / 10 + config["seed"] / 100
        chance = 0.1 + config["seed"] / 100
        found = {
            "step": config["num_steps"],
            "checkpoint": "last",
            "split": "validation",
            "run": describe_run(Workdir(workdir), config),
            "pooled_dice": {"mean": dice},
            "chance": chance,
            "by_class": {},
            "by_volume": {},
        }
        (workdir / "evaluation.json").write_text(json.dumps(found))

    def take(self) -> list[str]:
        calls, self.calls = self.calls, []
        return calls


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(monkeypatch)


def test_only_what_is_not_complete_is_run(
    phantom_dataset: Path, tmp_path: Path, fake: Runs
) -> None:
    config = tiny_config(phantom_dataset)
    assert cross_validate(config, tmp_path, num_labeled=[1], folds=[1]) is None
    assert fake.take() == ["train fold1_M1_seed0", "evaluate fold1_M1_seed0"]
    assert cross_validate(config, tmp_path, num_labeled=[1], seeds=[0, 7]) is None
    names = ["fold0_M1_seed0", "fold0_M1_seed7", "fold1_M1_seed7"]
    assert fake.take() == [f"{what} {name}" for name in names for what in ("train", "evaluate")]
    assert cross_validate(config, tmp_path, num_labeled=[1], seeds=[0, 7]) is None
    assert fake.take() == []
    # A run that now ends later is not complete, whatever its evaluation says.
    longer = tiny_config(phantom_dataset, num_steps=3)
    assert cross_validate(longer, tmp_path, num_labeled=[1]) is None
    assert len(fake.take()) == 4


def test_collects_what_is_there_and_names_the_rest(
    phantom_dataset: Path, tmp_path: Path, fake: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(phantom_dataset)
    cross_validate(config, tmp_path, num_labeled=[1, 2], folds=[1], seeds=[0, 7])
    fake.take()
    capsys.readouterr()
    assert cross_validate(config, tmp_path, num_labeled=[2], seeds=[0, 7], collect=True) is None
    assert fake.take() == []
    printed = capsys.readouterr().out
    assert "| 2 |  | 0.6350 | 2 of 4 |" in printed
    assert "frequencies of classes: 0.135" in printed
    assert "Checkpoint of each run: last." in printed
    assert "Missing, 2 of 6 runs:\n\n- fold0_M2_seed0\n- fold0_M2_seed7\n" in printed
    assert (tmp_path / "cross_validation.md").read_text().strip() == printed.strip()
    found = json.loads((tmp_path / "cross_validation.json").read_text())
    assert found["missing"] == ["fold0_M2_seed0", "fold0_M2_seed7"]
    assert [run["pooled_dice"]["mean"] for run in found["runs"]] == pytest.approx([0.6, 0.67] * 2)
    # The runs with M = 1 are in the table too: whoever planned them may be running others.
    assert [row["num_labeled"] for row in found["rows"]] == [1, 2]
    assert found["rows"][1]["folds"] == [None, pytest.approx(0.635)]
    assert {run["checkpoint"] for run in found["runs"]} == {"last"}
    (_, line) = csv.DictReader((tmp_path / "cross_validation.csv").read_text().splitlines())
    assert (line["M"], line["fold2"], line["checkpoint"]) == ("2", "0.635", "last")


def test_workdirs_of_another_config_and_damaged_ones_are_refused(
    phantom_dataset: Path, tmp_path: Path, fake: Runs
) -> None:
    cross_validate(tiny_config(phantom_dataset), tmp_path, num_labeled=[1])
    other = tiny_config(phantom_dataset, batch_size=6)
    for collect in (False, True):
        with pytest.raises(ValueError, match=r"(?s)another config.*batch_size: 4 there, 6 here"):
            cross_validate(other, tmp_path, num_labeled=[1], collect=collect)
    (tmp_path / "fold0_M1_seed0" / "evaluation.json").write_text('{"step": ')
    with pytest.raises(ValueError, match=r"fold0_M1_seed0/evaluation.json: damaged"):
        cross_validate(tiny_config(phantom_dataset), tmp_path, num_labeled=[1], collect=True)


def test_signal_stops_in_training_and_in_evaluation(
    phantom_dataset: Path, tmp_path: Path, fake: Runs
) -> None:
    config = tiny_config(phantom_dataset)
    before = signal.getsignal(signal.SIGTERM)
    fake.trained = lambda name: 2 if "fold1" in name else None
    assert cross_validate(config, tmp_path, num_labeled=[1]) == signal.SIGINT
    assert fake.take()[-1] == "train fold1_M1_seed0"
    fake.trained = lambda name: None
    fake.evaluated = lambda name: os.kill(os.getpid(), signal.SIGTERM)
    assert cross_validate(config, tmp_path, num_labeled=[1, 2]) == signal.SIGTERM
    assert fake.take() == ["train fold1_M1_seed0", "evaluate fold1_M1_seed0"]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """A compilation cache that keeps all, and how often something was not in it."""
    fields = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("xla")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in fields}
    misses: list[str] = []

    def note(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_misses":
            misses.append(event)

    compilation_cache.reset_cache()
    for name, value in fields.items():
        jax.config.update(name, value)
    jax.monitoring.register_event_listener(note)
    yield misses
    jax.monitoring.unregister_event_listener(note)
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_real_runs_compile_once_stop_go_on_and_make_a_table(
    phantom_dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cache: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tiny_config(phantom_dataset, num_steps=6)
    counts = []
    evaluate = module.evaluate_run

    def counted(workdir: Path) -> Any:
        results = evaluate(workdir)
        counts.append(len(cache))
        return results

    def loss(step: int) -> float:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return 1.0

    monkeypatch.setattr(module, "evaluate_run", counted)
    with monkeypatch.context() as patched:
        patched.setattr(train_module, "make_update", steps_of(loss))
        assert cross_validate(config, tmp_path, num_labeled=[1]) == signal.SIGTERM
    stopped = tmp_path / "fold0_M1_seed0"
    (saved,) = saved_metrics(stopped)
    assert 0 < saved < 6
    assert sorted(p.name for p in tmp_path.iterdir()) == [stopped.name]

    assert cross_validate(config, tmp_path, num_labeled=[1, 2]) is None
    assert f"Resuming {stopped} from step {saved}." in capsys.readouterr().out
    assert counts[0] > 0
    assert len(counts) == 4
    assert counts[-1] == counts[0]  # another fold or M finds every program
    rows = json.loads((tmp_path / "cross_validation.json").read_text())["rows"]
    runs = plan_runs(config, num_labeled=[1, 2])
    found = [json.loads((tmp_path / r.name / "evaluation.json").read_text()) for r in runs]
    for m, row in zip((1, 2), rows, strict=True):
        of_row = [of_run for of_run in found if of_run["run"]["num_labeled"] == m]
        assert [of_run["run"]["fold"] for of_run in of_row] == [0, 1]
        assert row["folds"] == [of_run["pooled_dice"]["mean"] for of_run in of_row]
    assert config.data.fold == 0
    assert run_config(config, runs[-1]).data.fold == 1


# Stands in for `train` and `evaluate_run` in a process of its own, for one fold.
PART = """
import sys
from pathlib import Path
import pytest
from tests.test_cross_validation import Runs, cross_validate, tiny_config
dataset, root, fold = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
with pytest.MonkeyPatch.context() as patch:
    Runs(patch)
    config = tiny_config(dataset)
    numbers = {"num_labeled": [1, 2], "folds": [fold], "seeds": [0, 1, 2, 3]}
    assert cross_validate(config, root, **numbers) is None
"""


def test_two_processes_keep_each_others_rows(phantom_dataset: Path, tmp_path: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", PART, *map(str, (phantom_dataset, tmp_path, fold))])
        for fold in (0, 1)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    found = json.loads((tmp_path / "cross_validation.json").read_text())
    assert (len(found["runs"]), found["missing"]) == (16, [])
    assert all(None not in row["folds"] for row in found["rows"])


def test_seed_in_init_from_is_each_runs_own() -> None:
    config = phantom_finetune.get_config()
    config.init_from = "runs/pretrain{seed}"
    own = run_config(config, RunKey(num_labeled=2, fold=3, seed=7))
    assert (own.init_from, own.seed, own.data.fold) == ("runs/pretrain7", 7, 3)
    assert config.init_from == "runs/pretrain{seed}"


def command(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "kafjax.cross_validate", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ("--num_labeled", "2", "--folds", "0-9"),
            "error: folds: found 5, 6, 7, 8, 9, expected 0 to 4: config.data.num_folds is 5\n",
        ),
        (
            ("--num_labeled", "2", "--config.data.fold=1"),
            "error: --config.data.fold is given; expected --folds instead\n",
        ),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments: tuple[str, ...], line: str) -> None:
    fixed = ("--config", "configs/phantom_scratch.py", "--workdir", "nowhere")
    assert command(*fixed, *arguments) == (2, line)
    assert not (ROOT / "nowhere").exists()
