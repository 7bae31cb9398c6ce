"""Building blocks of all networks.

Every module takes `dtype`, the type of its computation; parameters, running statistics and sums
over batches are at least float32. Convolutions start He-normal with zero biases, linear maps
uniform in +-1/sqrt(fan in) as in the authors' release (docs/method.md section 5).
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kafjax.models.convolution import conv3x3
from kafjax.models.normalization import Rule, batch_normalize, normalize_by

LEAKY_SLOPE = 0.01


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
    """Linear map of the last axis."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... {self.features}"]:
        """Applies the map."""
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
    """The convolution that `nn.Conv` calls: a 3x3 or 1x1 kernel, stride 1, zero padding."""
    assert kernel.shape[:2] in ((1, 1), (3, 3))
    return conv3x3(x, kernel) if kernel.shape[0] == 3 else x @ kernel[0, 0]


class Conv(nn.Module):
    """Convolution, 1x1 or 3x3, that keeps the size."""

    features: int
    kernel_size: int = 3
    use_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w {self.features}"]:
        """Applies the convolution."""
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
    """Transposed convolution 2x2 of stride 2.

    Since stride and kernel size are equal, outputs do not overlap: the output at (2r + i, 2c + j)
    is the input at (r, c) times kernel[i, j]. One matrix product for each i gives whole rows.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w {self.features}"]:
        """Applies the transposed convolution."""
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
    entries never count, even if devices hold different numbers of real ones; the running variance
    uses the unbiased variance; a batch without a real entry leaves the running statistics
    unchanged.

    And in one that matters only for rounding: in masked sets, a channel whose real entries are all
    equal, as when all keypoints are at one pixel, becomes its bias and has no gradient. Otherwise
    rounding errors, divided by sqrt(epsilon) layer after layer, would produce arbitrary gradients
    where the exact ones are 0.

    Attributes:
      axis_name: the mapped axis whose devices share statistics, or None for separate statistics.
      momentum: fraction of the running statistics that a step keeps.
      epsilon: added to the variance.
      dtype: of the output; statistics are at least float32.
      fewest: minimum real entries for batch statistics; fewer are normalised by the running
        statistics and do not update them.
      leak: slope of a leaky ReLU that follows; None without.
    """

    axis_name: str | None = None
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    fewest: int = 1
    leak: float | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "*b c"], *, train: bool, mask: Bool[Array, "*b"] | None = None
    ) -> Float[Array, "*b c"]:
        """Normalises x by channel; `mask` marks the real entries."""
        dtype = parameter_dtype(self.dtype)
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape, dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, dtype)
        mean, var = running_mean.value, running_var.value
        x = x.astype(dtype)
        axis_name = None if self.is_initializing() else self.axis_name
        rule = Rule(axis_name, self.epsilon, self.fewest, self.leak)
        if not train:
            return normalize_by(rule, x, scale, bias, mean, var).astype(self.dtype)
        found = batch_normalize(rule, x, scale, bias, mean, var, mask)
        if not self.is_initializing():
            # A batch of one entry has no unbiased variance; PyTorch raises, we keep var.
            unbiased = found.var * (found.number / jnp.maximum(found.number - 1, 1))
            enough = found.number >= self.fewest
            step = jnp.where(enough, 1 - self.momentum, 0.0).astype(dtype)
            running_mean.value += step * (found.mean - mean)
            running_var.value += step * (unbiased - var)
        return found.y.astype(self.dtype)


class SampleNorm(nn.Module):
    """Normalises each sample of feature maps separately, in training and inference alike.

    Attributes:
      group_size: channels that share mean and variance: 1 is instance norm (Ulyanov et al. 2016),
        more is group norm (Wu and He, ECCV 2018). If it does not divide c, their greatest common
        divisor is used.
      epsilon: added to the variance.
      dtype: of the output; statistics are at least float32.
    """

    group_size: int
    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Normalises x."""
        dtype = parameter_dtype(self.dtype)
        c = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (c,), dtype)
        bias = self.param("bias", nn.initializers.zeros, (c,), dtype)
        size = math.gcd(c, self.group_size)
        # Sum over pixels first: that reduces the large axes, the rest is small.
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
    x: Float[Array, "b h w c"],
    norm: str,
    *,
    train: bool,
    axis_name: str | None,
    dtype: Any,
    name: str,
    leak: float | None = None,
) -> Float[Array, "b h w c"]:
    """Normalises feature maps by one of `NORMS`, inside a compact module, under `name`.

    A leaky ReLU of the slope `leak` follows, if any.
    """
    if norm == "batch":
        return BatchNorm(axis_name, dtype=dtype, leak=leak, name=name)(x, train=train)
    size = 1 if norm == "instance" else _GROUP_SIZE
    x = SampleNorm(size, dtype=dtype, name=name)(x)
    return x if leak is None else nn.leaky_relu(x, leak)


class ConvBlock(nn.Module):
    """Block(c) of docs/method.md section 5: twice [3x3 convolution, norm, leaky ReLU]."""

    features: int
    axis_name: str | None = None
    dtype: Any = jnp.float32
    norm: str = "batch"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool
    ) -> Float[Array, "b h w {self.features}"]:
        """Applies the block."""
        common: dict[str, Any] = {"train": train, "axis_name": self.axis_name, "dtype": self.dtype}
        for i in (1, 2):
            x = Conv(self.features, dtype=self.dtype, name=f"conv_{i}")(x)
            x = normalize(x, self.norm, leak=LEAKY_SLOPE, name=f"norm_{i}", **common)
        return x


def max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h//2 w//2 c"]:
    """2x2 max pooling; the first of equals gets the gradient.

    Equals `nn.max_pool`, whose gradient is slow on CPU.
    """
    b, h, w, c = x.shape
    x = x.reshape(b, h // 2, 2, w // 2, 2, c)
    x = _first_larger(x[:, :, :, :, 0], x[:, :, :, :, 1])
    return _first_larger(x[:, :, 0], x[:, :, 1])


def _first_larger(a: jax.Array, b: jax.Array) -> jax.Array:
    """The larger of each pair, which gets the gradient (`a` for equals); NaN if either is."""
    return jnp.where((a >= b) | jnp.isnan(a), a, b)
