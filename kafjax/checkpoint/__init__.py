"""Checkpoints that detect damage."""

from kafjax._lazy import public

__all__, __getattr__ = public(
    __name__,
    {
        ".checkpointer": (
            "Checkpointer",
            "SaveError",
            "load_variables",
            "saved_metrics",
            "saved_steps",
        ),
        ".files": ("DamagedCheckpointError",),
    },
)
