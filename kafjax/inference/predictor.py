"""Class probabilities of whole slices of any size, from a trained run.

A slice smaller than the run's patch is centred in zeros; a larger one is cut into tiles that
overlap by half, each with its own keypoints, whose probabilities are blended
(`kafjax.data.patches`). Keypoints are (row, col) in the slice; their number of slots k must be
equal for all slices.
"""

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from kafjax.checkpoint.checkpointer import load_step
from kafjax.data.dataset import SliceDataset, context_of
from kafjax.data.patches import (
    PatchSize,
    blend_tiles,
    choose_keypoints,
    cut_view,
    keypoints_inside,
    tile_origins,
)
from kafjax.errors import UserError
from kafjax.tasks.registry import make_task
from kafjax.training.step import make_predict
from kafjax.workdir.workdir import Workdir

# (image [rows, cols, c] normalised, keypoints int [k, 2], mask bool [k]) of one slice.
View = tuple[np.ndarray, np.ndarray, np.ndarray]

_PLACES_STEP = 64


class Predictor:
    """A network with its variables on this process's devices.

    Args:
      config: of a segmentation run.
      variables: {'params', 'batch_stats'} of its network.
      batch_size: tiles at a time; by default the run's, rounded to a multiple of the devices.
      step: of the checkpoint that holds the variables, if any.

    Raises:
      ValueError: `batch_size` is not a positive multiple of the devices.
    """

    def __init__(
        self,
        config: Any,
        variables: Any,
        *,
        batch_size: int | None = None,
        step: int | None = None,
    ):
        devices = jax.local_device_count()
        if batch_size is None:
            batch_size = math.ceil(config.batch_size / devices) * devices
        if batch_size < 1 or batch_size % devices:
            raise UserError(
                f"batch_size is {batch_size}, expected a positive multiple of the {devices} devices"
            )
        self.config = config
        self.context = context_of(config)
        self.step = step
        self._batch_size = batch_size
        self._patch_size: PatchSize = tuple(config.data.patch_size)
        self.variables = variables
        self._predict = make_predict(make_task(config), variables)

    def views(self, dataset: SliceDataset, records: Sequence[int]) -> list[View]:
        """Slices of a dataset as the network sees them."""
        dataset = dataset.with_context(self.context)
        return [(s.image, s.keypoints, s.mask) for s in map(dataset.read, records)]

    def probabilities(self, views: Sequence[View]) -> Iterator[np.ndarray]:
        """Float32 [rows, cols, d] of each slice, in order; sums are 1 unless d are regions."""
        sizes = [image.shape[:2] for image, _, _ in views]
        corners = [tile_origins(size, self._patch_size) for size in sizes]
        tiles = [
            (view, origin)
            for view, origins in zip(views, corners, strict=True)
            for origin in origins
        ]
        whole = len(tiles) == len(views)
        places = None if whole else self._count_places(tiles)
        results = self._run(self._cut(*tile, places) for tile in tiles)
        for size, origins in zip(sizes, corners, strict=True):
            yield blend_tiles(np.stack([next(results) for _ in origins]), origins, size)

    def _count_places(self, tiles: Sequence[tuple[View, np.ndarray]]) -> int:
        """Slots for the keypoints of every tile, a multiple of 64 to limit compilations."""
        most = max(self._inside(*tile).sum() for tile in tiles)
        _, keypoints, _ = tiles[0][0]
        return min(len(keypoints), _PLACES_STEP * max(1, math.ceil(most / _PLACES_STEP)))

    def _inside(self, view: View, origin: np.ndarray) -> np.ndarray:
        return keypoints_inside(view[1], view[2], origin, self._patch_size)

    def _cut(self, view: View, origin: np.ndarray, places: int | None) -> dict[str, np.ndarray]:
        """A tile; with `places`, only keypoints inside it get a slot."""
        chosen = choose_keypoints(self._inside(view, origin), places, None)
        return cut_view(*view, origin, self._patch_size, chosen=chosen)

    def _run(self, tiles: Iterator[dict[str, np.ndarray]]) -> Iterator[np.ndarray]:
        for batch, count in full_batches(tiles, self._batch_size):
            yield from self._predict(batch)[:count]


def full_batches(
    samples: Iterator[dict[str, np.ndarray]], size: int
) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """Batches of `size` samples, and how many of them count.

    The last batch is padded with its first sample, whose further results are to be discarded.
    """
    while batch := list(itertools.islice(samples, size)):
        full = batch + batch[:1] * (size - len(batch))
        yield (
            {field: np.stack([sample[field] for sample in full]) for field in batch[0]},
            len(batch),
        )


def views_of_each(
    predictors: Sequence[Predictor], dataset: SliceDataset, records: Sequence[int]
) -> list[list[View]]:
    """The slices as each network sees them; what networks of one context see is read once."""
    one_of = {predictor.context: predictor for predictor in predictors}
    views = {context: one.views(dataset, records) for context, one in one_of.items()}
    return [views[predictor.context] for predictor in predictors]


def load_predictor(
    workdir: str | os.PathLike[str],
    *,
    step: int | str | None = None,
    batch_size: int | None = None,
) -> Predictor:
    """Loads the network of a segmentation run, or of an import, at `step`.

    Args:
      workdir: of the run.
      step: a step, 'best' by validation or 'last'; by default the config's choice. Without
        validation, the newest good one.
      batch_size: see `Predictor`.

    Raises:
      ValueError: the folder holds no segmentation run, or the checkpoint is missing or damaged.
    """
    config = ml_collections.ConfigDict(Workdir(workdir).read_config(task="segment"))
    selected, _ = Workdir(workdir).select_step(step)
    found, variables = load_step(workdir, step=selected)
    return Predictor(config, variables, batch_size=batch_size, step=found)
