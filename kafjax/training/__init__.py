"""Training: the loop, its steps over devices, validation, and the checks before it."""

from kafjax._lazy import public

__all__, __getattr__ = public(
    __name__,
    {
        ".loop": ("train",),
        ".step": (
            "TrainState",
            "make_update",
            "make_predict",
            "make_optimizer",
            "learning_rates",
        ),
        ".config_checks": ("check_fields",),
        ".transfer": (
            "TransferReport",
            "transfer_encoder",
            "start_from",
        ),
        ".preflight": ("estimate_memory",),
        ".describe": (
            "count_parameters",
            "describe",
        ),
    },
)
