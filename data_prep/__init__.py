"""Offline preparation: raw volumes to TFRecords with keypoints and correspondences. No JAX."""
