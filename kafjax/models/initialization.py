"""Initial variables of a network, drawn on the host.

Compiling the hundreds of random draws of `model.init` takes longer than a short run's training, and
their last digits differ between platforms. NumPy's generators avoid both. The distributions are
those that the modules pass to Flax (`kafjax.models.layers`, `kafjax.models.swin`).
"""

import math
import zlib
from collections.abc import Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kafjax.models.layers import he_stddev, linear_bound
from kafjax.models.swin import SMALL_STDDEV


def init_variables(
    model: nn.Module, seed: int, image: Any, keypoints: Any, keypoint_mask: Any
) -> dict[str, Any]:
    """Draws a network's variables.

    A variable's values depend only on the seed, its name and its shape, so shared parts of two
    networks start equal.

    Args:
      model: from `build_model`.
      seed: not negative.
      image: the model's input, used only for its shape and type; an array or a
        `jax.ShapeDtypeStruct`, such as from `example_inputs`.
      keypoints: likewise.
      keypoint_mask: likewise.

    Returns:
      {'params', 'batch_stats'} of NumPy arrays, identical for a seed on every platform.
      'batch_stats' is empty for a network without batch norm.
    """
    leaves = flax.traverse_util.flatten_dict(
        variable_shapes(model, image, keypoints, keypoint_mask), sep="/"
    )
    variables = {path: _draw(seed, path, leaves) for path in leaves}
    return {"batch_stats": {}, **flax.traverse_util.unflatten_dict(variables, sep="/")}


def variable_shapes(
    model: nn.Module, image: Any, keypoints: Any, keypoint_mask: Any
) -> dict[str, Any]:
    """Shapes and types of a network's variables: `init_variables` with `jax.ShapeDtypeStruct`s."""
    inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (image, keypoints, keypoint_mask)]

    def init(*arrays: jax.Array) -> Any:
        return model.init(jax.random.key(0), *arrays, train=False)

    return jax.eval_shape(init, *inputs)


def example_inputs(head: str, num_channels: int = 1) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The smallest image, keypoints and mask for a network with this `config.model.head`.

    Sufficient for `init_variables` and `variable_shapes`: the variables' shapes depend neither on
    the image size nor on the number of keypoints.
    """
    views = () if head == "segmentation" else (2,)
    return (
        jax.ShapeDtypeStruct((1, *views, 16, 16, num_channels), jnp.float32),
        jax.ShapeDtypeStruct((1, *views, 1, 2), jnp.int32),
        jax.ShapeDtypeStruct((1, *views, 1), jnp.bool_),
    )


def _draw(seed: int, path: str, leaves: Mapping[str, jax.ShapeDtypeStruct]) -> np.ndarray:
    shape, dtype = leaves[path].shape, leaves[path].dtype
    *_, module, name = path.split("/")
    generator = np.random.Generator(np.random.PCG64([seed, zlib.crc32(path.encode())]))
    if module == "dense":
        # [..., c, features]; a stack of attention layers has a leading axis.
        kernel = leaves[path.removesuffix(name) + "kernel"]
        bound = dtype.type(linear_bound(kernel.shape[-2]))
        return (2 * generator.random(shape, dtype) - 1) * bound
    if name == "position_bias" or (module == "small" and name == "kernel"):
        return generator.standard_normal(shape, dtype) * dtype.type(SMALL_STDDEV)
    if name == "kernel":
        counts_outputs = module.startswith("up_")
        fan_in = 4 * shape[-1] if counts_outputs else math.prod(shape[:-1])
        return generator.standard_normal(shape, dtype) * dtype.type(he_stddev(fan_in))
    constant = {"bias": 0, "mean": 0, "scale": 1, "var": 1, "dustbin_score": 1}
    return np.full(shape, constant[name], dtype)
