"""Output of a run's numbers and pictures: metrics.jsonl, TensorBoard and the terminal.

`metrics.jsonl` in the workdir holds one JSON object per line: `step`, the metrics, and under `time`
the values that differ from run to run. A resumed run first drops the lines after its checkpoint, so
the file equals that of an uninterrupted run.
"""

import json
import os
from collections.abc import Callable, Mapping
from typing import Any, Self

import numpy as np
import tensorboardX
import tqdm

from kafjax.errors import UserError
from kafjax.files import read_text, write_text
from kafjax.workdir.workdir import Workdir

OnStep = Callable[[int, int], None]


class MetricMeans:
    """Means of step metrics since the last log, kept with the checkpoint to resume exactly."""

    def __init__(self, saved: Mapping[str, Any] | None = None):
        saved = saved or {"count": 0, "sums": {}}
        self._count = int(saved["count"])
        self._sums = dict(saved["sums"])

    def add(self, metrics: Mapping[str, float]) -> None:
        """Adds one step's metrics."""
        self._count += 1
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value)

    def take(self) -> dict[str, float]:
        """The means since the last call."""
        means = {name: total / self._count for name, total in self._sums.items()}
        self._count, self._sums = 0, {}
        return means

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint; JSON keeps every digit."""
        return {"count": self._count, "sums": dict(self._sums)}


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a run's metrics file, without an incomplete last line of a killed run.

    Raises:
      ValueError: a line is damaged; the message names it.
    """
    path = Workdir(workdir).metrics_file
    if not path.exists():
        return []
    rows, text = [], read_text(path)
    *ended, last = text.split("\n")
    for number, line in enumerate([*ended, last] if last else ended, start=1):
        try:
            rows.append(_row(line))
        except ValueError as error:
            if number > len(ended):
                break
            raise UserError(f"{path}, line {number}: not metrics ({error})") from None
    return rows


def _row(line: str) -> dict[str, Any]:
    row = json.loads(line)
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise UserError("no step")
    return row


class MetricWriter:
    """Writes metrics and pictures; nothing with `enabled=False` (all processes except the first).

    Args:
      workdir: the run's directory.
      start_step: the step that the run resumes from; later lines of an earlier start are dropped.
      num_steps: the last step, for the progress bar.
      enabled: whether this process writes at all.
      on_step: called after each step with its number and the last one's.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        start_step: int,
        num_steps: int,
        enabled: bool = True,
        on_step: OnStep | None = None,
    ):
        self._enabled = enabled
        self._on_step = on_step
        if not enabled:
            return
        path = Workdir(workdir).metrics_file
        kept = [row for row in read_metrics(workdir) if row["step"] <= start_step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a")
        board = Workdir(workdir).tensorboard
        self._board = tensorboardX.SummaryWriter(str(board), purge_step=start_step + 1)
        # None: no bar if the output is not a terminal; each log step then prints a line.
        self._step = start_step
        self._bar = tqdm.tqdm(total=num_steps, initial=start_step, unit="step", disable=None)

    def advance(self) -> None:
        """Counts one step done."""
        if self._enabled:
            self._bar.update()
            self._step += 1
            if self._on_step is not None:
                self._on_step(self._step, self._bar.total)

    def write(self, step: int, metrics: Mapping[str, float], time: Mapping[str, float]) -> None:
        """Writes one line and its scalars."""
        if not self._enabled:
            return
        self._file.write(json.dumps({"step": step, **metrics, "time": dict(time)}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())  # before the next checkpoint
        for name, value in {**metrics, **{f"time/{n}": v for n, v in time.items()}}.items():
            self._board.add_scalar(name, value, step)
        text = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        if not self._bar.disable:
            self._bar.set_postfix_str(text)
            return
        if (pace := time.get("seconds_per_step")) is not None:
            left = tqdm.tqdm.format_interval((self._bar.total - step) * pace)
            text += f", {pace:.3g} s/step, {left} left"
        print(f"step {step}/{self._bar.total}: {text}", flush=True)

    def note(self, text: str) -> None:
        """Prints a line of text, above the progress bar if there is one."""
        if self._enabled:
            self._bar.write(text)
            print(end="", flush=True)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes a picture, uint8 [h, w, 3], to TensorBoard."""
        if self._enabled:
            self._board.add_image(name, image, step, dataformats="HWC")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Flushes and closes the files."""
        if self._enabled:
            self._bar.close()
            self._file.close()
            self._board.close()
