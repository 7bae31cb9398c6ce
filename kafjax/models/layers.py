"""The parts that every network is built of. Images are [b, h, w, c], keypoint sets [b, k, c].

Every module takes `dtype`, the type it computes in; parameters, running statistics and sums over
batches stay at least float32. Convolutions start He-normal with zero biases, linear maps uniform in
+-1/sqrt(fan in) as in the authors' release (docs/method.md section 5).
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kafjax.models.convolution import conv3x3

LEAKY_SLOPE = 0.01
# Roundings of the mean that a channel's standard deviation is within if its entries are the same.
_ALL_THE_SAME = 64


def he_stddev(fan_in: int) -> float:
    """Standard deviation of a convolution's initial weights: He et al. 2015 for leaky ReLU."""
    return math.sqrt(2 / (1 + LEAKY_SLOPE**2) / fan_in)


def linear_bound(fan_in: int) -> float:
    """Bound of a linear map's uniform initial weights and biases."""
    return 1 / math.sqrt(fan_in)


def he_normal(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Initialiser of a convolution's kernel [rows, columns, c, features]."""
    return he_stddev(math.prod(shape[:-1])) * jax.random.normal(key, shape, dtype)


def parameter_dtype(dtype: Any) -> jnp.dtype:
    """The type of the parameters of a module that computes in `dtype`: float32 or wider."""
    return jnp.promote_types(dtype, jnp.float32)


def linear_uniform(fan_in: int) -> Callable[..., jax.Array]:
    """Initialiser of a linear map's kernel and bias."""
    bound = linear_bound(fan_in)

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Linear(nn.Module):
    """Linear map of the last axis: [..., c] -> [..., features]."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., c] to [..., features]."""
        init = linear_uniform(x.shape[-1])
        return nn.Dense(
            self.features,
            dtype=self.dtype,
            param_dtype=parameter_dtype(self.dtype),
            kernel_init=init,
            bias_init=init,
            name="dense",
        )(x)


def _convolve(x: jax.Array, kernel: jax.Array, *_: Any, **__: Any) -> jax.Array:
    """What `nn.Conv` calls for its product: a 3x3 or 1x1 kernel, stride 1, zero padding."""
    assert kernel.shape[:2] in ((1, 1), (3, 3))
    return conv3x3(x, kernel) if kernel.shape[0] == 3 else x @ kernel[0, 0]


class Conv(nn.Module):
    """Convolution, 1x1 or 3x3, that keeps the size: [b, h, w, c] -> [b, h, w, features]."""

    features: int
    kernel_size: int = 3
    use_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, h, w, c] to [b, h, w, features]."""
        return nn.Conv(
            self.features,
            (self.kernel_size, self.kernel_size),
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=parameter_dtype(self.dtype),
            kernel_init=he_normal,
            conv_general_dilated=_convolve,
            name="conv",
        )(x)


class UpConv(nn.Module):
    """Transposed convolution 2x2 of stride 2: [b, h, w, c] -> [b, 2h, 2w, features].

    With stride and kernel alike no two inputs meet: the output at (2r + i, 2c + j) is the input at
    (r, c) times kernel[i, j]. A matrix product for each i gives whole rows, in place.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, h, w, c] to [b, 2h, 2w, features]."""
        b, h, w, c = x.shape
        param_dtype = parameter_dtype(self.dtype)
        # The release's fan-in of a transposed convolution counts its outputs: 4 x features.
        stddev = he_stddev(4 * self.features)
        shape = (2, 2, c, self.features)
        kernel = self.param("kernel", nn.initializers.normal(stddev), shape, param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), param_dtype)
        x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias))
        up = jnp.stack([jnp.einsum("bhwc,jcd->bhwjd", x, kernel[i]) for i in range(2)], axis=2)
        return up.reshape(b, 2 * h, 2 * w, self.features) + bias


class BatchNorm(nn.Module):
    """Batch normalisation over the real entries of the whole global batch.

    Differs from `flax.linen.BatchNorm` in three ways that the release's numbers depend on: masked
    entries count nowhere, also when devices hold different numbers of real ones; the running
    variance takes the unbiased variance; a batch without a real entry leaves the running
    statistics as they were.

    And in one that only rounding tells: of masked sets, a channel whose real entries are all the
    same becomes its bias and gives no gradient, as where all keypoints lie at one pixel. Rounding,
    divided by sqrt(epsilon) in one layer after the other, would end in gradients of any size where
    the exact ones are 0.

    Attributes:
      axis_name: the mapped axis whose devices share statistics, or None for each on its own.
      momentum: the share of the running statistics that a step keeps.
      epsilon: added to the variance.
      dtype: of the output; statistics are at least float32.
      fewest: real entries that have statistics; fewer are normalised by the running ones, which
        they leave as they were.
    """

    axis_name: str | None = None
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    fewest: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Normalises x [..., c] by channel; `mask` [...] says which entries are real."""
        dtype = parameter_dtype(self.dtype)
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape, dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, dtype)
        mean, var = running_mean.value, running_var.value
        if train:
            batch_mean, batch_var, count = self._batch_statistics(x.astype(dtype), mask)
            enough = count >= self.fewest
            mean, var = jnp.where(enough, batch_mean, mean), jnp.where(enough, batch_var, var)
            if not self.is_initializing():
                # A batch of one entry has no unbiased variance; PyTorch refuses it, we keep var.
                unbiased = var * (count / jnp.maximum(count - 1, 1))
                step = jnp.where(enough, 1 - self.momentum, 0.0).astype(dtype)
                running_mean.value += step * (mean - running_mean.value)
                running_var.value += step * (unbiased - running_var.value)
        slope = scale * jax.lax.rsqrt(var + self.epsilon)
        y = (x.astype(dtype) - mean) * slope + bias
        if train and mask is not None:
            rounding = _ALL_THE_SAME * jnp.finfo(dtype).eps * mean
            y = jnp.where(var <= jnp.square(rounding), bias, y)
        return y.astype(self.dtype)

    def _batch_statistics(
        self, x: jax.Array, mask: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        axes = tuple(range(x.ndim - 1))
        where = None if mask is None else mask[..., None]
        total = math.prod(x.shape[:-1]) if mask is None else jnp.sum(mask)
        count = self._global_sum(jnp.asarray(total, x.dtype))
        divisor = jnp.maximum(count, 1)
        mean = self._global_sum(jnp.sum(x, axes, where=where)) / divisor
        var = self._global_sum(jnp.sum(jnp.square(x - mean), axes, where=where)) / divisor
        return mean, var, count

    def _global_sum(self, x: jax.Array) -> jax.Array:
        if self.axis_name is None or self.is_initializing():
            return x
        # A sum over one device is left out: XLA keeps it, and computes apart what lies around it.
        return jax.lax.psum(x, self.axis_name) if jax.lax.axis_size(self.axis_name) > 1 else x


class SampleNorm(nn.Module):
    """Normalises each sample of maps [b, h, w, c] by itself, the same in training and use.

    Attributes:
      group_size: channels that share mean and variance: 1 is instance norm (Ulyanov et al. 2016),
        more is group norm (Wu and He, ECCV 2018). Where it does not divide c, its greatest divisor
        in common with c is taken.
      epsilon: added to the variance.
      dtype: of the output; statistics are at least float32.
    """

    group_size: int
    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises x [b, h, w, c]."""
        dtype = parameter_dtype(self.dtype)
        c = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (c,), dtype)
        bias = self.param("bias", nn.initializers.zeros, (c,), dtype)
        size = math.gcd(c, self.group_size)
        # Sums over pixels first: they are large, and what is left of them is small.
        x = x.astype(dtype)
        mean = _mean_of_groups(jnp.mean(x, axis=(1, 2)), size)
        x = x - mean[:, None, None]
        var = _mean_of_groups(jnp.mean(jnp.square(x), axis=(1, 2)), size)
        slope = scale * jax.lax.rsqrt(var + self.epsilon)
        return (x * slope[:, None, None] + bias).astype(self.dtype)


def _mean_of_groups(x: jax.Array, size: int) -> jax.Array:
    """Each of [b, c] replaced by the mean of its group of `size` neighbouring channels."""
    b, c = x.shape
    means = jnp.mean(x.reshape(b, c // size, size), axis=-1)
    return jnp.repeat(means, size, axis=-1)


NORMS = ("batch", "instance", "group")
_GROUP_SIZE = 16  # channels; the best of Wu and He's table 3


def normalize(
    x: jax.Array, norm: str, *, train: bool, axis_name: str | None, dtype: Any, name: str
) -> jax.Array:
    """Normalises maps [b, h, w, c] by one of `NORMS`, inside a compact module, under `name`."""
    if norm == "batch":
        return BatchNorm(axis_name, dtype=dtype, name=name)(x, train=train)
    size = 1 if norm == "instance" else _GROUP_SIZE
    return SampleNorm(size, dtype=dtype, name=name)(x)


class ConvBlock(nn.Module):
    """Block(c) of docs/method.md section 5: twice [3x3 convolution, norm, leaky ReLU]."""

    features: int
    axis_name: str | None = None
    dtype: Any = jnp.float32
    norm: str = "batch"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps [b, h, w, c] to [b, h, w, features]."""
        common = {"train": train, "axis_name": self.axis_name, "dtype": self.dtype}
        for i in (1, 2):
            x = Conv(self.features, dtype=self.dtype, name=f"conv_{i}")(x)
            x = normalize(x, self.norm, name=f"norm_{i}", **common)
            x = nn.leaky_relu(x, LEAKY_SLOPE)
        return x


def max_pool(x: jax.Array) -> jax.Array:
    """2x2 max pooling: [b, h, w, c] -> [b, h/2, w/2, c]; of equals the first has the gradient.

    As `nn.max_pool`, whose gradient looks for each window's largest in a slow way on CPU.
    """
    b, h, w, c = x.shape
    x = x.reshape(b, h // 2, 2, w // 2, 2, c)
    x = _first_larger(x[:, :, :, :, 0], x[:, :, :, :, 1])
    return _first_larger(x[:, :, 0], x[:, :, 1])


def _first_larger(a: jax.Array, b: jax.Array) -> jax.Array:
    """The larger of each pair, all gradient to it, and to `a` among equals; NaN if either is."""
    return jnp.where((a >= b) | jnp.isnan(a), a, b)
