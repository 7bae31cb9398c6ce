"""Scores of a state in training on whole volumes that it does not learn from.

Every slice counts once, whatever the batch size and the number of devices and processes: batches
are filled up with slices that are not valid, and a task's counts are integers that add up.
"""

import contextlib
from collections.abc import Sequence

import numpy as np

from kafjax.input_pipeline import BatchOptions, SliceDataset, evaluation_batches
from kafjax.segmentation_metrics import pooled_dice
from kafjax.step import Counting, TrainState, make_count, shard, unreplicate


def slice_dice(counts: np.ndarray) -> float:
    """Mean Dice over the foreground classes of counts int [d, 3]; NaN where there is none."""
    dice = pooled_dice(np.asarray(counts))
    found = ~np.isnan(dice)
    return float(dice[found].mean()) if found.any() else float("nan")


class Validation:
    """Counts over all slices of the volumes, centrally cropped or padded to the patch.

    Args:
      task: what to count.
      dataset: where the volumes are.
      options: how batches are made.
      volumes: names of labelled volumes.

    Raises:
      ValueError: on first use, where a volume has no labels.
    """

    def __init__(
        self, task: Counting, dataset: SliceDataset, options: BatchOptions, volumes: Sequence[str]
    ):
        self._task = task
        self._batches = lambda: evaluation_batches(dataset, options, volumes=volumes)
        self._count = make_count(task)

    def scores(self, state: TrainState) -> dict[str, float]:
        """The task's scores of a state that is replicated over the devices."""
        with contextlib.closing(self._batches()) as batches:
            counts = [unreplicate(self._count(state, shard(batch))) for batch in batches]
        return self._task.scores(np.asarray(counts, np.int64).sum(axis=0))
