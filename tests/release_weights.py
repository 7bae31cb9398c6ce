"""The release's weights that gave the golden values, drawn as docs/method.md 9 says.

Also the golden files themselves, and gradients' norms by the release's names.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax
import ml_collections
import numpy as np

from kafjax.torch_import import release_name

GOLDEN = Path(__file__).parent / "golden"


def load_golden(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The configuration, names and gradient norms; and the arrays."""
    facts = json.loads((GOLDEN / f"{name}.json").read_text())
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return facts, dict(arrays)


def draw_state_dict(shapes: Mapping[str, list[int]], salt: str) -> dict[str, np.ndarray]:
    """The release's state dict: a function of names, shapes and salt."""
    return {name: _draw(name, shape, salt) for name, shape in shapes.items()}


def _draw(name: str, shape: list[int], salt: str) -> np.ndarray:
    r = np.random.default_rng(zlib.crc32((salt + name).encode()))
    if name.endswith(("num_batches_tracked", "bin_score")):
        values = np.ones(shape)
    elif name.endswith("running_var"):
        values = r.uniform(0.5, 1.5, shape)
    elif name.endswith("running_mean"):
        values = 0.1 * r.standard_normal(shape)
    elif len(shape) == 1:
        values = r.standard_normal(shape)
        values = 0.05 * values if name.endswith("bias") else 1 + 0.1 * values
    else:
        values = r.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    return np.asarray(values, np.float32)


def golden_model_config(facts: Mapping[str, Any], dtype: str) -> ml_collections.ConfigDict:
    """`config.model` of a golden network."""
    config = facts["config"]
    pretraining = "embedding" in config
    fields = {
        "name": "kaf_unet" if config["num_layers"] else "unet",
        "head": "pretraining" if pretraining else "segmentation",
        "filters": config["filters"],
        "num_attention_layers": 2 * config["num_layers"],
        "dtype": dtype,
        "remat": False,
    }
    if pretraining:
        fields |= {"embedding": config["embedding"], "num_matcher_layers": 4}
        fields |= {"num_sinkhorn_iterations": 100}
    else:
        fields["num_classes"] = config["num_classes"]
    return ml_collections.ConfigDict(fields)


def by_release_names(tree: Any) -> dict[str, np.ndarray]:
    """Parameters, gradients or statistics by the release's names, in our layout."""
    named: dict[str, np.ndarray] = {}
    for path, leaf in flax.traverse_util.flatten_dict(tree, sep="/").items():
        name, array = release_name(path), np.asarray(leaf, np.float64)
        if "$" in name:
            named |= {name.replace("$", str(i)): layer for i, layer in enumerate(array)}
        else:
            named[name] = array
    return named


def whole_positions(position: np.ndarray) -> np.ndarray:
    """The golden positions, of random fractions, as `kafjax.losses` takes them: int32 [b, 2]."""
    return np.stack([np.rint(position * 10_000), np.full(len(position), 10_000)], 1).astype(
        np.int32
    )
