"""The tasks by their name in `config.task`."""

from kafjax.registry import Registry
from kafjax.tasks.base import Task
from kafjax.tasks.local_contrast import LocalContrast
from kafjax.tasks.pretraining import Pretraining
from kafjax.tasks.segmentation import Segmentation

TASKS: Registry[type[Task]] = Registry(
    {"pretrain": Pretraining, "local_contrast": LocalContrast, "segment": Segmentation}
)
