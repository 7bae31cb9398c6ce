"""Weights of the authors' PyTorch release as variables of our networks.

`import_state_dict` needs only NumPy. The command needs PyTorch too; it converts a checkpoint file
to an Orbax checkpoint that every other command reads:

    kafjax import-torch --input latest.pth --config chd_finetune --output DIR

The release's names are those of docs/method.md section 9. Its networks also hold unused weights
(`DEAD_WEIGHTS`); they are dropped and reported.
"""

import hashlib
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax
import numpy as np

from kafjax.errors import UserError
from kafjax.models import build_model, example_inputs, variable_shapes

NUM_HEADS = 4

# Each KAF layer's own matching projection and dustbin, and an unused head for pretraining.
DEAD_WEIGHTS = re.compile(
    r"encoder\.graph_\d\.superglue\.(bin_score|final_proj\.\w+)|graph_local_head\..*"
)
_PREFIX = "module."  # of networks that were trained in DataParallel
# Keys of the state dict in checkpoints that also store optimiser, epoch and so on.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
_COUNTERS = re.compile(r".*\.num_batches_tracked")

# Our modules' paths -> the release's names, applied one after the other. `$` stands for the number
# of an attention layer; we store all layers' parameters in one array with a leading layer axis.
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
      path: such as 'params/encoder/center_1/conv/bias'; the collection may be left out.

    Returns:
      The name; a '$' in it stands for the layer numbers along the variable's leading axis.
    """
    path = path.removeprefix("params/").removeprefix("batch_stats/")
    for pattern, replacement in _RULES:
        path = re.sub(pattern, replacement, path)
    return path


def dead_weights(state_dict: Mapping[str, Any]) -> list[str]:
    """Names of the entries that the release never uses; an import drops them."""
    return [name for name in state_dict if DEAD_WEIGHTS.fullmatch(name.removeprefix(_PREFIX))]


def import_state_dict(state_dict: Mapping[str, np.ndarray], config: Any) -> dict[str, Any]:
    """Converts the release's weights to the variables of the network that `config` describes.

    Args:
      state_dict: the release's names -> arrays; the prefix 'module.' is ignored.
      config: `config.model`, see `kafjax.models.build_model`.

    Returns:
      {'params', 'batch_stats'} of NumPy arrays, in the model's parameter type. Dead weights
      (`dead_weights`) and batch counters are left out.

    Raises:
      ValueError: entries are missing, unknown or have another shape; the message lists all with the
        expected shapes. Or the release has no network of this kind.
    """
    if "fcn" in config.name:
        raise UserError(f"config.model.name is {config.name!r}: there is no import of FCN networks")
    entries = {name.removeprefix(_PREFIX): np.asarray(a) for name, a in state_dict.items()}
    shapes = variable_shapes(build_model(config), *example_inputs(config.head))
    leaves = flax.traverse_util.flatten_dict(shapes, sep="/")
    sources = {path: _release_entries(path, leaf.shape) for path, leaf in leaves.items()}
    faults = _differences(entries, {k: v for source in sources.values() for k, v in source.items()})
    if faults:
        title = f"{len(faults)} entries do not fit {config.name}, {config.head}, "
        raise UserError("\n  ".join([f"{title}{config.filters} filters:", *faults]))
    variables = {}
    for path, leaf in leaves.items():
        arrays = [_to_ours(entries[name], path) for name in sources[path]]
        array = np.stack(arrays) if _is_stack(path) else arrays[0]
        variables[path] = np.asarray(array, leaf.dtype)
    return flax.traverse_util.unflatten_dict(variables, sep="/")


def _differences(
    entries: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """A line for each entry that is missing, unknown or of another shape."""
    faults = []
    for name, shape in expected.items():
        if name not in entries:
            faults.append(f"missing: {name} {list(shape)}")
        elif entries[name].shape != shape:
            faults.append(f"shape: {name} is {list(entries[name].shape)}, expected {list(shape)}")
    for name, array in entries.items():
        unused = DEAD_WEIGHTS.fullmatch(name) or _COUNTERS.fullmatch(name)
        if name not in expected and not unused:
            faults.append(f"unknown: {name} {list(array.shape)}")
    return faults


def _is_stack(path: str) -> bool:
    return "$" in release_name(path)


def _release_entries(path: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The entries that make up one of our variables, in order, with the release's shapes."""
    name = release_name(path)
    if not _is_stack(path):
        return {name: _release_shape(name, path, shape)}
    one = _release_shape(name, path, shape[1:])
    return {name.replace("$", str(i)): one for i in range(shape[0])}


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
    """Converts an entry to our layout: channels last, attention heads one after the other."""
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


def read_state_dict(path: Path) -> dict[str, np.ndarray]:
    """Reads a PyTorch checkpoint file safely: tensors and plain values only, no code.

    A checkpoint that stores the state dict among other entries, under one of its usual names, is
    unwrapped.

    Raises:
      ValueError: PyTorch is missing, or the file is not a PyTorch checkpoint or has no state dict.
    """
    try:
        import torch
    except ImportError:
        raise UserError("torch is missing; expected: pip install 'kafjax[torch]'") from None
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected a PyTorch checkpoint")
    try:
        found = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch.load raises any kind of error for other files
        raise UserError(
            f"{path}: {type(error).__name__} when reading it, expected a PyTorch checkpoint that "
            "holds nothing but tensors and plain values"
        ) from error
    while isinstance(found, Mapping) and (inner := [w for w in _WRAPPERS if w in found]):
        found = found[inner[0]]
    if not isinstance(found, Mapping) or not all(map(torch.is_tensor, found.values())):
        names = f"with {', '.join(map(str, found))}" if isinstance(found, Mapping) else ""
        raise UserError(
            f"{path}: found a {type(found).__name__} {names}, expected a state dict of tensors or "
            f"one under {', '.join(_WRAPPERS)}"
        )
    # NumPy has no bfloat16.
    narrow = (torch.bfloat16, torch.float16)
    return {n: (t.float() if t.dtype in narrow else t).numpy() for n, t in found.items()}


def import_checkpoint(source: Path, config: Any, workdir: Path) -> None:
    """Writes the workdir of a run whose step 0 has the weights of a PyTorch checkpoint file.

    Raises:
      ValueError: the file does not fit `config.model`, or the workdir already holds a run. Nothing
        is written then.
    """
    # Only this function needs Orbax.
    from kafjax.checkpoint.checkpointer import Checkpointer
    from kafjax.workdir.workdir import Workdir

    state_dict = read_state_dict(source)
    variables = import_state_dict(state_dict, config.model)
    folder = Workdir(workdir)
    if folder.checkpoints.exists():
        raise UserError(f"{workdir}: holds checkpoints already, expected a new --output folder")
    origin = {"file": source.name, "sha256": hashlib.sha256(source.read_bytes()).hexdigest()}
    folder.write_config(config.to_dict())
    with Checkpointer(workdir, keep_newest=1, best_metric=None) as checkpointer:
        checkpointer.save(0, variables, metrics={}, data={"imported_from": origin})
    dropped = dead_weights(state_dict)
    print("\n  ".join([f"Dropped {len(dropped)} unused weights:", *dropped]))
    flag = shlex.quote(f"--config.init_from={workdir}")
    print(f"Wrote {workdir}; fine-tune from it with {flag}")


def _run_from_command_line() -> None:
    # Inside a function, so that importing this module defines no flag.
    from absl import app

    from kafjax.commands import define_path, parse_flags, run_command
    from kafjax.config_files import define_config

    source = define_path("input", None, "PyTorch checkpoint of the release.", required=True)
    config = define_config("A config whose `model` fits the file, or a shipped one's name.")
    workdir = define_path("output", None, "Workdir to write, a new one.", required=True)

    def main(_: list[str]) -> None:
        run_command(import_checkpoint, Path(source.value), config.value, Path(workdir.value))

    app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    _run_from_command_line()
