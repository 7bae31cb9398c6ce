"""One training step, mapped over devices, and its state.

A task (`kafjax.tasks`) provides variables and a loss. The state is replicated and has no device
axis; a global batch is spread over processes and their devices, and gradients and running
statistics are averaged over all. `map_devices` is the only caller of `jax.pmap`.

All transfers are explicit: `replicate` and `shard` put host arrays on the devices, `to_host` and
`own_part` fetch results.
"""

import contextlib
import ctypes
import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kafjax.errors import UserError
from kafjax.programs import Program
from kafjax.tasks.base import Batch, Task

AXIS_NAME = "batch"


@flax.struct.dataclass
class TrainState:
    """The state that a step changes and a checkpoint stores."""

    step: Any
    params: Any
    batch_stats: Any
    opt_state: Any
    # {'params', 'batch_stats'} averaged over steps, or empty without averaging.
    average: Any = flax.struct.field(default_factory=dict)

    @property
    def variables(self) -> dict[str, Any]:
        """The network's variables in validation and prediction: {'params', 'batch_stats'}.

        The averaged ones if the run averages.
        """
        return self.average or {"params": self.params, "batch_stats": self.batch_stats}


def learning_rates(config: Any, num_steps: int) -> np.ndarray:
    """The rate of each step, float32 [num_steps] (docs/method.md 7).

    A cosine from `learning_rate` to `final_learning_rate`, after a linear rise over the fraction
    `warmup` of the steps. Computed on the host and all at once: on the device, each rate would wait
    for the previous step, and each run length would need its own compilation.
    """
    rise = round(config.warmup * num_steps)
    steps = np.arange(num_steps - rise)
    cosine = (1 + np.cos(np.pi * steps / len(steps))) / 2
    span = config.learning_rate - config.final_learning_rate
    rising = config.learning_rate * np.arange(1, rise + 1) / (rise + 1)
    return np.concatenate([rising, config.final_learning_rate + span * cosine]).astype(np.float32)


def make_optimizer(config: Any, *, frozen: tuple[str, ...] = ()) -> optax.GradientTransformation:
    """SGD or Adam with L2 regularisation in the gradient, as in docs/method.md section 7.

    Its updates have a learning rate of 1: the step multiplies them by the schedule's rate, which is
    an argument, so runs of different lengths share one compiled step.

    Args:
      config: `config.optimizer`.
      frozen: modules whose parameters do not change, not even by weight decay.

    Raises:
      ValueError: `config.name` is neither 'sgd' nor 'adam'.
    """
    if config.name == "sgd":
        rule = optax.trace(config.momentum)
    elif config.name == "adam":
        rule = optax.scale_by_adam()
    else:
        raise UserError(f"config.optimizer.name is {config.name!r}, expected sgd or adam")
    steps = [optax.add_decayed_weights(config.weight_decay), rule, optax.scale(-1.0)]
    if frozen:
        stays = optax.masked(optax.set_to_zero(), lambda params: {n: n in frozen for n in params})
        steps.append(stays)
    return optax.chain(*steps)


def init_state(
    task: Task, optimizer: optax.GradientTransformation, *, averages: bool = False
) -> TrainState:
    """The state before the first step, of host arrays; with averages if requested."""
    variables = task.init()
    # `make_optimizer`'s moments start at 0; making hundreds of zeros in JAX costs a second of
    # compilation.
    shapes = jax.eval_shape(optimizer.init, variables["params"])
    opt_state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    state = TrainState(
        np.zeros((), np.int32), variables["params"], variables["batch_stats"], opt_state
    )
    return start_averages(state) if averages else state


def start_averages(state: TrainState) -> TrainState:
    """The state with averages set to its variables, before the first step."""
    return dataclasses.replace(
        state, average={"params": state.params, "batch_stats": state.batch_stats}
    )


def update_average(average: Any, variables: Any, step: jax.Array, *, decay: float) -> Any:
    """Exponential averages after one more step.

    A step keeps the fraction `decay` of the average, or (1 + t) / (10 + t) after t steps if that is
    less: the average then covers about the last ninth of a run of any length, and forgets the
    initial values.
    """
    kept = jnp.minimum(decay, (1 + step) / (10 + step))
    return optax.incremental_update(variables, average, 1 - kept)


def map_devices(
    function: Callable[..., Any],
    *,
    in_axes: tuple[int | None, ...],
    out_axes: Any,
    donate_argnums: tuple[int, ...] = (),
) -> Any:
    """Maps a function over all devices of all processes, as the axis `AXIS_NAME`.

    Args:
      function: called on every device with its part of the arguments.
      in_axes: 0 for arguments with a leading axis of local devices, None for replicated ones.
      out_axes: likewise for results. `function` must ensure that a result with None is equal on all
        devices; nothing checks it.
      donate_argnums: arguments whose memory the results may reuse.
    """
    return jax.pmap(
        function,
        axis_name=AXIS_NAME,
        in_axes=in_axes,
        out_axes=out_axes,
        donate_argnums=donate_argnums,
    )


def make_update(
    task: Task, optimizer: optax.GradientTransformation, *, average_decay: float = 0.0
) -> Program:
    """The mapped training step: (state, *step_inputs(...)) -> (state, metrics).

    The state is donated. The metric `stop` is the maximum over all processes, so all stop at the
    same step.
    """

    def update(
        state: TrainState, batch: Any, learning_rate: jax.Array, stop: jax.Array
    ) -> tuple[TrainState, Any]:
        gradient = jax.value_and_grad(task.loss, has_aux=True)
        teacher = (state.average,) if task.has_teacher else ()
        (_, (metrics, batch_stats)), grads = gradient(
            state.params, state.batch_stats, batch, *teacher
        )
        if jax.lax.axis_size(AXIS_NAME) > 1:  # else XLA copies all gradients
            grads, metrics, batch_stats = jax.lax.pmean((grads, metrics, batch_stats), AXIS_NAME)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        updates = optax.tree.scale(learning_rate, updates)
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if average:
            variables = {"params": params, "batch_stats": batch_stats}
            average = update_average(average, variables, state.step, decay=average_decay)
        state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            average=average,
        )
        return state, {**metrics, "stop": jax.lax.pmax(stop, AXIS_NAME)}

    in_axes, out_axes, donated = (None, 0, None, 0), (None, None), (0,)
    return Program(
        map_devices(update, in_axes=in_axes, out_axes=out_axes, donate_argnums=donated),
        *("update", task.facts, average_decay),
        donate_argnums=donated,
        # For KAF-UNet compiling leaves a gigabyte, in addition to what the step needs.
        after_compiling=lambda: return_freed_memory(),
    )


def step_inputs(batch: Batch, learning_rate: float, stop: int = 0) -> tuple[Any, Any, Any]:
    """A training step's inputs, except the state, on the devices.

    Args:
      batch: this process's part of the global batch.
      learning_rate: of this step.
      stop: number of signals, or the signal, that this process has received; 0 for none.
    """
    stops = np.full(jax.local_device_count(), stop, np.int32)
    return shard(batch), replicate(np.float32(learning_rate)), _put(stops, AXIS_NAME)


def return_freed_memory() -> None:
    """Returns this process's freed memory to the system, if the C library is glibc.

    glibc keeps memory freed by threads, such as those that compile, for later use.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def make_count(task: Task) -> Callable[[TrainState, Any], tuple[jax.Array, ...]]:
    """The mapped validation step: (state, sharded batch) -> (records, counts, classes).

    Records and counts are those of the global batch, [B] and [B, ...], replicated; the predicted
    classes stay on their slices' devices (`own_part`).
    """

    def count(state: TrainState, batch: Any) -> tuple[jax.Array, ...]:
        counts, classes = task.count(state.variables, batch)
        own = batch["record"], counts
        return *jax.lax.all_gather(own, AXIS_NAME, tiled=True), classes

    mapped = map_devices(count, in_axes=(None, 0), out_axes=(None, None, 0))
    return Program(mapped, "count", task.facts)


def make_predict(task: Task, variables: Any) -> Callable[[Batch], np.ndarray]:
    """Class probabilities float32 [b, h, w, d] of a process's batches, spread over its devices."""

    def predict(variables: Any, batch: Any) -> jax.Array:
        return task.probabilities(task.predict(variables, batch).astype(jax.numpy.float32))

    mapped = map_devices(predict, in_axes=(None, 0), out_axes=0)
    program, resident = Program(mapped, "predict", task.facts), replicate(variables)
    return lambda batch: own_part(program(resident, shard(batch)))


def replicate(tree: Any) -> Any:
    """Host arrays on all local devices, with the placement of a mapped step's results.

    A step would be compiled again for arrays with another placement.
    """
    return _put(tree)


def shard(batch: Batch) -> Any:
    """A process's batch over its devices: [b, ...] -> [devices, b / devices, ...]."""
    n = jax.local_device_count()
    return _put(jax.tree.map(lambda x: x.reshape(n, -1, *x.shape[1:]), batch), AXIS_NAME)


def to_host(tree: Any) -> Any:
    """Host copies of replicated arrays."""
    # On CPU the returned array shares the device buffer, which the next step donates.
    return jax.tree.map(np.array, jax.device_get(tree))


def own_part(sharded: jax.Array) -> np.ndarray:
    """A process's part of a mapped result, on the host: [devices, b / devices, ...] -> [b, ...]."""
    values = np.asarray(jax.device_get(sharded))
    return values.reshape(-1, *values.shape[2:])


def _put(tree: Any, *axes: str) -> Any:
    """Host arrays on the local devices, with their first axes mapped to the device axes."""
    mesh = Mesh(np.array(jax.local_devices()), (AXIS_NAME,))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*axes)))
