"""Which volumes to label next."""

from kafjax._lazy import public

__all__, __getattr__ = public(
    __name__,
    {
        ".medoids": ("Medoids", "k_medoids"),
        ".suggestions": ("suggest_typical", "suggest_uncertain"),
    },
)
