"""A run's checkpoints: saved asynchronously, verified leaf by leaf on reading.

    WORKDIR/checkpoints/<step>/       `state`, the pytree of arrays, and `meta`, which describes it
    WORKDIR/damaged/<step>/           damaged steps that `restore_latest` moved aside

Orbax writes checkpoints and applies the retention policy. This module adds verification: Orbax
restores flipped bits silently, does not compare shapes or dtypes with NumPy targets, and raises on
a truncated newest step instead of falling back to the previous one. So `meta` holds shape, dtype
and hash of every leaf, and its own checksum. Reading a checkpoint involves no other process; only
`Checkpointer` synchronises processes.

Leaves are process 0's host arrays. Leaf names are paths, such as `params/head/kernel`.
"""

import contextlib
import logging
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from kafjax.checkpoint.files import (
    STEPS,
    DamagedCheckpointError,
    DurablePath,
    PyTree,
    describe_state,
    mend_scores,
    newest_good,
    read_meta,
    read_state,
    read_variables,
    scores,
    steps_in,
)
from kafjax.errors import UserError, lost_process
from kafjax.paths import plain
from kafjax.processes import gather, together

__all__ = [
    "Checkpointer",
    "DamagedCheckpointError",
    "SaveError",
    "check_resumable",
    "load_step",
    "load_variables",
    "saved_metrics",
    "saved_steps",
]

log = logging.getLogger(__name__)


class SaveError(OSError):
    """A checkpoint could not be written; the message names the workdir."""


class Checkpointer:
    """Saves and restores the state of the run in `workdir`; a context manager.

    Keeps the `keep_newest` newest steps and the `keep_best` best by `metrics[best_metric]`; higher
    is better if `best_mode` is 'max', lower if 'min'. Raises `ValueError` if `keep_newest` is 0.
    With several processes, all must make the same calls.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        keep_newest: int,
        keep_best: int = 1,
        best_metric: str | None,
        best_mode: Literal["max", "min"] = "max",
    ):
        self._workdir = Path(workdir).absolute()
        if keep_newest < 1:
            raise UserError(f"keep_newest is {keep_newest}; expected 1 or more")
        self._workdir.mkdir(parents=True, exist_ok=True)
        if best_metric is not None:
            mend_scores(self._workdir / STEPS, best_metric)
        self._best_metric = best_metric
        self._best_sign = {"max": 1, "min": -1}[best_mode]
        keep: list[policies.PreservationPolicy] = [policies.LatestN(keep_newest)]
        if best_metric is not None:
            keep.append(policies.BestN(get_metric_fn=self._score, n=keep_best))
        self._manager = ocp.CheckpointManager(
            plain(self._workdir) / STEPS,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keep),
                # Without this Orbax stores no metrics and forgets the best on resume.
                best_fn=None if best_metric is None else self._score,
                cleanup_tmp_directories=True,
                temporary_path_class=DurablePath,
            ),
        )
        self._read_back = False

    def save(
        self, step: int, state: PyTree, *, metrics: Mapping[str, float], data: Mapping[str, Any]
    ) -> bool:
        """Starts saving a pytree of host arrays, copied first, with metrics and JSON-able `data`.

        Waits for the previous save first, so at most one is in progress. Returns False, without
        saving, if this step or a later one exists. A write error raises `SaveError` in the next
        `check`, `save`, `wait` or `close`.

        The first save is waited for, read back and compared: a disk or path from which checkpoints
        cannot be read raises `SaveError` here, not after the run.
        """
        arrays = jax.tree.map(np.asarray, state)
        numbers = {name: float(value) for name, value in metrics.items()}
        # Orbax stores the primary process's arrays.
        meta = describe_state(step, arrays, numbers, data) if jax.process_index() == 0 else {}
        args = ocp.args.Composite(state=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta))
        best = None if self._best_metric is None else scores(self._best_metric, numbers)
        with self._telling():
            saved = self._manager.save(step, args=args, metrics=best)
            if saved and not self._read_back:
                self._manager.wait_until_finished()
                with together():
                    read_state(self._workdir / STEPS / str(step), arrays)
                self._read_back = True
            return saved

    def restore_latest(self, template: PyTree) -> tuple[PyTree, dict[str, Any]] | None:
        """The newest good checkpoint's state, shaped as `template`, and its data; None without any.

        `template` has the state's structure with arrays or `jax.ShapeDtypeStruct` leaves; the
        state's leaves are NumPy arrays. Newer damaged checkpoints are named in a warning and moved
        aside. Raises `UserError` listing all differences in tree, shape and dtype, or if every
        checkpoint is damaged; on all processes, if only some of them can read a checkpoint.
        """
        self.wait()

        def read(step: int) -> tuple[PyTree, dict[str, Any]]:
            return read_state(self._workdir / STEPS / str(step), template)

        with together():
            found = newest_good(self._workdir, read)
        steps = gather("" if found is None else str(found[0]))
        if found is None or not all(steps):
            if any(steps):  # never start from scratch if another process finds a checkpoint
                told = ", ".join(f"process {i} {s or 'none'}" for i, s in enumerate(steps))
                raise UserError(f"{self._workdir}: not all processes find a checkpoint: {told}")
            return None
        step = min(map(int, steps))
        with together():
            state, meta = found[1] if step == found[0] else read(step)
        self._move_aside(step)
        return state, meta["data"]

    def all_steps(self) -> list[int]:
        """The saved steps, and those being saved, in order."""
        return sorted(self._manager.all_steps())

    def check(self) -> None:
        """Raises any error of the save in progress, without waiting for it."""
        with self._telling():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Waits until the save in progress is on disk; raises its errors."""
        with self._telling():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then stops Orbax's threads."""
        with self._telling():
            self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Turns disk errors of any library into `SaveError`."""
        try:
            yield
        except Exception as error:
            if lost_process(error):
                raise
            reason = " ".join(str(error).split())
            reason = reason.replace(str(plain(self._workdir)), str(self._workdir))[:400]
            raise SaveError(
                f"{self._workdir}: a checkpoint could not be saved; earlier ones are kept; rerun "
                "the command to resume, once there is space and permission "
                f"({type(error).__name__}: {reason})"
            ) from error

    def _score(self, metrics: Mapping[str, float]) -> float:
        value = metrics.get(self._best_metric or "", math.nan)
        return -math.inf if math.isnan(value) else self._best_sign * value

    def _move_aside(self, good: int) -> None:
        """Moves steps newer than the good one away: Orbax would save no earlier step."""
        newer = [step for step in self.all_steps() if step > good]
        if not newer:
            return
        if jax.process_index() == 0:
            damaged = self._workdir / "damaged"
            damaged.mkdir(exist_ok=True)
            for step in newer:
                aside = Path(tempfile.mkdtemp(prefix=f"{step}-", dir=damaged))
                (self._workdir / STEPS / str(step)).rename(aside / str(step))
        ocp.multihost.sync_global_processes("kafjax_move_aside")
        self._manager.reload()


def load_variables(
    workdir: str | os.PathLike[str], *, step: int | None = None
) -> dict[str, dict[str, Any]]:
    """The `params` and `batch_stats` of a run's newest good checkpoint, or of `step`, verified.

    Returns nested dicts of NumPy arrays. Raises `ValueError` if the folder has no such checkpoint
    or only damaged ones.
    """
    return load_step(workdir, step=step)[1]


def load_step(
    workdir: str | os.PathLike[str], *, step: int | None = None
) -> tuple[int, dict[str, dict[str, Any]]]:
    """The step that `load_variables` finds, and its variables."""
    directory = Path(workdir).absolute() / STEPS
    found = newest_good(Path(workdir), lambda s: read_variables(directory / str(s)), step)
    if found is None:
        raise UserError(
            f"{workdir}: holds no checkpoint{'' if step is None else f' of step {step}'}; expected "
            f"the workdir of a run, with checkpoints/{'<step>' if step is None else step}"
        )
    return found


def saved_steps(workdir: str | os.PathLike[str]) -> list[int]:
    """The steps of a workdir's checkpoints, good or damaged, in order."""
    return steps_in(Path(workdir).absolute() / STEPS)


def check_resumable(workdir: str | os.PathLike[str]) -> None:
    """Raises `ValueError` if there is nothing to resume, to avoid an accidental restart."""
    if not saved_steps(workdir):
        raise UserError(
            f"{workdir}: holds no checkpoint to resume from; expected the workdir of a run that "
            "saved one, or a start without --resume"
        )


def saved_metrics(workdir: str | os.PathLike[str]) -> dict[int, dict[str, float]]:
    """The metrics saved with each checkpoint whose `meta` is good, by step."""
    directory = Path(workdir).absolute() / STEPS
    metrics = {}
    for step in steps_in(directory):
        try:
            metrics[step] = read_meta(directory / str(step))["metrics"]
        except DamagedCheckpointError as error:
            log.warning("%s", error)
    return metrics
