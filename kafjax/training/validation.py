"""Scores of a training state on whole held-out volumes.

Every slice counts once, for any batch size and number of devices and processes: batches are padded
with invalid slices, and a task's counts are integers that add up.
"""

import contextlib
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from kafjax.data.batches import BatchOptions, evaluation_batches
from kafjax.data.dataset import SliceDataset
from kafjax.data.samples import Batch, make_labelled
from kafjax.segmentation_metrics import mean_pooled_dice
from kafjax.tasks.base import Task
from kafjax.training.step import TrainState, make_count, own_part, shard, to_host

if TYPE_CHECKING:
    from kafjax.drawing.segmentations import SegmentedSlice

_SHOWN = 3  # worst and best slices in a picture


class Validation:
    """Counts over all slices of the volumes, centrally cropped or padded to the patch.

    Args:
      task: defines the counts.
      dataset: contains the volumes.
      options: of the batches.
      volumes: names of labelled volumes.

    Raises:
      ValueError: on first use, if a volume has no labels.
    """

    def __init__(
        self, task: Task, dataset: SliceDataset, options: BatchOptions, volumes: Sequence[str]
    ):
        self._task = task
        self._dataset = dataset
        self._options = options
        self._batches = lambda: evaluation_batches(dataset, options, volumes=volumes)
        self._count = make_count(task)
        self._counts: dict[int, np.ndarray] = {}  # of the last `scores`, by record

    def scores(self, state: TrainState) -> dict[str, float]:
        """The task's scores of a replicated state."""
        self._counts = {}
        with contextlib.closing(self._batches()) as batches:
            for batch in batches:
                records, counts, _ = self._count(state, shard(batch))
                found = zip(to_host(records).tolist(), to_host(counts), strict=True)
                self._counts.update({record: of_slice for record, of_slice in found if record >= 0})
        return self._task.scores(np.asarray(list(self._counts.values()), np.int64).sum(axis=0))

    def pictures(self, state: TrainState) -> dict[str, np.ndarray]:
        """The worst and best slices of the last `scores`, predicted again with the same program.

        Slices are ranked by their mean Dice over the classes in the label or prediction; slices
        without labels are skipped. All processes must call it.

        Returns:
          Name -> uint8 [h, w, 3]; empty if no slice has labels, and in all processes except the
          first.
        """
        labelled = [r for r, counts in self._counts.items() if counts[1:, 2].any()]
        ranked = sorted(labelled, key=lambda r: (mean_pooled_dice(self._counts[r]), r))
        shown = {"worst": ranked[:_SHOWN], "best": ranked[::-1][:_SHOWN]}
        rows = self._predict(state, list(dict.fromkeys(itertools.chain(*shown.values()))))
        if not ranked or self._options.process_index > 0:
            return {}
        return {
            f"validation_{name}": self._draw([rows[record] for record in records])
            for name, records in shown.items()
        }

    def _predict(self, state: TrainState, records: list[int]) -> dict[int, "SegmentedSlice"]:
        """Slices with their labels and predictions, by record."""
        share = self._options.batch_size // self._options.process_count
        rows = {}
        for i in range(0, len(records), share):
            part = records[i : i + share]
            samples = [self._read(record) for record in part]
            # A padded batch of the size that is already compiled.
            full = samples + samples[:1] * (share - len(samples))
            batch = {field: np.stack([sample[field] for sample in full]) for field in full[0]}
            *_, classes = self._count(state, shard(batch))
            for record, sample, found in zip(part, samples, own_part(classes), strict=False):
                rows[record] = self._row(record, sample, found)
        return rows

    def _read(self, record: int) -> Batch:
        options = self._options
        labelled = make_labelled(
            self._dataset,
            0,
            record,
            patch_size=options.patch_size,
            patch_keypoints=options.patch_keypoints,
            seed=None,
        )
        return {**labelled, "valid": np.array(True)}

    def _row(self, record: int, sample: Batch, prediction: np.ndarray) -> "SegmentedSlice":
        from kafjax.drawing.segmentations import SegmentedSlice

        title, dice = self._dataset.describe_record(record), mean_pooled_dice(self._counts[record])
        image = sample["image"][..., 0]
        return SegmentedSlice(title, image, sample["label"], [prediction], [dice])

    def _draw(self, rows: Sequence["SegmentedSlice"]) -> np.ndarray:
        from kafjax.drawing.figures import render  # only pictures need matplotlib
        from kafjax.drawing.segmentations import draw_segmentations

        return render(draw_segmentations(rows, ["prediction"], self._dataset.classes))
