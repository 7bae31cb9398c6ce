"""Runs a table of runs: `kafjax experiment --table TABLE --dataset NAME`.

`kafjax.study.experiment` describes what it does and writes.
"""

import itertools
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from kafjax.cluster import open_cluster
from kafjax.config_files import TABLES, find, load_table
from kafjax.errors import UserError
from kafjax.study.config_command import parse_changes
from kafjax.study.experiment import format_plan, make_experiment
from kafjax.study.jobs import Job, Outcome, find_slots, run_jobs
from kafjax.study.results import write_results
from kafjax.study.runs import parse_numbers


def _run_from_command_line() -> None:
    # Inside a function, so that importing this module defines no flag.
    from absl import flags

    from kafjax.commands import define_data_dir, define_path, fail, run_app

    string, boolean = flags.DEFINE_string, flags.DEFINE_bool
    table = string(
        "table", None, "A table's file, or the name of a shipped one, as in table1.", required=True
    )
    dataset = string("dataset", None, "chd, acdc, phantom, or another's name.", required=True)
    small = boolean("small", False, "The configs of DATASET_small, for CPUs.")
    numbers = {
        "rows": string("rows", None, "The table's rows, as in 1-3,5. Default: all."),
        "num_labeled": string("num_labeled", None, "Values of M. Default: the table's."),
        "folds": string("folds", None, "As in 0-4. Default: all; with --small 0,1."),
        "seeds": string("seeds", None, "As in 0,1,2. Default: the config's."),
    }
    changes = flags.DEFINE_multi_string(
        "set",
        [],
        "A field of all configs, as in model.dtype=bfloat16, or of one kind, as in "
        "finetune.num_epochs=34; may be repeated.",
    )
    workdir = define_path("workdir", "runs/experiments", "Folder of the runs.")
    data_dir = define_data_dir("data", "Folder of the prepared dataset.")
    cluster = string("cluster", None, "A cluster of dask: local, slurm, or a scheduler's address.")
    slots = flags.DEFINE_integer(
        "slots", None, "Jobs at a time, on slurm its jobs. Default: one a device or core."
    )
    plan = boolean("plan", False, "Only list the remaining jobs.")
    step_seconds = flags.DEFINE_list(
        "step_seconds", None, "For --plan: of pretraining, fine-tuning, validation: 1.1,0.3,0.1."
    )
    only_collect = boolean("collect", False, "Only make the table of the runs there are.")

    def command() -> int | None:
        # This process trains nothing, and must not take the devices' memory.
        jax.config.update("jax_platforms", "cpu")
        experiment = make_experiment(
            load_table(table.value),
            dataset.value,
            workdir=workdir.value,
            data_dir=data_dir.value,
            small=small.value,
            changes=parse_changes(changes.value),
            **{name: parse_numbers(name, flag.value) for name, flag in numbers.items()},
        )
        jobs = experiment.plan()
        if plan.value:
            print(format_plan(jobs, _parse_seconds(step_seconds.value)), flush=True)
            return None
        outcome = Outcome()
        if not only_collect.value:
            experiment.check_dataset()
            outcome = _run(jobs, cluster.value, slots.value)
        if outcome.received:
            return outcome.received
        name = find(table.value, TABLES).name
        print(write_results(experiment, name, command=_repeat(flags.FLAGS)), flush=True)
        if outcome.failed:
            fail(f"failed: {', '.join(outcome.failed)}", 1)
        return None

    run_app(command)


def _run(jobs: Sequence[Job], cluster: str | None, number: int | None) -> Outcome:
    if cluster is None:
        return run_jobs(jobs, find_slots(number))
    environments: list[Mapping[str, str]] = []
    if cluster == "local":
        environments = [slot.environment for slot in find_slots(number)]
    elif cluster == "slurm":
        if number is None or number < 1:
            raise UserError(
                f"--slots: found {number}, expected the number of jobs of SLURM, 1 or more"
            )
        environments = [{}] * number
    with open_cluster(cluster, environments) as client:
        return run_jobs(jobs, [], client=client)


def _parse_seconds(parts: list[str] | None) -> Any:
    try:
        seconds = None if parts is None else tuple(map(float, parts))
    except ValueError:
        seconds = ()
    if seconds is not None and len(seconds) != 3:
        raise UserError(f"--step_seconds: found {parts}, expected three numbers, as in 1.1,0.3,0.1")
    return seconds


def _repeat(flags: Any) -> str:
    """The command, without what does not change the table."""
    names = (
        *("table", "dataset", "small", "rows", "num_labeled", "folds", "seeds"),
        *("set", "workdir", "data_dir"),
    )
    arguments = [flags[name].serialize().split("\n") for name in names if flags[name].present]
    return shlex.join(["kafjax", "experiment", *itertools.chain(*arguments)])


if __name__ == "__main__":
    _run_from_command_line()
