"""A step by `jax.jit(jax.shard_map(...))` instead of `jax.pmap`: the whole change to leave pmap.

`python -m tests.shard_map OUTPUT [ADDRESS PROCESS]` takes two steps by each, on the devices of one
process or of two, asserts that they agree bit for bit, and writes the last state.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec

from kafjax.losses import supervised_contrastive_loss
from kafjax.models.layers import ConvBlock
from kafjax.tasks.base import apply_training
from kafjax.tasks.pretraining import Pretraining
from kafjax.training import step
from tests.runs import random_batch, tiny_config

BATCH_SIZE, RATE = 8, 1e-3


class OneBlock(Pretraining):
    """Pretraining of one convolution block: it compiles quickly and uses everything devices share.

    Batch statistics and positives are those of the global batch.
    """

    def __init__(self, config: Any):
        super().__init__(config, axis_name=step.AXIS_NAME)
        self._model = ConvBlock(4, axis_name=step.AXIS_NAME)

    def init(self) -> dict[str, Any]:
        block, images = ConvBlock(4), np.zeros((1, 8, 8, 1), np.float32)
        return jax.tree.map(np.asarray, block.init(jax.random.key(0), images, train=True))

    def loss(self, params: Any, batch_stats: Any, batch: dict[str, jax.Array]) -> Any:
        images = batch["image"].reshape(-1, *batch["image"].shape[2:])
        output, batch_stats = apply_training(self._model, params, batch_stats, (images,))
        first, second = output.mean(axis=(1, 2)).reshape(-1, 2, output.shape[-1]).swapaxes(0, 1)
        loss = supervised_contrastive_loss(
            (first, second),
            positives=self._positives(batch["position"]),
            temperature=0.5,
            axis_name=step.AXIS_NAME,
        )
        return loss, ({"loss": loss, "keypoints": batch["keypoint_mask"].mean()}, batch_stats)


class MappedByShardMap:
    """Stands in for `kafjax.training.step.map_devices`."""

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        in_axes: tuple[int | None, ...],
        out_axes: tuple[int | None, ...],
        donate_argnums: tuple[int, ...] = (),
    ):
        def on_device(*arguments: Any) -> Any:
            squeezed = [
                x if axis is None else jax.tree.map(lambda a: a[0], x)
                for x, axis in zip(arguments, in_axes, strict=True)
            ]
            return tuple(
                x if axis is None else jax.tree.map(lambda a: a[None], x)
                for x, axis in zip(function(*squeezed), out_axes, strict=True)
            )

        self._mesh = Mesh(np.array(jax.devices()), (step.AXIS_NAME,))
        self._in_specs, self._out_specs = (
            tuple(PartitionSpec(*([] if axis is None else [step.AXIS_NAME])) for axis in axes)
            for axes in (in_axes, out_axes)
        )
        mapped = jax.shard_map(
            on_device,
            mesh=self._mesh,
            in_specs=self._in_specs,
            out_specs=self._out_specs,
            check_vma=False,
        )
        self._jitted = jax.jit(mapped, donate_argnums=donate_argnums)

    def lower(self, *arguments: Any) -> Any:
        return self._jitted.lower(*self._globally(arguments))

    def __call__(self, *arguments: Any) -> Any:
        results = self._jitted(*self._globally(arguments))
        return multihost_utils.global_array_to_host_local_array(
            results, self._mesh, self._out_specs
        )

    def _globally(self, arguments: Any) -> Any:
        return multihost_utils.host_local_array_to_global_array(
            arguments, self._mesh, self._in_specs
        )


def own_batch(seed: int) -> dict[str, np.ndarray]:
    """This process's part of a batch."""
    batch = random_batch(BATCH_SIZE, 16, seed=seed)
    share = BATCH_SIZE // jax.process_count()
    own = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
    return {field: values[own] for field, values in batch.items()}


def two_steps() -> list[np.ndarray]:
    """The state and the metrics after two steps, from which every device's copy is the same."""
    config = tiny_config(Path("a/b/c"))
    task = OneBlock(config)
    optimizer = step.make_optimizer(config.optimizer)
    update = step.make_update(task, optimizer)
    state = step.replicate(step.init_state(task, optimizer))
    for number in range(2):
        # The signal is the last process's.
        stop = 15 * (jax.process_index() == jax.process_count() - 1)
        state, metrics = update(state, *step.step_inputs(own_batch(number), RATE, stop))
    assert int(step.to_host(metrics)["stop"]) == 15
    leaves = jax.tree.leaves((state, metrics))
    for leaf in leaves:
        first, *others = (np.asarray(part.data).tobytes() for part in leaf.addressable_shards)
        assert len(others) == jax.local_device_count() - 1
        assert all(other == first for other in others), "a replicated result differs by device"
    return [step.to_host(leaf) for leaf in leaves]


def main(output: str, address: str | None = None, process: str = "0") -> None:
    """Compares the two, and writes what pmap gives."""
    if address is not None:
        jax.distributed.initialize(address, num_processes=2, process_id=int(process))
    expected = two_steps()
    with mock.patch.object(step, "map_devices", MappedByShardMap):
        found = two_steps()
    assert len(found) == len(expected) > 10
    for a, b in zip(found, expected, strict=True):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    np.savez(output, *expected)


if __name__ == "__main__":
    main(*sys.argv[1:])
