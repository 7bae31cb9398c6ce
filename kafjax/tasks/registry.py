"""The tasks by their name in `config.task`."""

from typing import Any

from kafjax.registry import Registry
from kafjax.tasks.base import Task
from kafjax.tasks.local_contrast import LocalContrast
from kafjax.tasks.pretraining import Pretraining
from kafjax.tasks.regions import RegionSegmentation
from kafjax.tasks.segmentation import Segmentation
from kafjax.tasks.semi_supervised import SemiSupervised

TASKS: Registry[type[Task]] = Registry(
    {"pretrain": Pretraining, "local_contrast": LocalContrast, "segment": Segmentation}
)


def make_task(config: Any, *, axis_name: str | None = None) -> Task:
    """The task of a run, `config.task`.

    Segmentation is semi-supervised if `config.semi` is there, and of regions if the dataset has
    some. Args and errors are those of `Task`.
    """
    kind = SemiSupervised if "semi" in config else TASKS[config.task]
    if kind is Segmentation and config.data.get("regions"):
        kind = RegionSegmentation
    return kind(config, axis_name=axis_name)
