"""Small configurations and inputs of every network."""

from typing import Any

import ml_collections
import numpy as np


def model_config(name: str, head: str = "segmentation", **fields: Any) -> ml_collections.ConfigDict:
    """`config.model` of a network that compiles quickly; `fields` replace or add."""
    config = {
        "name": name,
        "head": head,
        "filters": 4,
        "num_attention_layers": 2,
        "num_classes": 3,
        "embedding": 8,
        "num_matcher_layers": 2,
        "num_sinkhorn_iterations": 5,
        "dtype": "float32",
        "remat": False,
    }
    return ml_collections.ConfigDict({**config, **fields})


def spread_keypoints(
    counts: list[int], num_places: int, size: tuple[int, int], *, seed: int
) -> tuple[Any, Any, list[Any]]:
    """The first of always the same keypoints, `counts` of them a slice, among random padding.

    `seed` decides the places and the padding. Returns keypoints [b, num_places, 2], their mask
    [b, num_places], and each slice's places in order.
    """
    real = np.random.default_rng(0).integers(0, size, (len(counts), max(counts), 2))
    rng = np.random.default_rng(seed)
    keypoints = rng.integers(0, size, (len(counts), num_places, 2), dtype=np.int32)
    mask = np.zeros((len(counts), num_places), bool)
    places = [np.sort(rng.permutation(num_places)[:count]) for count in counts]
    for b, slots in enumerate(places):
        keypoints[b, slots], mask[b, slots] = real[b, : len(slots)], True
    return keypoints, mask, places
