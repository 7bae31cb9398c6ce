"""The base class of tasks, and shared parts: random keys, transforms, the network in training.

A batch's fields have its samples as their first axis, [b, ...]. Methods that read data import the
reader when called: losses need only JAX and Flax.
"""

import abc
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kafjax import augment
from kafjax.errors import UserError
from kafjax.files import flatten
from kafjax.intensity import IntensityConfig
from kafjax.models import (
    MODELS,
    build_model,
    example_inputs,
    init_variables,
    variable_shapes,
)
from kafjax.programs import Program

if TYPE_CHECKING:
    import grain

    from kafjax.data.batches import BatchOptions
    from kafjax.data.dataset import SliceDataset
    from kafjax.data.splits import Split

Batch = dict[str, Any]  # of NumPy arrays on the host, of JAX arrays in a step
Metrics = dict[str, jax.Array]

# The head of each task's network.
HEADS_OF_TASKS = {
    "pretrain": "pretraining",
    "local_contrast": "local_contrast",
    "segment": "segmentation",
}


# Fields of a config that change nothing in a program; `tests/test_programs.py` compares programs.
_OUTSIDE = (
    *("seed", "num_epochs", "num_steps", "every.", "checkpoint.", "init_from"),
    *("data.dir", "data.fold", "data.num_labeled", "data.num_threads", "optimizer.learning_rate"),
)


def sample_keys(batch: Batch) -> jax.Array:
    """A random key for each sample, [b], from the run's seed and the sample's number.

    The seed is part of the batch, so runs with different seeds share one compiled step.
    """
    root = jax.vmap(jax.random.key)(batch["seed"])
    return jax.vmap(jax.random.fold_in)(root, batch["sample"])


def make_transform(
    function: Callable[..., Any], config: Any, *, with_intensity: bool = True
) -> Callable[..., Any]:
    """`augment_view` or `augment_pair` with the options of `config.augment`."""
    transform = augment.AugmentConfig(**_ranges(config.augment.transform))
    intensity = make_intensity(config) if with_intensity else None
    mode = config.augment.keypoints
    return functools.partial(function, mode=mode, config=transform, intensity=intensity)


def make_intensity(config: Any) -> IntensityConfig | None:
    """The intensity changes of `config.augment`, or None if they change nothing."""
    fields = config.augment.get("intensity")  # absent in runs of older versions
    changes = fields is not None and fields.probability > 0
    return IntensityConfig(**_ranges(fields)) if changes else None


def _is_ours(part: Any) -> bool:
    """Whether a class, or a function with some arguments given, is kafjax's."""
    return getattr(part, "func", part).__module__.startswith("kafjax.")


def _ranges(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a config with ranges as tuples, which a stored config has as lists."""
    return {n: tuple(v) if isinstance(v, Sequence) else v for n, v in fields.items()}


def make_model(config: Any, axis_name: str | None) -> nn.Module:
    """The run's network.

    Batch statistics cover the mapped axis if the config requests it; only pretraining heads with a
    weighted loss exist.
    """
    axis_name = axis_name if config.sync_batch_norm else None
    head = HEADS_OF_TASKS[config.task]
    if head != "pretraining":
        return build_model(config.model, head=head, axis_name=axis_name)
    heads = tuple(name for name, weight in config.loss.weights.items() if weight)
    return build_model(config.model, head=head, axis_name=axis_name, heads=heads)


def network_shapes(config: Any) -> dict[str, Any]:
    """Shapes and types of the variables of the run's network (`variable_shapes`)."""
    return variable_shapes(make_model(config, None), *_example_inputs(config))


def _example_inputs(config: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    num_channels = config.model.get("num_channels") or 1  # absent for one channel
    return example_inputs(HEADS_OF_TASKS[config.task], num_channels)


def apply_training(
    model: nn.Module,
    params: Any,
    batch_stats: Any,
    inputs: tuple[jax.Array, ...],
    *,
    num_microbatches: int = 1,
) -> tuple[Any, Any]:
    """The network's outputs in training, and its new running statistics.

    With several microbatches only one's activations are in memory at a time: each is recomputed in
    the backward pass. Outputs, and therefore losses and gradients, are those of the whole batch,
    except that batch norm covers one microbatch at a time; the new running statistics are the mean
    over the microbatches' updates.

    Args:
      model: called with `inputs` and `train=True`.
      params: its parameters.
      batch_stats: its running statistics.
      inputs: each [b, ...].
      num_microbatches: divides b.

    Raises:
      ValueError: b is not divisible by `num_microbatches`.
    """

    def apply(inputs: tuple[jax.Array, ...]) -> tuple[Any, Any]:
        variables = {"params": params, "batch_stats": batch_stats}
        output, updated = model.apply(variables, *inputs, train=True, mutable=["batch_stats"])
        return output, updated.get("batch_stats", {})

    size = inputs[0].shape[0]
    if size % num_microbatches:
        raise UserError(
            f"config.num_microbatches is {num_microbatches}, "
            f"expected a divisor of the {size} samples of each device"
        )
    if num_microbatches == 1:
        return apply(inputs)
    parts = jax.tree.map(lambda x: x.reshape(num_microbatches, -1, *x.shape[1:]), inputs)
    outputs, statistics = jax.lax.map(jax.checkpoint(apply), parts)
    outputs = jax.tree.map(lambda x: x.reshape(size, *x.shape[2:]), outputs)
    return outputs, jax.tree.map(lambda x: jnp.mean(x, axis=0), statistics)


class Task(abc.ABC):
    """The task of a run: its batches, network, loss, scores and pictures.

    `kafjax.tasks.TASKS` maps names to subclasses. All state is in arguments, so `loss`, `predict`
    and `count` can be traced on any device.

    Args:
      config: the run's config.
      axis_name: the mapped axis over which a batch is spread, if any.

    Attributes:
      frozen: modules of the network that stay fixed.
      best_metric: the metric that selects the best checkpoint, and
      best_mode: whether its largest or smallest value is best.
      has_teacher: whether `loss` takes the averaged variables as a fourth argument.

    Raises:
      ValueError: a config field has an invalid value.
    """

    frozen: ClassVar[tuple[str, ...]] = ()
    best_metric: ClassVar[str] = "loss"
    best_mode: ClassVar[Literal["max", "min"]] = "min"
    has_teacher: ClassVar[bool] = False

    def __init__(self, config: Any, *, axis_name: str | None = None):
        self._config = config
        self._axis_name = axis_name
        self._model = make_model(config, axis_name)
        self._jitted_augment = Program(jax.jit(self.augment), "augment", self.facts)

    @property
    def facts(self) -> dict[str, Any] | None:
        """The config's fields that a compiled program depends on; see `kafjax.programs`.

        None with a network or a task of the user's own, whose code may change between two starts,
        and for a config of another kind than ml_collections'.
        """
        parts = (type(self), *MODELS[self._config.model.name])
        if not all(map(_is_ours, parts)) or not hasattr(self._config, "to_dict"):
            return None
        fields = flatten(self._config.to_dict())
        inside = {name: value for name, value in fields.items() if not name.startswith(_OUTSIDE)}
        return {**inside, "axis_name": self._axis_name}

    @property
    def patch(self) -> dict[str, Any]:
        """The size of a patch and its keypoint slots, as arguments of `make_pair`."""
        data = self._config.data
        size = tuple(data.patch_size)
        return {"patch_size": size, "patch_keypoints": data.get("patch_keypoints")}

    @abc.abstractmethod
    def batches(
        self,
        dataset: "SliceDataset",
        options: "BatchOptions",
        split: "Split",
        *,
        start_step: int = 0,
    ) -> "grain.DatasetIterator":
        """Endless training batches of the split's volumes, without the first `start_step`.

        The iterator has a `close` method. The field `record`, [b, ...], names a batch's slices.
        """

    @abc.abstractmethod
    def sample(self, dataset: "SliceDataset", record: int) -> Batch:
        """A sample of that record: a batch's fields without their first axis."""

    @abc.abstractmethod
    def augment(self, batch: Batch) -> Batch:
        """Transforms every sample with keys that depend only on seed and sample."""

    @abc.abstractmethod
    def loss(
        self, params: Any, batch_stats: Any, batch: Batch
    ) -> tuple[jax.Array, tuple[Metrics, Any]]:
        """(loss, (metrics, new running statistics)) of a device's part of a batch."""

    def predict(self, variables: Any, batch: Batch) -> jax.Array:
        """Logits [b, h, w, d] of a device's part of a batch, not augmented."""
        raise NotImplementedError(f"{type(self).__name__} predicts no classes")

    def probabilities(self, logits: jax.Array) -> jax.Array:
        """Probabilities [b, h, w, d] of the logits of `predict`."""
        raise NotImplementedError(f"{type(self).__name__} predicts no classes")

    def count(self, variables: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Integer counts [b, ...] to sum over slices, and predicted classes [b, h, w]."""
        raise NotImplementedError(f"{type(self).__name__} is not validated")

    def scores(self, counts: np.ndarray) -> dict[str, float]:
        """Metrics from the sum of `count`'s integers over all slices."""
        raise NotImplementedError(f"{type(self).__name__} is not validated")

    def init(self) -> dict[str, Any]:
        """Fresh variables {'params', 'batch_stats'} of NumPy arrays, a function of config.seed."""
        return init_variables(self._model, self._config.seed, *_example_inputs(self._config))

    def apply(self, params: Any, batch_stats: Any, batch: Batch) -> tuple[Any, Any]:
        """The network's outputs of an augmented batch, and its new running statistics."""
        inputs = tuple(batch[field] for field in ("image", "keypoints", "keypoint_mask"))
        parts = self._config.num_microbatches
        return apply_training(self._model, params, batch_stats, inputs, num_microbatches=parts)

    def first_seen(self, batch: Batch) -> dict[str, np.ndarray]:
        """The batch's first sample as training sees it, without the axis of samples."""
        first = jax.device_put({field: values[:1] for field, values in batch.items()})
        seen = jax.device_get(self._jitted_augment(first))
        return {field: values[0] for field, values in seen.items()}

    @abc.abstractmethod
    def picture(self, batch: Batch) -> dict[str, np.ndarray]:
        """The batch's first sample as training sees it: name -> uint8 [h, w, 3]."""
