"""`kafjax.data.open_dataset` for scripts written for kafjax 0.1."""

from kafjax.data import open_dataset

__all__ = ["open_dataset"]
