"""Alias of `kafjax.data.input_pipeline` for scripts written for kafjax 0.1."""

from kafjax.data import open_dataset

__all__ = ["open_dataset"]
