"""Studies of many runs: cross-validation and tables."""

from kafjax._lazy import public

__all__, __getattr__ = public(
    __name__,
    {
        ".cross_validation": ("cross_validate",),
        ".experiment": ("Experiment", "make_experiment"),
        ".plan": (
            "Row",
            "Table",
        ),
    },
)
