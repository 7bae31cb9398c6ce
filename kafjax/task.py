"""What the two tasks share: random keys of samples, their transform, and the network in training.

A batch's fields have its samples as their first axis, [b, ...].
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kafjax import augment
from kafjax.models import build_model


def sample_keys(batch: dict[str, jax.Array]) -> jax.Array:
    """A random key for each sample, [b], which the run's seed and the sample's number decide.

    The seed comes with the batch, so that runs of other seeds share one compiled step.
    """
    root = jax.vmap(jax.random.key)(batch["seed"])
    return jax.vmap(jax.random.fold_in)(root, batch["sample"])


def make_transform(function: Callable[..., Any], config: Any) -> Callable[..., Any]:
    """`augment_view` or `augment_pair` as `config.augment` says."""
    transform = augment.AugmentConfig(**config.augment.transform)
    return functools.partial(function, mode=config.augment.keypoints, config=transform)


def make_model(config: Any, axis_name: str | None) -> nn.Module:
    """The run's network.

    Batch statistics go over the mapped axis if the config says so; of the pretraining heads there
    are those whose loss has a weight.
    """
    axis_name = axis_name if config.sync_batch_norm else None
    if config.model.head != "pretraining":
        return build_model(config.model, axis_name=axis_name)
    heads = tuple(name for name, weight in config.loss.weights.items() if weight)
    return build_model(config.model, axis_name=axis_name, heads=heads)


def draw_first_pair(
    augment: Callable[[dict[str, Any]], dict[str, Any]], batch: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """A batch's first pair of views after a task's `augment`: 'pair' -> uint8 [h, w, 3]."""
    from kafjax.drawing import draw_pair  # matplotlib is needed for nothing else here

    first = {field: jnp.asarray(values[:1]) for field, values in batch.items()}
    view = {field: np.asarray(x[0]) for field, x in augment(first).items()}
    image, keypoints, mask = view["image"][..., 0], view["keypoints"], view["keypoint_mask"]
    drawn = draw_pair(
        image[0], image[1], keypoints[0], mask[0], keypoints[1], mask[1], view["correspondence"]
    )
    return {"pair": drawn}


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
        return output, updated["batch_stats"]

    size = inputs[0].shape[0]
    if size % num_microbatches:
        raise ValueError(
            f"config.num_microbatches is {num_microbatches}, "
            f"expected a divisor of the {size} samples of each device"
        )
    if num_microbatches == 1:
        return apply(inputs)
    parts = jax.tree.map(lambda x: x.reshape(num_microbatches, -1, *x.shape[1:]), inputs)
    outputs, statistics = jax.lax.map(jax.checkpoint(apply), parts)
    outputs = jax.tree.map(lambda x: x.reshape(size, *x.shape[2:]), outputs)
    return outputs, jax.tree.map(lambda x: jnp.mean(x, axis=0), statistics)
