"""The files of a checkpoint: their description, and verified reading.

    checkpoints/<step>/state     the pytree of arrays, as Orbax writes it
    checkpoints/<step>/meta      shape, type and hash of every leaf, metrics, data; and a checksum
    checkpoints/<step>/metrics   the scores that Orbax reads, a copy of those in `meta`

Reading involves no other process. Leaf names are paths, such as `params/head/kernel`.
"""

import asyncio
import errno
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from kafjax.cores import usable_cores
from kafjax.errors import UserError
from kafjax.files import checksum, sync, sync_tree, write_text
from kafjax.paths import plain

PyTree = Any
T = TypeVar("T")

STEPS = "checkpoints"  # the folder of steps in a workdir
_FORMAT = 1
_VARIABLES = ("params", "batch_stats")

log = logging.getLogger(__name__)


class DamagedCheckpointError(UserError):
    """A checkpoint is unreadable or was changed; the message names the step and the fault."""


class DurablePath(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A folder that Orbax fills and renames, flushed to the disk before older ones are deleted."""

    async def finalize(self) -> None:
        """Renames the folder."""
        await asyncio.to_thread(sync_tree, self.get())
        await super().finalize()
        await asyncio.to_thread(sync_tree, self.get_final())
        await asyncio.to_thread(sync, self.get_final().parent)


def scores(best_metric: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """The scores that Orbax stores next to a checkpoint and reads first to find the best."""
    return {best_metric: math.nan, **metrics}


def mend_scores(directory: Path, best_metric: str) -> None:
    """Rewrites Orbax's copy of the metrics if it differs from `meta`.

    Orbax does not verify its copy: a flipped bit would stop it, or make it keep a checkpoint other
    than the best. With several processes, all must make this call.
    """
    for step in steps_in(directory):
        path = directory / str(step) / "metrics" / "metrics"
        found = path.read_bytes() if path.is_file() else None
        try:
            metrics = read_meta(directory / str(step))["metrics"]
        except UserError:  # reading the checkpoint will report it
            if found is None or _are_metrics(found):
                continue
            metrics = {}
        content = json.dumps(scores(best_metric, metrics))
        if found not in (None, content.encode()) and jax.process_index() == 0:
            log.warning("%s: not the metrics that were saved; rewritten", path)
            write_text(path, content)
    ocp.multihost.sync_global_processes("kafjax_mend_scores")


def _are_metrics(content: bytes) -> bool:
    try:
        metrics = json.loads(content)
    except ValueError:
        return False
    return isinstance(metrics, dict) and all(isinstance(x, float) for x in metrics.values())


def _leaves(tree: PyTree) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def _signature(leaf: Any) -> list[Any]:
    """[dtype, shape] of an array, a `jax.ShapeDtypeStruct` or a number, as JSON returns them."""
    if not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    return [str(leaf.dtype), list(leaf.shape)]


def _hash(leaf: np.ndarray) -> str:
    data = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)
    return hashlib.blake2b(data.data, digest_size=16).hexdigest()


def _hashes(tree: PyTree) -> dict[str, str]:
    names, leaves = zip(*_leaves(tree), strict=True)
    with ThreadPoolExecutor(len(usable_cores())) as threads:  # hashing lets other threads run
        return dict(zip(names, threads.map(_hash, leaves), strict=True))


def describe_state(
    step: int, arrays: PyTree, metrics: Mapping[str, float], data: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of `meta`, see the module's docstring."""
    body = {
        "format": _FORMAT,
        "step": step,
        "signatures": {name: _signature(leaf) for name, leaf in _leaves(arrays)},
        "hashes": _hashes(arrays),
        "metrics": dict(metrics),
        "data": dict(data),
    }
    return {**body, "checksum": checksum(body)}


def steps_in(directory: Path) -> list[int]:
    """The steps in a folder of checkpoints, good or damaged, in order; empty without the folder.

    Raises `OSError` for anything else of that name, to avoid an accidental restart.
    """
    if not os.path.lexists(directory):
        return []
    if not directory.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fspath(directory))
    return sorted(ocp.utils.checkpoint_steps(plain(directory)))


def newest_good(
    workdir: Path, read: Callable[[int], T], step: int | None = None
) -> tuple[int, T] | None:
    """The newest step that `read` accepts (only `step` if given), and the result of `read`.

    None without any step; `ValueError` if all are damaged.
    """
    steps = [s for s in reversed(steps_in(workdir / STEPS)) if step in (None, s)]
    for candidate in steps:
        try:
            return candidate, read(candidate)
        except DamagedCheckpointError as error:
            log.warning("%s", error)
    if not steps:
        return None
    raise UserError(f"{workdir}: every checkpoint is damaged: {', '.join(map(str, steps))}")


def read_meta(directory: Path) -> dict[str, Any]:
    """Reads and verifies a checkpoint's `meta`.

    Raises `DamagedCheckpointError`; `ValueError` for another format version.
    """
    meta = _read_item(directory / "meta", ocp.JsonCheckpointHandler, ocp.args.JsonRestore())
    body = {name: value for name, value in meta.items() if name != "checksum"}
    if checksum(body) != meta.get("checksum"):
        raise DamagedCheckpointError(f"{directory}: damaged, its meta has a wrong checksum")
    if body["format"] != _FORMAT:
        raise UserError(f"{directory}: has format {body['format']}; expected {_FORMAT}")
    return body


def read_state(directory: Path, template: PyTree) -> tuple[PyTree, dict[str, Any]]:
    """A checkpoint's arrays, shaped as `template`, and its `meta`. Raises `ValueError`."""
    meta = read_meta(directory)
    _check_signatures(directory, meta["signatures"], template)
    return _read_arrays(directory, template, meta["hashes"]), meta


def read_variables(directory: Path) -> dict[str, dict[str, Any]]:
    """The `params` and `batch_stats` of a checkpoint; the averaged ones if present.

    Raises `ValueError`.
    """
    meta = read_meta(directory)
    stored: dict[str, Any] = {}
    for name, (dtype, shape) in meta["signatures"].items():
        *parents, last = name.split("/")
        node = stored
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jax.ShapeDtypeStruct(shape, dtype)
    averaged = "average" in stored
    tree = stored["average"] if averaged else {name: stored.get(name, {}) for name in _VARIABLES}
    tree = {name: part for name, part in tree.items() if part}
    found = _read_arrays(directory, {"average": tree} if averaged else tree, meta["hashes"])
    return {name: {} for name in _VARIABLES} | (found["average"] if averaged else found)


def _check_signatures(directory: Path, stored: Mapping[str, Any], template: PyTree) -> None:
    wanted = {name: _signature(leaf) for name, leaf in _leaves(template)}
    wrong = [
        f"  {name}: {stored.get(name, 'absent')} there, {wanted.get(name, 'absent')} expected"
        for name in sorted(stored.keys() | wanted.keys())
        if stored.get(name) != wanted.get(name)
    ]
    if wrong:
        raise UserError(f"{directory} does not fit this run's state:\n" + "\n".join(wrong))


def _read_arrays(directory: Path, template: PyTree, hashes: Mapping[str, str]) -> PyTree:
    """Reads and verifies the leaves of `template`, which may be a part of the stored tree."""
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), template)
    arrays = _read_item(
        directory / "state",
        ocp.PyTreeCheckpointHandler,
        ocp.args.PyTreeRestore(template, restore_args=as_numpy, partial_restore=True),
    )
    expected = {name: _signature(leaf) for name, leaf in _leaves(template)}
    found = {name: leaf for name, leaf in _leaves(arrays) if isinstance(leaf, np.ndarray)}
    wrong = [name for name in expected if name not in found]
    wrong += [name for name, leaf in found.items() if _signature(leaf) != expected.get(name)]
    if not wrong:
        wrong = [name for name, value in _hashes(arrays).items() if value != hashes[name]]
    if wrong:
        raise DamagedCheckpointError(
            f"{directory}: damaged, these leaves are not what was saved: {', '.join(wrong)}"
        )
    return arrays


def _read_item(directory: Path, handler: Callable[..., Any], args: ocp.args.CheckpointArgs) -> Any:
    """Reads one item of a checkpoint in this process only."""
    process = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=process,
        active_processes={process},
        barrier_sync_key_prefix=f"read_{process}",
    )
    try:
        with ocp.Checkpointer(
            handler(multiprocessing_options=alone), multiprocessing_options=alone
        ) as reader:
            return reader.restore(plain(directory), args=args)
    except MemoryError:
        raise
    except Exception as error:  # damage raises any kind of error
        reason = " ".join(str(error).split())
        reason = reason.replace(str(plain(directory)), str(directory))[:200]
        raise DamagedCheckpointError(
            f"{directory}: damaged, it cannot be read ({type(error).__name__}: {reason})"
        ) from error
