"""Times training on this device: a few volumes are prepared apart, and the loop takes some steps.

So an estimate covers a whole step: reading, augmentation, and the compiled program, which the
later run finds in the cache.
"""

import contextlib
import dataclasses
import io
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.builder import Options
from data_prep.check import Survey
from data_prep.prepare import prepare_dataset
from data_prep.volumes import Source
from kafjax.data.dataset import SliceDataset, open_dataset
from kafjax.training.loop import train
from kafjax.training.preflight import complete_config, estimate_memory
from kafjax.workdir.metrics import read_metrics

NAME = "own"
_STEPS = 5  # the first one compiles
_ENOUGH_SLICES = 32


class Timing(NamedTuple):
    """Seconds of compilation and of a step, and bytes on each device by estimate."""

    compilation: float
    step: float
    memory: int


class Stopped(BaseException):
    """A signal stopped a run, which saved its state."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


@dataclasses.dataclass(frozen=True)
class Probe:
    """Prepared volumes.

    Attributes:
      data_dir: where they are.
      dataset: the volumes.
      seconds_per_slice: of their preparation, by one process.
    """

    data_dir: Path
    dataset: SliceDataset
    seconds_per_slice: float

    def memory(self, config: Any) -> int:
        """Bytes on each device that a step takes, by estimate."""
        return estimate_memory(self._completed(config), self.dataset)

    def time(self, config: Any) -> Timing:
        """Trains some steps. Raises `Stopped` where a signal came."""
        config = self._completed(config)
        config.num_steps = _STEPS
        config.every.update({"log": 1, "picture": 0, "checkpoint": 10**6})
        with tempfile.TemporaryDirectory(dir=self.data_dir) as workdir, quiet():
            begin = time.perf_counter()
            if received := train(config, workdir):
                raise Stopped(received)
            whole = time.perf_counter() - begin
            rows = read_metrics(workdir)
        step = statistics.median(row["time"]["seconds_per_step"] for row in rows[2:])
        return Timing(max(whole - len(rows) * step, 0.0), step, self.memory(config))

    def _completed(self, config: Any) -> Any:
        config = config.copy_and_resolve_references()
        config.data.dir = str(self.data_dir)
        return complete_config(config, self.dataset)


@contextlib.contextmanager
def prepare_probe(survey: Survey, options: Options) -> Iterator[Probe]:
    """Prepares some of the surveyed volumes in a folder that is removed at the end.

    Of those with labels and of those without, as many as fill a batch.
    """
    ids = _choose(survey)
    with tempfile.TemporaryDirectory(prefix="kafjax_plan_") as folder:
        begin = time.perf_counter()
        with quiet():
            done = prepare_dataset(
                _Some(survey.reader, ids),  # type: ignore[arg-type]
                survey.raw_dir,
                Path(folder),
                name=NAME,
                options=options,
                num_workers=0,
            )
        seconds = (time.perf_counter() - begin) / done.num_slices
        yield Probe(Path(folder), open_dataset(folder, NAME), seconds)


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    """Keeps what is printed from the terminal."""
    with (
        io.StringIO() as kept,
        contextlib.redirect_stdout(kept),
        contextlib.redirect_stderr(kept),
    ):
        yield kept


def _choose(survey: Survey) -> set[str]:
    chosen: set[str] = set()
    for labelled in (True, False):
        slices = 0
        for id, volume in survey.volumes.items():
            if volume.facts.labelled == labelled and slices < _ENOUGH_SLICES:
                chosen.add(id)
                slices += volume.facts.num_slices
    return chosen


class _Some:
    """A reader that finds some volumes only."""

    def __init__(self, reader: Any, ids: set[str]):
        self._reader, self._ids = reader, ids

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def find(self, raw_dir: Path) -> tuple[list[Source], list[Any]]:
        """As the reader, without its findings, which the survey has reported."""
        sources, _ = self._reader.find(raw_dir)
        # There may be only a test set.
        return [dataclasses.replace(s, test=False) for s in sources if s.id in self._ids], []
