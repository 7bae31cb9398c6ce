"""Weights of the authors' PyTorch release as variables of our networks.

`import_state_dict` needs only NumPy. The command, which alone needs PyTorch, turns a checkpoint
file into an Orbax checkpoint that every other command takes:

    python -m kafjax.torch_import --input latest.pth --config configs/chd_finetune.py --output DIR

The release's names are those of method.md section 10. Its networks also hold weights that nothing
uses (`DEAD_WEIGHTS`); they are dropped and named.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np

from kafjax.models import build_model

NUM_HEADS = 4

# Each KAF layer's own matching projection and dustbin, and an unused head for pretraining.
DEAD_WEIGHTS = re.compile(
    r"encoder\.graph_\d\.superglue\.(bin_score|final_proj\.\w+)|graph_local_head\..*"
)
_COUNTERS = re.compile(r".*\.num_batches_tracked")

# Our modules' paths -> the release's names, applied one after the other. `$` stands for the number
# of an attention layer, whose parameters we hold in one array with a leading layer axis.
_Rule = tuple[str, Callable[[re.Match[str]], str]]
_PART = {"conv": 0, "norm": 1}
_PROJECTION = {"query": "proj.0", "key": "proj.1", "value": "proj.2", "merge": "merge"}
_RULES: tuple[_Rule, ...] = (
    (r"/(conv|dense)(?=/(kernel|bias)$)", lambda m: ""),
    (r"^decoder/up_(\d)", lambda m: f"decoder.upscale{int(m[1]) + 2}"),
    (r"^decoder/head", lambda m: "decoder.head.0"),
    (
        r"^decoder/level_(\d)/(conv|norm)_(\d)",
        lambda m: f"decoder.expand_{int(m[1]) + 1}_{m[3]}.{_PART[m[2]]}",
    ),
    (
        r"^encoder/level_(\d)/block/(conv|norm)_(\d)",
        lambda m: f"encoder.contr_{int(m[1]) + 1}_{m[3]}.{_PART[m[2]]}",
    ),
    (r"^encoder/center_(\d)", lambda m: f"encoder.center.{2 * int(m[1]) - 2}"),
    (r"^encoder/level_(\d)/kaf/", lambda m: f"encoder.graph_{int(m[1]) + 1}."),
    (r"(?<=\.)project/", lambda m: "feature_mlp/"),
    (r"(?<=\.)scatter", lambda m: "diffusion_cnn.0"),
    (r"(?<=\.)norm/", lambda m: "diffusion_cnn.1/"),
    (r"(?<=\.)fuse", lambda m: "diffusion_cnn.3"),
    (r"(?<=\.)(?=position/|attention/)", lambda m: "superglue."),
    (r"^matcher/", lambda m: "superglue."),
    (r"^superglue\.project", lambda m: "superglue.final_proj"),
    (r"attention/layers/layer/", lambda m: "gnn.layers.$."),
    (r"layer_(\d)/", lambda m: f"gnn.layers.{m[1]}."),
    (r"(?<=\.)(query|key|value|merge)", lambda m: f"attn.{_PROJECTION[m[1]]}"),
    (r"position/mlp/linear_(\d)", lambda m: f"kenc.encoder.{3 * int(m[1]) - 3}"),
    (r"position/mlp/norm_(\d)", lambda m: f"kenc.encoder.{3 * int(m[1]) - 2}"),
    (r"mlp/linear_(\d)", lambda m: f"mlp.{3 * int(m[1]) - 3}"),
    (r"mlp/norm_1", lambda m: "mlp.1"),
    (r"^cnn_head/linear_(\d)", lambda m: f"head.{2 * int(m[1])}"),
    (r"^kaf_head/linear_(\d)", lambda m: f"graph_head.{3 * int(m[1]) - 3}"),
    (r"^kaf_head/norm", lambda m: "graph_head.1"),
    (r"^fuse_levels", lambda m: "graph_feature_mlp"),
    (r"/(kernel|scale)$", lambda m: ".weight"),
    (r"/bias$", lambda m: ".bias"),
    (r"/(mean|var)$", lambda m: f".running_{m[1]}"),
    (r"dustbin_score$", lambda m: "bin_score"),
)


def release_name(path: str) -> str:
    """The release's name of one of our variables.

    Args:
      path: such as 'encoder/center_1/conv/bias'.

    Returns:
      The name; a '$' in it stands for the layer numbers along the variable's leading axis.
    """
    for pattern, replacement in _RULES:
        path = re.sub(pattern, replacement, path)
    return path


class ImportReport(NamedTuple):
    """What became of a state dict's entries: lists of names."""

    imported: list[str]
    dropped: list[str]


def import_state_dict(
    state_dict: Mapping[str, np.ndarray], config: Any
) -> tuple[dict[str, Any], ImportReport]:
    """Converts the release's weights to the variables of the network that `config` describes.

    Args:
      state_dict: the release's names -> arrays. A 'module.' before every name is ignored.
      config: `config.model`, see `kafjax.models.build_model`.

    Returns:
      {'params', 'batch_stats'} of NumPy arrays, in the model's parameter type; and the report.

    Raises:
      ValueError: entries are missing, unknown or of another shape; all are listed with the shapes
        expected. Or the release has no network of this kind.
    """
    if "fcn" in config.name:
        raise ValueError(
            f"config.model.name is {config.name!r}: there is no import of FCN networks"
        )
    state_dict = {name.removeprefix("module."): np.asarray(a) for name, a in state_dict.items()}
    template = flax.traverse_util.flatten_dict(_variable_shapes(config), sep="/")
    used: list[str] = []
    faults: list[str] = []
    variables = {}
    for path, leaf in template.items():
        name = release_name(path.split("/", 1)[1])
        numbered = [name.replace("$", str(i)) for i in range(leaf.shape[0] if "$" in name else 1)]
        shape = leaf.shape[1:] if "$" in name else leaf.shape
        arrays = []
        for entry in numbered:
            expected = _release_shape(entry, path, shape)
            if entry not in state_dict:
                faults.append(f"missing: {entry} {list(expected)}")
            elif state_dict[entry].shape != expected:
                found = list(state_dict[entry].shape)
                faults.append(f"shape: {entry} is {found}, expected {list(expected)}")
            else:
                arrays.append(_to_ours(state_dict[entry], path))
        used += numbered
        if len(arrays) == len(numbered):
            array = np.stack(arrays) if "$" in name else arrays[0]
            variables[path] = np.asarray(array, leaf.dtype)
    rest = [name for name in state_dict if name not in set(used)]
    dropped = [name for name in rest if DEAD_WEIGHTS.fullmatch(name)]
    unknown = [n for n in rest if not DEAD_WEIGHTS.fullmatch(n) and not _COUNTERS.fullmatch(n)]
    faults += [f"unknown: {name} {list(state_dict[name].shape)}" for name in unknown]
    if faults:
        raise ValueError(
            f"{len(faults)} entries do not fit {config.name} with {config.filters} filters:\n  "
            + "\n  ".join(faults)
        )
    return flax.traverse_util.unflatten_dict(variables, sep="/"), ImportReport(used, dropped)


def _variable_shapes(config: Any) -> dict[str, Any]:
    views = (2,) if config.head == "pretraining" else ()
    image = jnp.zeros((1, *views, 16, 16, 1))
    keypoints = jnp.zeros((1, *views, 1, 2), jnp.int32)
    mask = jnp.ones((1, *views, 1), bool)
    init = build_model(config).init
    return jax.eval_shape(lambda: init(jax.random.key(0), image, keypoints, mask, train=False))


def _release_shape(name: str, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if not path.endswith("kernel"):
        return shape
    if "/up_" in path:
        return (shape[2], shape[3], *shape[:2])
    if len(shape) == 4:
        return (shape[3], shape[2], *shape[:2])
    is_linear = name.startswith(("head.", "graph_head."))
    return shape[::-1] if is_linear else (*shape[::-1], 1)


def _to_ours(array: np.ndarray, path: str) -> np.ndarray:
    """Brings an entry to our layout: channels last, the heads of attention one after the other."""
    if path.endswith("kernel"):
        if "/up_" in path:
            array = array.transpose(2, 3, 0, 1)
        elif array.ndim == 4:
            array = array.transpose(2, 3, 1, 0)
        else:
            array = array.reshape(array.shape[:2]).T
    if re.search(r"/(query|key|value)/", path):
        return _heads_first(array)
    if path.endswith("merge/dense/kernel"):
        return _heads_first(array.T).T
    return array


def _heads_first(array: np.ndarray) -> np.ndarray:
    """Reorders the last axis from (channel, head), the release's, to (head, channel)."""
    split = array.reshape(*array.shape[:-1], -1, NUM_HEADS)
    return np.swapaxes(split, -1, -2).reshape(array.shape)
