"""The tasks by their name in `config.task`: what the loop and the look before it need of each."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from kafjax.data.input_pipeline import (
    make_labelled,
    make_pair,
    pretraining_batches,
    segmentation_batches,
)
from kafjax.registry import Registry
from kafjax.tasks.local_contrast import LocalContrast
from kafjax.tasks.pretraining import Pretraining
from kafjax.tasks.segmentation import Segmentation


class Kind(NamedTuple):
    """A task, its data, and the metric whose best checkpoint is kept.

    Attributes:
      task: makes it of a config.
      batches: an iterator over batches of a dataset.
      sample: one sample of a batch.
      frozen: modules of the network that are not trained.
    """

    task: Callable[..., Any]
    batches: Callable[..., Any]
    sample: Callable[..., Any]
    best_metric: str = "loss"
    best_mode: Literal["max", "min"] = "min"
    frozen: tuple[str, ...] = ()


TASKS = Registry(
    {
        "pretrain": Kind(Pretraining, pretraining_batches, make_pair),
        "local_contrast": Kind(LocalContrast, pretraining_batches, make_pair, frozen=("encoder",)),
        "segment": Kind(
            Segmentation, segmentation_batches, make_labelled, "validation_dice", "max"
        ),
    }
)
