"""One training step, mapped over devices, and the state that it changes.

The only module that knows of `pmap`. A task (`kafjax.tasks.pretraining`) gives variables and a
loss; parameters are replicated, a global batch is spread over processes and their devices, and
gradients and running statistics are averaged over all.
"""

import contextlib
import ctypes
import dataclasses
import gc
from collections.abc import Callable
from typing import Any, Protocol

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

AXIS_NAME = "batch"
Batch = dict[str, np.ndarray]


class Task(Protocol):
    """What a training step needs to know of what is learnt."""

    def init(self) -> dict[str, Any]:
        """Fresh variables {'params', 'batch_stats'}."""

    def loss(self, params: Any, batch_stats: Any, batch: Any) -> tuple[jax.Array, Any]:
        """(loss, (metrics, new batch_stats)) of a device's part of a batch."""

    def picture(self, batch: Batch) -> dict[str, np.ndarray]:
        """Pictures by name, uint8 [h, w, 3]."""


class Predicting(Protocol):
    """What prediction needs to know of a task."""

    def predict(self, variables: Any, batch: Any) -> jax.Array:
        """Logits [b, h, w, d] of a device's part of a batch."""


class Counting(Protocol):
    """What validation needs to know of a task: numbers that add up over slices."""

    def count(self, variables: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        """Of a device's part of a batch, integers [b, ...] and predicted classes [b, h, w]."""

    def scores(self, counts: np.ndarray) -> dict[str, float]:
        """Metrics of the integers' sums over all slices."""


@flax.struct.dataclass
class TrainState:
    """What a step changes, and what a checkpoint holds."""

    step: Any
    params: Any
    batch_stats: Any
    opt_state: Any
    # {'params', 'batch_stats'} averaged over steps, or empty where the run averages none.
    average: Any = flax.struct.field(default_factory=dict)

    def variables(self) -> dict[str, Any]:
        """What validates and predicts: the averaged variables where there are any."""
        return self.average or {"params": self.params, "batch_stats": self.batch_stats}


def learning_rates(config: Any, num_steps: int) -> np.ndarray:
    """The rate of each step, float32 [num_steps] (docs/method.md 7).

    A cosine from `learning_rate` towards `final_learning_rate`, after a rise in equal parts over
    the share `warmup` of the steps. On the host and all at once: on the device, each rate would
    wait for the step before, and each length of run compile anew.
    """
    rise = round(config.warmup * num_steps)
    steps = np.arange(num_steps - rise)
    cosine = (1 + np.cos(np.pi * steps / len(steps))) / 2
    span = config.learning_rate - config.final_learning_rate
    rising = config.learning_rate * np.arange(1, rise + 1) / (rise + 1)
    return np.concatenate([rising, config.final_learning_rate + span * cosine]).astype(np.float32)


def make_optimizer(config: Any, *, frozen: tuple[str, ...] = ()) -> optax.GradientTransformation:
    """SGD or Adam with L2 regularisation in the gradient, as docs/method.md section 7.

    Its updates are those of a learning rate of 1: the step multiplies them by the schedule's, which
    is an argument, so that runs of other lengths share one compiled step.

    Args:
      config: `config.optimizer`.
      frozen: modules whose parameters stay as they are, weight decay included.

    Raises:
      ValueError: `config.name` is neither 'sgd' nor 'adam'.
    """
    if config.name == "sgd":
        rule = optax.trace(config.momentum)
    elif config.name == "adam":
        rule = optax.scale_by_adam()
    else:
        raise ValueError(f"config.optimizer.name is {config.name!r}, expected sgd or adam")
    steps = [optax.add_decayed_weights(config.weight_decay), rule, optax.scale(-1.0)]
    if frozen:
        stays = optax.masked(optax.set_to_zero(), lambda params: {n: n in frozen for n in params})
        steps.append(stays)
    return optax.chain(*steps)


def init_state(
    task: Task, optimizer: optax.GradientTransformation, *, averages: bool = False
) -> TrainState:
    """The state before the first step, of host arrays; with a place for averages if asked for."""
    variables = task.init()
    # `make_optimizer`'s moments start at 0; hundreds of zeros are a second of compilation.
    shapes = jax.eval_shape(optimizer.init, variables["params"])
    opt_state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    state = TrainState(
        np.zeros((), np.int32), variables["params"], variables["batch_stats"], opt_state
    )
    return start_averages(state) if averages else state


def start_averages(state: TrainState) -> TrainState:
    """The state with its own variables as their averages, of no step so far."""
    return dataclasses.replace(
        state, average={"params": state.params, "batch_stats": state.batch_stats}
    )


def update_average(average: Any, variables: Any, step: jax.Array, *, decay: float) -> Any:
    """Exponential averages after one more step.

    A step keeps the share `decay` of the average, or (1 + t) / (10 + t) after t steps where that is
    less: the average then is of about the last ninth of a run, short or long, and forgets the
    initial values.
    """
    kept = jnp.minimum(decay, (1 + step) / (10 + step))
    return optax.incremental_update(variables, average, 1 - kept)


class MappedStep:
    """A mapped function; what compiling it leaves in memory is given back before it first runs.

    For KAF-UNet that is a gigabyte, which else would lie beside all that the step itself needs.
    """

    def __init__(self, mapped: Any):
        self._mapped = mapped
        self._compiled = False

    def lower(self, *arguments: Any) -> Any:
        """As of what `jax.pmap` returns."""
        return self._mapped.lower(*arguments)

    def __call__(self, *arguments: Any) -> Any:
        """Calls the function, compiled at first."""
        if not self._compiled:
            self.lower(*arguments).compile()  # the call finds it
            return_freed_memory()
            self._compiled = True
        return self._mapped(*arguments)


def make_update(
    task: Task, optimizer: optax.GradientTransformation, *, average_decay: float = 0.0
) -> MappedStep:
    """The mapped training step: (state, batch, learning_rate, stop) -> (state, metrics).

    Every argument has a leading axis of local devices. `stop` is how many signals a process has
    had; the metrics' `stop` is the greatest of all processes', so that all stop at the same step.
    """

    def update(
        state: TrainState, batch: Any, learning_rate: jax.Array, stop: jax.Array
    ) -> tuple[TrainState, Any]:
        gradient = jax.value_and_grad(task.loss, has_aux=True)
        (_, (metrics, batch_stats)), grads = gradient(state.params, state.batch_stats, batch)
        if jax.lax.axis_size(AXIS_NAME) > 1:  # XLA would copy all gradients for a mean of one
            grads, metrics, batch_stats = jax.lax.pmean((grads, metrics, batch_stats), AXIS_NAME)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        updates = optax.tree.scale(learning_rate, updates)
        params = optax.apply_updates(state.params, updates)
        metrics["stop"] = jax.lax.pmax(stop, AXIS_NAME)
        average = state.average
        if average:
            variables = {"params": params, "batch_stats": batch_stats}
            average = update_average(average, variables, state.step, decay=average_decay)
        return TrainState(state.step + 1, params, batch_stats, opt_state, average), metrics

    return MappedStep(jax.pmap(update, axis_name=AXIS_NAME, donate_argnums=0))


def return_freed_memory() -> None:
    """Gives what this process has freed back to the system, where the C library is glibc.

    It keeps what its many threads have freed, such as those that compile, for their later use.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def make_count(task: Counting) -> Callable[[TrainState, Any], tuple[jax.Array, ...]]:
    """The mapped validation step: (state, batch) -> (records, counts, classes).

    Records and the task's counts are those of the global batch, [B] and [B, ...], the same on every
    device; the predicted classes are of a device's own slices.
    """

    def count(state: TrainState, batch: Any) -> tuple[jax.Array, ...]:
        counts, classes = task.count(state.variables(), batch)
        own = batch["record"], counts
        return *jax.lax.all_gather(own, AXIS_NAME, tiled=True), classes

    return jax.pmap(count, axis_name=AXIS_NAME)


def make_predict(task: Predicting, variables: Any) -> Callable[[Batch], np.ndarray]:
    """Class probabilities float32 [b, h, w, d] of a process's batches, spread over its devices."""

    def predict(variables: Any, batch: Any) -> jax.Array:
        return jax.nn.softmax(task.predict(variables, batch).astype(jax.numpy.float32))

    mapped = jax.pmap(predict, axis_name=AXIS_NAME)
    resident = on_devices(variables)

    def run(batch: Batch) -> np.ndarray:
        probabilities = mapped(resident, shard(batch))
        return np.asarray(probabilities).reshape(-1, *probabilities.shape[2:])

    return run


def replicate(tree: Any) -> Any:
    """Host arrays with a leading axis of local devices, ready for a mapped step."""
    n = jax.local_device_count()
    return jax.tree.map(lambda x: np.broadcast_to(x, (n, *np.shape(x))), tree)


def on_devices(tree: Any) -> Any:
    """Host arrays replicated on the devices, placed as a mapped step places what it returns.

    Given a first state that is on the host, a step would be traced and compiled again for the next.
    """
    return jax.pmap(lambda x: x, axis_name=AXIS_NAME)(replicate(tree))


def unreplicate(tree: Any) -> Any:
    """The first local device's arrays as host copies, without the axis of devices."""
    # A copy: the CPU's device buffer is shared with the array and donated to the next step. Made by
    # the host: on the device each shape would compile an index of its own.
    return jax.tree.map(lambda x: np.array(np.asarray(x.addressable_shards[0].data)[0]), tree)


def unshard(tree: Any) -> Any:
    """A process's own part of mapped results, on the host: [b, ...] over its devices together."""

    def join(x: jax.Array) -> np.ndarray:
        return np.concatenate([np.asarray(part.data)[0] for part in x.addressable_shards])

    return jax.tree.map(join, tree)


def shard(batch: Batch) -> Batch:
    """Spreads a process's batch over its devices: [b, ...] -> [devices, b / devices, ...]."""
    n = jax.local_device_count()
    return {field: values.reshape(n, -1, *values.shape[1:]) for field, values in batch.items()}
