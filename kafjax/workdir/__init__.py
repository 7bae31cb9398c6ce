"""The folder of a run: its config, preparation, environment, metrics and scores."""

from kafjax._lazy import public

__all__, __getattr__ = public(
    __name__,
    {
        ".workdir": ("Workdir",),
        ".split": (
            "RunSplit",
            "open_split",
            "read_split",
        ),
        ".scores": ("read_scores",),
        ".lock": ("LockedError",),
        ".preparation": ("read_preparation",),
        ".environment": ("describe_environment",),
        ".metrics": (
            "MetricWriter",
            "read_metrics",
        ),
    },
)
