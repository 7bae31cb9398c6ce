"""Starts a run from another run's encoder: transfer from pretraining to fine-tuning.

From a run of local contrast the trained decoder blocks are transferred too.

Variables are {'params', 'batch_stats'}, nested dicts of NumPy arrays as
`kafjax.checkpoint.checkpointer` returns them. Every network stores its encoder under that name,
whatever its head, so the encoder of any run fits any other of the same architecture, including
running statistics.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax
import numpy as np

from kafjax.checkpoint.checkpointer import load_variables
from kafjax.errors import UserError
from kafjax.files import differences, flatten
from kafjax.models import WITHOUT_ATTENTION
from kafjax.workdir.workdir import OLDER, Workdir

Variables = dict[str, Any]

# Config fields that define the encoder's architecture, and those worth reporting.
_ARCHITECTURE: dict[str, tuple[str, ...]] = {
    "model": ("name", "filters", "num_attention_layers", "norm", "num_channels")
}
_DATA = {"data": ("name", "max_keypoints", "radius", "patch_size", "context")}


class TransferReport(NamedTuple):
    """Parameter counts by module, such as 'encoder' or 'decoder'.

    Attributes:
      loaded: taken from the other run.
      fresh: parameters of the new network that keep their initial values.
      unused: parameters of the other run that the new network does not have.
      other_data: lines about differences of the other run's data, which are allowed.
    """

    loaded: dict[str, int]
    fresh: dict[str, int]
    unused: dict[str, int]
    other_data: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"  {title:<14} {_list_modules(modules)}"
            for title, modules in (
                ("loaded:", self.loaded),
                ("starts fresh:", self.fresh),
                ("left behind:", self.unused),
            )
        ]
        if self.other_data:
            lines += ["  pretrained on other data:", *self.other_data]
        return "\n".join(lines)


def transfer_encoder(
    variables: Variables, pretrained: Variables, *, with_decoder: bool = False
) -> tuple[Variables, TransferReport]:
    """Replaces the encoder of a network's variables by a pretrained one.

    Args:
      variables: of the new network.
      pretrained: of any network with the same encoder.
      with_decoder: also take the other run's decoder blocks; the rest starts fresh.

    Returns:
      Variables with the structure, shapes and types of `variables`, and a report of their origin.

    Raises:
      ValueError: the networks differ; the message lists everything missing, unknown or of another
        shape.
    """
    ours, theirs = (flax.traverse_util.flatten_dict(v, sep="/") for v in (variables, pretrained))
    taken = ("encoder", "decoder") if with_decoder else ("encoder",)
    offered = {name: array for name, array in theirs.items() if _module(name) in taken}
    wanted = {
        name: array
        for name, array in ours.items()
        if _module(name) == "encoder" or (_module(name) in taken and name in offered)
    }
    faults = [
        *(f"missing: {n} {list(wanted[n].shape)}" for n in sorted(wanted.keys() - offered.keys())),
        *(f"unknown: {n} {list(offered[n].shape)}" for n in sorted(offered.keys() - wanted.keys())),
        *(
            f"shape: {name} is {list(offered[name].shape)}, expected {list(wanted[name].shape)}"
            for name in sorted(wanted.keys() & offered.keys())
            if offered[name].shape != wanted[name].shape
        ),
    ]
    if faults:
        title = f"the pretrained {' and '.join(taken)} does not fit, {len(faults)} of its arrays:"
        raise UserError("\n  ".join([title, *faults]))
    loaded = {name: np.asarray(offered[name], array.dtype) for name, array in wanted.items()}
    report = TransferReport(
        _count_by_module(wanted),
        _count_by_module({name: a for name, a in ours.items() if name not in wanted}),
        _count_by_module({name: a for name, a in theirs.items() if name not in offered}),
    )
    return flax.traverse_util.unflatten_dict(ours | loaded, sep="/"), report


def check_architecture(workdir: str | os.PathLike[str] | None, config: Any) -> None:
    """Raises `ValueError` listing the differences between another run's network and `config`'s."""
    if workdir is None:
        raise UserError(
            "config.init_from is not given; expected the workdir of a pretraining run "
            "(--config NAME_finetune:scratch starts without one)"
        )
    fields = _ARCHITECTURE
    if config.model.name in WITHOUT_ATTENTION:
        fields = {"model": tuple(n for n in fields["model"] if n != "num_attention_layers")}
    if differing := _differences(Workdir(workdir).read_config(), config, fields):
        raise UserError(
            f"config.init_from is {workdir}, the run of another network:\n" + "\n".join(differing)
        )


def _differences(
    there: Mapping[str, Any], config: Any, fields: Mapping[str, Sequence[str]]
) -> list[str]:
    ours = config.to_dict() if hasattr(config, "to_dict") else config

    def pick(of: Mapping[str, Any]) -> dict[str, Any]:
        flat = OLDER | flatten(
            json.loads(json.dumps({part: of.get(part) or {} for part in fields}))
        )
        return {
            f"{part}.{name}": flat[f"{part}.{name}"]
            for part, names in fields.items()
            for name in names
            if f"{part}.{name}" in flat
        }

    return differences(pick(there), pick(ours))


def start_from(
    workdir: str | os.PathLike[str], config: Any, variables: Variables
) -> tuple[Variables, TransferReport]:
    """Puts the encoder of the newest checkpoint in `workdir` into a new network's variables.

    Also transfers the decoder's blocks from a run of local contrast.

    Args:
      workdir: of a run, or of an import of the authors' weights.
      config: of the new run.
      variables: of the new run's network.

    Raises:
      ValueError: the encoders differ, or `workdir` holds no good checkpoint.
    """
    check_architecture(workdir, config)
    there = Workdir(workdir).read_config()
    is_local = there.get("task") == "local_contrast"
    pretrained = load_variables(Workdir(workdir))
    variables, report = transfer_encoder(variables, pretrained, with_decoder=is_local)
    return variables, report._replace(other_data=tuple(_differences(there, config, _DATA)))


def _module(name: str) -> str:
    return name.split("/")[1]


def _count_by_module(arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, array in arrays.items():
        module = _module(name)
        counts[module] = counts.get(module, 0) + int(array.size)
    return counts


def _list_modules(modules: Mapping[str, int]) -> str:
    parts: Iterable[str] = (f"{module} ({count:,})" for module, count in sorted(modules.items()))
    return ", ".join(parts) or "nothing"
