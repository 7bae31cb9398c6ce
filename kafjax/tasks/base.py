"""The base class of tasks, and what they share: random keys, transforms, the network in training.

A batch's fields have its samples as their first axis, [b, ...]. Methods that read data import the
reader when called: losses need no more than JAX and Flax.
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
from kafjax.intensity import IntensityConfig
from kafjax.models import build_model, example_inputs, init_variables, variable_shapes

if TYPE_CHECKING:
    import grain

    from kafjax.data.input_pipeline import BatchOptions, SliceDataset
    from kafjax.data.splits import Split

Batch = dict[str, Any]  # of NumPy arrays on the host, of JAX arrays in a step
Metrics = dict[str, jax.Array]

# The head of each task's network.
HEADS_OF_TASKS = {
    "pretrain": "pretraining",
    "local_contrast": "local_contrast",
    "segment": "segmentation",
}


def sample_keys(batch: Batch) -> jax.Array:
    """A random key for each sample, [b], which the run's seed and the sample's number decide.

    The seed comes with the batch, so that runs of other seeds share one compiled step.
    """
    root = jax.vmap(jax.random.key)(batch["seed"])
    return jax.vmap(jax.random.fold_in)(root, batch["sample"])


def make_transform(function: Callable[..., Any], config: Any) -> Callable[..., Any]:
    """`augment_view` or `augment_pair` as `config.augment` says."""
    transform = augment.AugmentConfig(**_ranges(config.augment.transform))
    fields = config.augment.get("intensity")  # which runs of older versions do not have
    changes = fields is not None and fields.probability > 0
    intensity = IntensityConfig(**_ranges(fields)) if changes else None
    mode = config.augment.keypoints
    return functools.partial(function, mode=mode, config=transform, intensity=intensity)


def _ranges(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a config with ranges as tuples, which a stored config has as lists."""
    return {n: tuple(v) if isinstance(v, Sequence) else v for n, v in fields.items()}


def make_model(config: Any, axis_name: str | None) -> nn.Module:
    """The run's network.

    Batch statistics go over the mapped axis if the config says so; of the pretraining heads there
    are those whose loss has a weight.
    """
    axis_name = axis_name if config.sync_batch_norm else None
    head = HEADS_OF_TASKS[config.task]
    if head != "pretraining":
        return build_model(config.model, head=head, axis_name=axis_name)
    heads = tuple(name for name, weight in config.loss.weights.items() if weight)
    return build_model(config.model, head=head, axis_name=axis_name, heads=heads)


def network_shapes(config: Any) -> dict[str, Any]:
    """Shapes and types of the variables of the run's network (`variable_shapes`)."""
    return variable_shapes(make_model(config, None), *example_inputs(HEADS_OF_TASKS[config.task]))


def apply_training(
    model: nn.Module,
    params: Any,
    batch_stats: Any,
    inputs: tuple[jax.Array, ...],
    *,
    num_microbatches: int = 1,
) -> tuple[Any, Any]:
    """The network's outputs in training, and its new running statistics.

    With several microbatches only one's activations are in memory at a time: each is computed again
    in the backward pass. Outputs, and thereby losses over the whole batch and their gradients, are
    those of the whole batch, except that batch norm sees a microbatch at a time; the running
    statistics become the mean of what each microbatch would have made of them.

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
    """What a run learns: its batches, its network and loss, and how it is scored and shown.

    A subclass is chosen by its name in `kafjax.tasks.TASKS`. All state is in arguments, so that
    `loss`, `predict` and `count` can be traced on any device.

    Args:
      config: the run's config.
      axis_name: the mapped axis over which a batch is spread, if any.

    Attributes:
      frozen: modules of the network that are not trained.
      best_metric: the metric whose best checkpoint is kept, and
      best_mode: whether its largest or smallest value is best.

    Raises:
      ValueError: a field of the config has no such value.
    """

    frozen: ClassVar[tuple[str, ...]] = ()
    best_metric: ClassVar[str] = "loss"
    best_mode: ClassVar[Literal["max", "min"]] = "min"

    def __init__(self, config: Any, *, axis_name: str | None = None):
        self._config = config
        self._axis_name = axis_name
        self._model = make_model(config, axis_name)
        self._jitted_augment = jax.jit(self.augment)

    @property
    def patch(self) -> dict[str, Any]:
        """The size of a patch, and its places for keypoints, as `make_pair` takes them."""
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
        """Transforms every sample, by keys that only seed and sample decide."""

    @abc.abstractmethod
    def loss(
        self, params: Any, batch_stats: Any, batch: Batch
    ) -> tuple[jax.Array, tuple[Metrics, Any]]:
        """(loss, (metrics, new running statistics)) of a device's part of a batch."""

    def predict(self, variables: Any, batch: Batch) -> jax.Array:
        """Logits [b, h, w, d] of a device's part of a batch, not augmented."""
        raise NotImplementedError(f"{type(self).__name__} predicts no classes")

    def count(self, variables: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Integers [b, ...] that add up over slices, and predicted classes [b, h, w]."""
        raise NotImplementedError(f"{type(self).__name__} is not validated")

    def scores(self, counts: np.ndarray) -> dict[str, float]:
        """Metrics of the sum of `count`'s integers over all slices."""
        raise NotImplementedError(f"{type(self).__name__} is not validated")

    def init(self) -> dict[str, Any]:
        """Fresh variables {'params', 'batch_stats'} of NumPy arrays, a function of config.seed."""
        inputs = example_inputs(HEADS_OF_TASKS[self._config.task])
        return init_variables(self._model, self._config.seed, *inputs)

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
