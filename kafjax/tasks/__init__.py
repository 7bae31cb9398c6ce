"""The tasks of runs: pretraining, local contrast, segmentation."""

from kafjax._lazy import public

__all__, __getattr__ = public(
    __name__,
    {
        ".base": ("Task",),
        ".registry": ("TASKS",),
        ".pretraining": ("Pretraining",),
        ".local_contrast": ("LocalContrast",),
        ".segmentation": ("Segmentation",),
    },
)
