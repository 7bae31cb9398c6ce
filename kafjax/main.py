"""Trains by a config file: `kafjax train --config chd_pretrain`.

Any field is set from the command line: `--config.batch_size=16`. A workdir that holds a checkpoint
is resumed; Ctrl-C and SIGTERM write one first. `--check` checks everything that a run needs,
takes five steps to estimate its time, and stops. Exit status: 0 complete, 2 for a mistake in the
command, config or data or a full disk, 1 for a loss that is not finite, 128 + signal when stopped,
75 if another process of the run ended, 70 for a fault of kafjax.
"""

from pathlib import Path
from typing import Any

from absl import app, flags

from kafjax import __version__
from kafjax.buckets import show
from kafjax.commands import define_path, parse_flags, run_command
from kafjax.config_files import define_config, given_config
from kafjax.errors import UserError
from kafjax.xla import use_huge_pages

# JAX and its users are imported after the first line of output, because they take seconds.

_CONFIG = define_config("The run: a config file, or the name of a shipped one.")
_WORKDIR = define_path("workdir", None, "The run's folder. Default: runs/<config name>.")
_RESUME = flags.DEFINE_bool("resume", False, "Refuse to start without a checkpoint.")
_CHECK = flags.DEFINE_bool("check", False, "Check everything the run needs, time it, and stop.")
_DESCRIBE = flags.DEFINE_bool("describe", False, "Print the network and its parameters, and stop.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Join the processes of a SLURM, Open MPI, Kubernetes or Cloud TPU job."
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, for several.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes train together.")
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_seconds", 100, "A process of the run silent for so long is lost.", lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "The number of this process, from 0.")


def main(argv: list[str]) -> None:
    """Dispatches to `describe`, `look` or `train`."""
    del argv
    run_command(_run, _CONFIG.value, Path(_WORKDIR.value or f"runs/{given_config().name}"))


def _run(config: Any, workdir: Path) -> int | None:
    if _DESCRIBE.value:
        from kafjax.training.config_checks import check_fields
        from kafjax.training.describe import describe
        from kafjax.training.preflight import with_classes

        check_fields(config)
        print(describe(with_classes(config)))
        return None
    print(f"kafjax {__version__}: {given_config().name} in {show(workdir)}", flush=True)
    from kafjax.checkpoint.checkpointer import check_resumable
    from kafjax.training.loop import train
    from kafjax.xla import set_up_xla

    _join_processes()
    set_up_xla()
    if _CHECK.value:
        return _check(config, workdir)
    if _RESUME.value:
        check_resumable(workdir)
    return train(config, workdir)


def _join_processes() -> None:
    flags_of_process = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if _DISTRIBUTED.value:
        if flags_of_process != (None, None, None):
            raise UserError(
                "--distributed finds the processes; expected no --coordinator, "
                "--num_processes or --process_id"
            )
        _join_cluster()
        return
    if all(value is None for value in flags_of_process):
        return
    if any(value is None for value in flags_of_process):
        raise UserError("several processes need --coordinator, --num_processes and --process_id")
    from kafjax.processes import join

    join(*flags_of_process, heartbeat_seconds=_HEARTBEAT.value)


def _join_cluster() -> None:
    """Joins the processes that JAX finds in this job's environment."""
    from kafjax.processes import join

    try:
        join(heartbeat_seconds=_HEARTBEAT.value)
    except ValueError as error:  # JAX's own message names an argument of its function
        raise UserError(
            "--distributed: this is no SLURM, Open MPI, Kubernetes or Cloud TPU job that JAX "
            "recognises; use --coordinator, --num_processes and --process_id"
        ) from error


def _check(config: Any, workdir: Path) -> int | None:
    """Reports everything that a run needs and, if nothing is wrong, times some steps of it."""
    import jax

    from kafjax.training.preflight import Finding, look
    from kafjax.training.timing import Stopped, see_time
    from kafjax.workdir.workdir import Workdir

    findings = look(config, workdir)
    print(show("\n".join(map(str, findings))), flush=True)
    wrong = [finding.name for finding in findings if finding.wrong]
    if wrong:
        raise UserError(f"the run would not start: {', '.join(wrong)}")
    if jax.process_count() > 1:
        return None  # a timing's workdir is this process's own
    try:
        print(Finding("time", see_time(config, Workdir(workdir))))
    except Stopped as stopped:
        return stopped.number
    return None


if __name__ == "__main__":
    use_huge_pages()
    app.run(main, flags_parser=parse_flags)
