"""Tables as jobs: every command is one that the commands take, and results are the runs' own."""

import csv
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kafjax.config_files import TABLES, load_table, shipped_names
from kafjax.study import experiment as command_module
from kafjax.study.config_command import parse_changes
from kafjax.study.experiment import (
    PHANTOMS,
    Experiment,
    format_plan,
    is_pretrained,
    make_experiment,
)
from kafjax.study.jobs import Job
from kafjax.study.plan import Row, Table
from kafjax.study.results import collect, draw, format_csv, mean_of, write_results
from kafjax.study.runs import RunKey, run_config
from kafjax.workdir.scores import describe_run
from kafjax.workdir.workdir import Workdir

ROOT = Path(__file__).parents[1]
FILES = [f"configs/tables/{name}.py" for name in shipped_names(TABLES)]


@pytest.fixture(autouse=True)
def in_the_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def experiment(tmp_path: Path, table: Table, dataset: str = "phantom", **fields: Any) -> Experiment:
    places = {"workdir": str(tmp_path / "runs"), "data_dir": str(tmp_path / "data")}
    return make_experiment(table, dataset, **{**places, **fields})


def of_file(name: str) -> Table:
    return load_table(name)


def commands(planned: list[Job]) -> dict[str, str]:
    return {job.name: " ".join(job.command) for job in planned}


@pytest.mark.parametrize(
    ("dataset", "small"),
    [("phantom", True), ("phantom", False), ("chd", False), ("acdc", False)],
)
@pytest.mark.parametrize("file", FILES)
def test_every_table_is_planned(tmp_path: Path, file: str, dataset: str, small: bool) -> None:
    """`plan` makes and checks the config of every command; the flags say the same."""
    table = load_table(file)
    planned = experiment(tmp_path, table, dataset, small=small, seeds=[0, 3]).plan()
    found = commands(planned)
    assert len(found) == len(planned)
    for job in planned:
        assert not job.is_done()
        assert set(job.needs) <= set(list(found)[: list(found).index(job.name)])
    rows = {row.workdir for row in table.rows}
    folds = 1 if small else 5
    assert sum(name.startswith("segment/") for name in found) == 2 * folds * len(rows)
    assert len({row.name for row in table.rows}) == len(table.rows)
    assert table.reference in {row.name for row in table.rows}
    assert f"--table {Path(file).stem} " in (ROOT / file).read_text()


def test_commands_are_those_that_users_type(tmp_path: Path) -> None:
    table = Table(
        "A table",
        (
            Row("a", "kaf_unet", "kaf", (0, 1, 0.08)),
            Row("b", "unet", "glcl"),
            Row("c", "unet", "gcl"),
            Row("d", "unet_c2"),
        ),
        num_labeled={"chd": (2, 6)},
        reference="d",
    )
    planned = experiment(tmp_path, table, "chd", folds=[1], seeds=[7]).plan()
    runs = tmp_path / "runs" / "chd"
    data = f"--config.data.dir={tmp_path / 'data'}"
    pretrain, segment = "-m kafjax.main --config configs/", "-m kafjax.cross_validate --config"
    last = "--folds 1 --num_labeled 2,6 --seeds 7 --workdir"
    assert commands(planned) == {
        "pretrain/kaf_unet_kaf_w0-1-0.08_seed7": f"{pretrain}chd_pretrain.py:kaf {data} "
        "--config.seed=7 --config.loss.weights.cnn=0 --config.loss.weights.matching=0.08 "
        f"--workdir {runs}/pretrain/kaf_unet_kaf_w0-1-0.08_seed7",
        "pretrain/unet_gcl_seed7": f"{pretrain}chd_pretrain.py:gcl {data} --config.seed=7 "
        f"--workdir {runs}/pretrain/unet_gcl_seed7",
        "pretrain/unet_glcl_seed7": f"{pretrain}chd_pretrain.py:glcl {data} --config.seed=7 "
        f"--config.init_from={runs}/pretrain/unet_gcl_seed7 "
        f"--workdir {runs}/pretrain/unet_glcl_seed7",
        "segment/kaf_unet_kaf_w0-1-0.08_seed7_fold1": f"{segment} configs/chd_finetune.py {data} "
        f"--config.init_from={runs}/pretrain/kaf_unet_kaf_w0-1-0.08_seed7 {last} "
        f"{runs}/segment/kaf_unet_kaf_w0-1-0.08",
        "segment/unet_glcl_seed7_fold1": f"{segment} configs/chd_finetune.py {data} "
        f"--config.init_from={runs}/pretrain/unet_glcl_seed7 --config.model.name=unet {last} "
        f"{runs}/segment/unet_glcl",
        "segment/unet_gcl_seed7_fold1": f"{segment} configs/chd_finetune.py {data} "
        f"--config.init_from={runs}/pretrain/unet_gcl_seed7 --config.model.name=unet {last} "
        f"{runs}/segment/unet_gcl",
        "segment/unet_c2_scratch_seed7_fold1": f"{segment} configs/chd_finetune.py:scratch {data} "
        f"--config.model.name=unet_c2 {last} {runs}/segment/unet_c2_scratch",
    }
    needs = {job.name: job.needs for job in planned}
    assert needs["pretrain/unet_glcl_seed7"] == ("pretrain/unet_gcl_seed7",)
    assert needs["segment/unet_glcl_seed7_fold1"] == ("pretrain/unet_glcl_seed7",)
    assert needs["segment/unet_c2_scratch_seed7_fold1"] == ()


def test_tables_share_what_they_have_in_common(tmp_path: Path) -> None:
    one, two, three = (
        commands(experiment(tmp_path, of_file(name)).plan())
        for name in ("table1", "table2", "table3")
    )
    assert {name: one[name] for name in one.keys() & two.keys()} == {
        name: two[name] for name in one.keys() & two.keys()
    }
    shared = {"pretrain/kaf_unet_kaf_seed0", "segment/kaf_unet_kaf_seed0_fold4"}
    assert shared <= one.keys() & two.keys() & three.keys()
    assert sum(name.startswith("pretrain/") for name in two) == 10


def test_all_rows_that_are_refused_are_named(tmp_path: Path) -> None:
    rows = (Row("a", "unet", "kaf"), Row("b", "fcn", "glcl"), Row("c", "vnet"), Row("d", "unet"))
    table = Table("Wrong", rows, {"phantom": (2,)}, "d")
    with pytest.raises(ValueError, match="expected") as caught:
        experiment(tmp_path, table).plan()
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        "configs/phantom_pretrain.py:kaf",
        "configs/phantom_pretrain.py:glcl",
        "configs/phantom_finetune.py:scratch",
    ]
    assert "0 for a network without KAF layers" in lines[0]
    assert "config.model.name is 'vnet'" in lines[2]


ONE_ROW = Table("One", (Row("kaf", "kaf_unet", "kaf"),), {"phantom": (2,)}, "kaf")


def test_workdirs_of_other_configs_are_refused(tmp_path: Path) -> None:
    ours = experiment(tmp_path, ONE_ROW, small=True)
    workdir = ours.root / "pretrain" / "kaf_unet_kaf_seed0"
    workdir.mkdir(parents=True)
    fields = ours.pretraining(ONE_ROW.rows[0], 0).config().to_dict()
    (workdir / "config.json").write_text(json.dumps({**fields, "batch_size": 1}))
    with pytest.raises(ValueError, match="batch_size: 1 there"):
        ours.plan()


def test_fields_set_for_all_runs_are_in_every_command(tmp_path: Path) -> None:
    changes = parse_changes(["model.dtype=bfloat16", "num_epochs=2"])
    assert changes == {"model.dtype": "bfloat16", "num_epochs": 2}
    planned = experiment(tmp_path, ONE_ROW, changes=changes).plan()
    training = [line for name, line in commands(planned).items() if "prepare" not in name]
    assert len(training) > 1
    for line in training:
        assert "--config.model.dtype=bfloat16" in line
        assert "--config.num_epochs=2" in line
    with pytest.raises(ValueError, match=r"found 'model\.dtype', expected FIELD=VALUE"):
        parse_changes(["model.dtype"])
    with pytest.raises(ValueError, match=r"model\.dtype"):
        experiment(tmp_path, ONE_ROW, changes={"model.dtype": "float12"}).plan()


def test_fields_set_for_one_kind_of_run_are_in_its_commands_only(tmp_path: Path) -> None:
    changes = {"num_epochs": 2, "finetune.num_epochs": 3}
    planned = commands(experiment(tmp_path, ONE_ROW, changes=changes).plan())
    epochs = {name: "num_epochs=3" in line for name, line in planned.items() if "/" in name}
    assert {name.split("/")[0]: x for name, x in epochs.items()} == {
        "prepare": False,
        "pretrain": False,
        "segment": True,
    }
    assert "num_epochs=2" in next(x for name, x in planned.items() if "pretrain" in name)
    for unknown in ("finetune.num_epoch", "finetune"):
        with pytest.raises(ValueError, match=unknown.removeprefix("finetune.")):
            experiment(tmp_path, ONE_ROW, changes={unknown: 3}).plan()


def test_pretraining_is_complete_when_its_last_step_is_saved(tmp_path: Path) -> None:
    config = experiment(tmp_path, ONE_ROW).pretraining(ONE_ROW.rows[0], 0).config()
    assert not is_pretrained(config, tmp_path)
    row = {"step": 9, "epoch": config.num_epochs}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert not is_pretrained(config, tmp_path)
    (tmp_path / "checkpoints" / "9").mkdir(parents=True)
    assert is_pretrained(config, tmp_path)


def test_work_is_that_of_the_protocol(tmp_path: Path) -> None:
    """CHD by hand: 68 volumes of about 235 slices, 51 epochs of 32 pairs, 101 of 10 slices."""
    table = Table("A", (Row("a", "kaf_unet", "kaf"),), {"chd": (2, 6)}, "a")
    planned = experiment(tmp_path, table, "chd", folds=[0]).plan()
    steps = 51 * (68 * 235 // 32)
    training = 101 * (2 * 235 // 10 + 6 * 235 // 10)
    validation = 2 * (51 + 1) * 320  # 13.6 volumes after every second epoch, and evaluated
    found = format_plan(planned, (1.0, 0.5, 0.1))
    assert f"kaf_unet, about: {steps:,} steps of pretraining, {training:,} steps" in found
    hours = (steps + 0.5 * training + 0.1 * validation) / 3600
    assert f"{validation:,} batches of validation: {hours:.1f} device hours" in found


def test_prepared_datasets_are_counted(phantom_dataset: Path, tmp_path: Path) -> None:
    ours = experiment(tmp_path, ONE_ROW, data_dir=str(phantom_dataset.parents[1]), folds=[0])
    prepare, pretrain, segment = ours.plan()
    assert prepare.is_done()
    assert pretrain.work["kaf_unet"] == (20 * (4 * 12 // 16), 0, 0)
    assert segment.work["kaf_unet"][:2] == (0, 60 * (2 * 12 // 10))


def fake_runs(ours: Experiment, dice: dict[tuple[str, RunKey], float]) -> None:
    """Writes what complete runs leave."""
    for (name, run), value in dice.items():
        row = next(row for row in ours.table.rows if row.name == name)
        config = run_config(ours.segmentation(row, run.seed).config(), run)
        workdir = ours.row_dir(row) / run.name
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "config.json").write_text(json.dumps(config.to_dict()))
        line = {"step": 1, "epoch": config.num_epochs}
        (workdir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        found = {
            "step": 1,
            "checkpoint": "last",
            "split": "validation",
            "run": describe_run(Workdir(workdir), config.to_dict()),
            "pooled_dice": {"mean": value},
            "chance": 0.125,
            "by_class": {},
            "by_volume": {},
        }
        (workdir / "evaluation.json").write_text(json.dumps(found))


TWO_ROWS = Table(
    "Two rows",
    (
        Row("plain", "unet", paper={"phantom": {2: "0.100(.01)"}}),
        Row("wide", "unet_c2", beyond=True),
    ),
    {"phantom": (2, 4)},
    reference="plain",
    with_parameters=True,
    with_folds=True,
)
DICE = {  # by row and M, of (fold, seed) in order
    ("plain", 2): (0.10, 0.20, 0.30, 0.40),
    ("wide", 2): (0.30, 0.20, 0.50, 0.60),
    ("plain", 4): (0.50, 0.50, 0.60, 0.60),
    ("wide", 4): (0.60, 0.60, 0.70),
}


def two_rows(tmp_path: Path, dataset: Path) -> Experiment:
    data_dir = str(dataset.parents[1])
    ours = experiment(tmp_path, TWO_ROWS, folds=[0, 3], seeds=[0, 1], data_dir=data_dir)
    numbers = [(0, 0), (0, 1), (3, 0), (3, 1)]
    fake_runs(
        ours,
        {
            (name, RunKey(m, *numbers[i])): value
            for (name, m), values in DICE.items()
            for i, value in enumerate(values)
        },
    )
    return ours


def test_means_errors_and_differences(tmp_path: Path, phantom_dataset: Path) -> None:
    """By hand: of 0.1, 0.2, 0.3, 0.4 the variance is 0.05 / 3, the error its root by 2."""
    results = collect(two_rows(tmp_path, phantom_dataset))
    plain_2, plain_4, wide_2, wide_4 = results.lines
    error = (0.05 / 3) ** 0.5 / 2
    assert (plain_2["mean"], plain_2["standard_error"]) == pytest.approx((0.25, error))
    assert (plain_2["fold1"], plain_2["fold4"]) == pytest.approx((0.15, 0.35))
    assert (plain_2["n"], plain_2["std_over_folds"]) == (4, pytest.approx(0.1))
    assert plain_2["difference"] is None
    # 0.2, 0, 0.2, 0.2 around 0.15
    assert wide_2["difference"] == pytest.approx(0.15)
    assert wide_2["difference_standard_error"] == pytest.approx(0.05)
    nothing = [wide_4[name] for name in ("mean", "difference", "std_over_folds", "fold4")]
    assert nothing == [None] * 4
    assert (wide_4["fold1"], wide_4["n"], plain_4["n"]) == (pytest.approx(0.6), 3, 4)
    assert mean_of([]) == mean_of([0.5, None]) == (None, None)
    assert mean_of([0.5]) == (0.5, None)


def test_tables_and_plots_are_written_alike(tmp_path: Path, phantom_dataset: Path) -> None:
    ours = two_rows(tmp_path, phantom_dataset)
    markdown = write_results(ours, "two", command="kafjax experiment --table two.py")
    lines = markdown.splitlines()
    assert (
        "|  | M | Fold 1 | Fold 4 | Dice | n | Difference | Mean(Std) | Paper | #params |" in lines
    )
    plain, _, wide, incomplete = [line for line in lines if re.match(r"\| (plain|wide)", line)]
    assert plain.startswith(
        "| plain | 2 | 0.1500 | 0.3500 | 0.250 ± 0.065 | 4 |  | 0.250(.100) | 0.100(.01) | 0."
    )
    assert wide.startswith(
        r"| wide \* | 2 | 0.2500 | 0.5500 | 0.400 ± 0.091 | 4 | +0.150 ± 0.050 | 0.400(.150) |  |"
    )
    assert incomplete.startswith(r"| wide \* | 4 | 0.6000 |  |  | 3 of 4 |  |  |  |")
    assert "frequencies of classes: 0.125." in markdown
    assert "Missing, 1 of 16 runs:" in lines
    files = ["two.csv", "two.json", "two.md", "two.png", "two.svg", "two_runs.csv"]
    assert sorted(path.name for path in ours.root.glob("two*")) == files
    before = [(ours.root / name).read_bytes() for name in files]
    write_results(ours, "two", command="kafjax experiment --table two.py")
    assert [(ours.root / name).read_bytes() for name in files] == before
    rows = list(csv.DictReader((ours.root / "two.csv").read_text().splitlines()))
    assert [row["mean"] for row in rows][:2] == ["0.25", "0.55"]
    assert rows[3]["mean"] == "" and rows[3]["n"] == "3"
    runs = list(csv.DictReader((ours.root / "two_runs.csv").read_text().splitlines()))
    assert len(runs) == 15
    dice = {"row": "plain", "M": "2", "fold": "4", "seed": "0", "dice": "0.3"}
    assert runs[2] == {**dice, "step": "1", "checkpoint": "last"}
    assert {row["checkpoint"] for row in rows} == {"last"}
    assert "Checkpoint of each run: last." in markdown
    found = json.loads((ours.root / "two.json").read_text())
    assert found["missing"] == ["segment/unet_c2_scratch/fold3_M4_seed1"]
    assert {run["checkpoint"] for run in found["runs"]} == {"last"}


def test_experiments_without_any_run_are_collected(tmp_path: Path) -> None:
    ours = experiment(tmp_path, ONE_ROW, folds=[0])
    assert "0 of 1" in write_results(ours, "one", command="command")
    assert format_csv(collect(ours).lines).count("\n") == 2
    assert draw(collect(ours)).axes[0].get_yticklabels()[0].get_text() == "kaf"


def test_damaged_evaluations_are_named(tmp_path: Path, phantom_dataset: Path) -> None:
    ours = two_rows(tmp_path, phantom_dataset)
    (ours.row_dir(TWO_ROWS.rows[0]) / "fold0_M2_seed0" / "evaluation.json").write_text("{")
    with pytest.raises(ValueError, match=r"fold0_M2_seed0/evaluation.json: damaged"):
        collect(ours)


def test_defaults_are_the_tables_and_the_configs(tmp_path: Path) -> None:
    small = experiment(tmp_path, of_file("table3"), small=True)
    assert (small.dataset, small.folds, small.seeds) == ("phantom_small", (0, 1), (0,))
    assert small.num_labeled == of_file("table3").num_labeled["phantom"]
    chd = experiment(tmp_path, of_file("table3"), "chd")
    assert (chd.folds, chd.num_labeled) == (tuple(range(5)), (2, 6, 10, 15, 20, 30, 51))
    with pytest.raises(ValueError, match="no M for chd"):
        experiment(tmp_path, ONE_ROW, "chd")


def test_rows_are_chosen_by_number_beside_the_reference(tmp_path: Path) -> None:
    some = experiment(tmp_path, of_file("table2"), rows=[8, 2])
    assert [row.name for row in some.table.rows] == ["1, 1, 0.01", "0, 1, 0.005", "from scratch"]
    assert experiment(tmp_path, of_file("table2"), rows=[11]).table.rows == (some.table.rows[-1],)
    with pytest.raises(ValueError, match="--rows: found 0, 12, expected numbers from 1 to 11"):
        experiment(tmp_path, of_file("table2"), rows=[0, 2, 12])


def test_missing_clinical_data_stops_with_the_command_that_prepares_it(tmp_path: Path) -> None:
    ours = experiment(tmp_path, of_file("table1"), "acdc")
    with pytest.raises(ValueError, match=r"kafjax prepare --dataset acdc --raw_dir RAW"):
        ours.check_dataset()


def test_files_and_datasets_that_there_are_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"table9: no such file; the nearest shipped: .*table4"):
        of_file("table9")
    with pytest.raises(ValueError, match=r"configs/mnist_finetune.py:scratch: no such file; the n"):
        experiment(tmp_path, of_file("table1"), "mnist")


def test_mistakes_are_one_line_and_status_2() -> None:
    arguments = ("--table", FILES[0], "--dataset", "chd", "--folds", "0-9")
    done = subprocess.run(
        [sys.executable, "-m", "kafjax.experiment", *arguments, "--workdir", "nowhere"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    line = "folds: found 5, 6, 7, 8, 9, expected 0 to 4: config.data.num_folds is 5"
    assert (done.returncode, done.stderr) == (2, f"error: {line}\n")
    assert not Path("nowhere").exists()


def test_the_command_collects_and_says_how_to_repeat_it(tmp_path: Path) -> None:
    arguments = (
        "--table",
        "table3",
        "--dataset",
        "chd",
        "--rows",
        "1",
        "--folds",
        "0,1",
        "--collect",
    )
    places = ("--workdir", str(tmp_path / "runs [1]"), "--data_dir", str(tmp_path / "data"))
    done = subprocess.run(
        [sys.executable, "-m", "kafjax.experiment", *arguments, *places],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (command,) = re.findall("    (kafjax experiment .*)", done.stdout)
    assert shlex.split(command) == [
        *("kafjax", "experiment", "--table=table3", "--dataset=chd", "--rows=1", "--folds=0,1"),
        *(f"--workdir={places[1]}", f"--data_dir={places[3]}"),
    ]
    assert (tmp_path / "runs [1]" / "chd" / "table3.md").read_text() + "\n" == done.stdout


@pytest.mark.slow
def test_table_from_nothing(tmp_path: Path) -> None:
    """One row at the small size: prepares, pretrains, trains on one fold, makes the table."""
    table = tmp_path / "tiny.py"
    table.write_text(
        "from kafjax.study.plan import Row, Table\n"
        "def get_table():\n"
        "    row = Row('UNet, PCL', 'unet', 'pcl')\n"
        "    return Table('Tiny', (row,), {'phantom': (2,)}, 'UNet, PCL')\n"
    )
    places = ("--workdir", str(tmp_path / "runs"), "--data_dir", str(tmp_path / "data"))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "kafjax.experiment", "--table", str(table)),
            *("--dataset", "phantom", "--small", "--folds", "1", *places),
        ],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\| UNet, PCL \| 2 \| 0\.\d{3} \| 1 \|", done.stdout)
    assert (tmp_path / "runs" / "phantom_small" / "tiny.svg").is_file()
    assert command_module.__doc__ and PHANTOMS["phantom_small"].num_subjects == 10
