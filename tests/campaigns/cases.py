"""Tiny runs that are stopped, and what they have reached: read of their files, as after a crash."""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.campaigns import tiny
from tests.campaigns.campaign import Tally
from tests.campaigns.forks import Fork
from tests.runs import PLAIN

EVERY = 3  # steps between checkpoints
HEARTBEAT = 10  # seconds, of jax.distributed


@dataclasses.dataclass(frozen=True)
class Case:
    """A tiny run: its task, workdir and what differs from the tiny config."""

    task: str
    dataset: Path
    workdir: Path
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def beside(self, name: str) -> "Case":
        """The same run in another workdir."""
        return dataclasses.replace(self, workdir=self.workdir.with_name(name))

    @property
    def config(self) -> Any:
        """The run's config: two epochs or more, and a validation in each if there are labels."""
        make = {"pretrain": tiny.pretraining_config, "segment": tiny.segmentation_config}[self.task]
        fields: dict[str, Any] = {
            "every.checkpoint": EVERY,
            "every.log": 1,
            "every.picture": 0,
            "batch_size": 8,
        }
        if self.task == "segment":
            fields |= {"every.validation_epochs": 1, "model.num_classes": 8}
        else:
            fields |= PLAIN
        return make(self.dataset, **{**fields, "num_epochs": 5, **self.overrides})

    def train(self, address: str | None = None, index: int = 0, count: int = 1) -> int:
        """Trains, in this process, as `kafjax.main` does; the exit status."""
        import jax

        from kafjax.training.loop import train

        jax.config.update("jax_enable_x64", self.config.model.dtype == "float64")
        if address is not None:
            jax.distributed.initialize(address, count, index, heartbeat_timeout_seconds=HEARTBEAT)
        received = train(self.config, self.workdir)
        return 128 + received if received else 0

    def fork(self, devices: int = 1, **options: Any) -> Fork:
        """The run in a process of its own."""
        log = self.workdir.with_suffix(".log")
        return Fork(lambda: self.train(**options), log, devices)

    def step(self) -> int:
        """The last step that metrics.jsonl has."""
        return max((row["step"] for row in self.rows()), default=0)

    def rows(self) -> list[dict[str, Any]]:
        """The metrics without times."""
        from kafjax.workdir.metrics import read_metrics

        rows = read_metrics(self.workdir)
        return [{name: x for name, x in row.items() if name != "time"} for row in rows]

    def saved(self) -> list[int]:
        """The steps that are listed as checkpoints."""
        folder = self.workdir / "checkpoints"
        steps = folder.iterdir() if folder.is_dir() else ()
        return sorted(int(path.name) for path in steps if path.name.isdigit())

    def saving(self) -> bool:
        """Whether a checkpoint was being written when the run died."""
        folder = self.workdir / "checkpoints"
        return folder.is_dir() and any(not path.name.isdigit() for path in folder.iterdir())

    def description(self, step: int) -> dict[str, Any]:
        """What a checkpoint says of itself, with a hash of each array."""
        path = self.workdir / "checkpoints" / str(step) / "meta" / "metadata"
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def output(self) -> str:
        """The last lines that its processes printed."""
        return self.workdir.with_suffix(".log").read_text()[-600:]


def differences(a: Case, b: Case) -> str:
    """How the last checkpoints and the metrics of two runs differ, or nothing."""
    steps = [case.saved()[-1:] for case in (a, b)]
    if steps[0] != steps[1] or not steps[0]:
        return f"last steps {steps}"
    one, two = (case.description(steps[0][0]) for case in (a, b))
    arrays = [name for name in one["hashes"] if one["hashes"][name] != two["hashes"].get(name)]
    if arrays or one["hashes"].keys() != two["hashes"].keys():
        return f"{len(arrays)} arrays differ, such as {arrays[:3]}"
    if one["data"] != two["data"] or one["metrics"] != two["metrics"]:
        return "other metrics are saved"
    rows = [case.rows() for case in (a, b)]
    return "" if rows[0] == rows[1] else "other metrics are logged"


def unreadable(workdirs: Sequence[Path], log: Path) -> list[str]:
    """What cannot be read of the checkpoints that each workdir lists, "" where nothing is wrong.

    One process reads them all: its start costs more than a hundred checkpoints.
    """
    answer = log.with_suffix(".json")

    def read_all() -> int:
        answer.write_text(json.dumps([_unreadable_steps(workdir) for workdir in workdirs]))
        return 0

    with Fork(read_all, log) as reader:
        status = reader.wait()
    if status != 0:
        return [f"the reader ended with {status}: {log.read_text()[-600:]}"] * len(workdirs)
    problems: list[str] = json.loads(answer.read_text())
    return problems


def _unreadable_steps(workdir: Path) -> str:
    from kafjax.checkpoint.checkpointer import load_variables, saved_steps

    problems = []
    for step in saved_steps(workdir):
        try:
            load_variables(workdir, step=step)
        except Exception as error:  # whatever it is, a listed checkpoint is not good
            problems.append(f"step {step}: {type(error).__name__}: {error}")
    return "; ".join(problems)


def make_dataset(folder: Path, number: int = 6) -> Path:
    """Phantoms, prepared in a process of its own: OpenCV's threads here would block later forks."""

    def make() -> int:
        tiny.make_dataset(tiny.make_phantoms(folder / "raw", number), folder / "data")
        return 0

    with Fork(make, folder / "dataset.log") as maker:
        if maker.wait() != 0:
            raise RuntimeError(f"no dataset: {(folder / 'dataset.log').read_text()[-600:]}")
    (directory,) = (folder / "data" / "phantom").glob("[0-9]*")
    return directory


def run_undisturbed(case: Case, tally: Tally, devices: int = 1) -> float:
    """Runs to the end, which is unclear if it fails; its seconds."""
    begin = time.monotonic()
    with case.fork(devices) as run:
        if run.wait() != 0:
            tally.add("unclear", f"undisturbed, it ended with {run.status}: {case.output()}")
    return time.monotonic() - begin


def stop_at(
    case: Case, step: int, devices: int, number: int, **options: Any
) -> tuple[int | None, float]:
    """Sends a signal when the step is logged; exit status and seconds until the end."""
    with case.fork(devices, **options) as run:
        run.wait(until=lambda: case.step() >= step)
        begin = time.monotonic()
        run.send(number)
        return run.wait(), time.monotonic() - begin
