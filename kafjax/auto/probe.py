"""Prepares a few of the scans on each grid that is considered, to time preparation and training."""

import contextlib
import dataclasses
import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.builder import Options
from data_prep.check import Survey, fingerprint, survey_dataset
from data_prep.folder import OwnReader
from data_prep.prepare import prepare_dataset
from data_prep.volumes import Source
from kafjax.data.dataset import open_dataset
from kafjax.training.preflight import complete_config, estimate_memory
from kafjax.training.timing import Timing, time_steps

NAME = "own"
_ENOUGH_SLICES = 32


class Grid(NamedTuple):
    """Scans on one grid; some of them are prepared.

    Attributes:
      data_dir: folder of those that are prepared.
      pixel_spacing: mm of resampled slices; None: as they are.
      radius: of correspondences, pixels.
      max_keypoints: K, enough for nearly all slices.
      seconds_per_slice: of preparation, by one process.
    """

    data_dir: Path
    pixel_spacing: float | None
    radius: int
    max_keypoints: int
    seconds_per_slice: float


class Probe:
    """Some of the surveyed scans, prepared in a folder.

    They are as many of those with labels, and of those without, as fill a batch.
    """

    def __init__(self, survey: Survey, folder: Path):
        self._survey, self._folder = survey, folder
        self._ids = _choose(survey)
        self._grids: dict[float | None, Grid] = {}

    def grid(self, pixel_spacing: float | None, radius: int) -> Grid:
        """The grid of a pixel size, prepared when first asked for."""
        if pixel_spacing not in self._grids:
            self._grids[pixel_spacing] = self._prepare(pixel_spacing, radius)
        return self._grids[pixel_spacing]

    def _prepare(self, pixel_spacing: float | None, radius: int) -> Grid:
        survey, raw_dir = self._survey, self._survey.raw_dir
        assert isinstance(survey.reader, OwnReader)
        reader = dataclasses.replace(survey.reader, pixel_spacing=pixel_spacing, radius=radius)
        some: Any = _Some(reader, self._ids)
        folder = self._folder / f"grid{len(self._grids)}"
        with quiet():
            if pixel_spacing is not None:
                survey, _ = survey_dataset(some, raw_dir, num_workers=0)
            places = fingerprint(survey)["suggestion"]["max_keypoints"]
            options = Options(max_keypoints=places)
            begin = time.perf_counter()
            done = prepare_dataset(some, raw_dir, folder, name=NAME, options=options, num_workers=0)
        seconds = (time.perf_counter() - begin) / done.num_slices
        return Grid(folder, pixel_spacing, radius, places, seconds)

    def memory(self, config: Any) -> int:
        """Bytes on each device that a step takes, by estimate; the config names the data."""
        dataset = open_dataset(config.data.dir, NAME)
        return estimate_memory(complete_config(config, dataset), dataset)

    def time(self, config: Any) -> Timing:
        """Trains some steps. Raises `Stopped` if a signal came."""
        completed = complete_config(config, open_dataset(config.data.dir, NAME))
        with quiet():
            return time_steps(completed)


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

    def __init__(self, reader: OwnReader, ids: set[str]):
        self._reader, self._ids = reader, ids

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def find(self, raw_dir: Path) -> tuple[list[Source], list[Any]]:
        """As the reader, without its findings, which the survey has reported."""
        sources, _ = self._reader.find(raw_dir)
        # There may be only a test set.
        return [dataclasses.replace(s, test=False) for s in sources if s.id in self._ids], []
