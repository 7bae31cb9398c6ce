"""Keypoint-augmented self-supervised pretraining and few-label segmentation in JAX."""

__version__ = "0.1.0"
