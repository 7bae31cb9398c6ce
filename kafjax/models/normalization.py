"""Batch normalisation in training, with its activation and one gradient for both.

Differentiated piece by piece, mean, variance and activation take a dozen passes over the maps,
and as many programs to compile. The whole gradient takes two sums and one pass (Ioffe and Szegedy,
ICML 2015).
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# A standard deviation within this many roundings of the mean counts as 0: all entries are equal.
_ALL_THE_SAME = 64
# Entries that are summed one after the other before the sums are added.
_GROUP = 16


class Rule(NamedTuple):
    """How to normalise; see `kafjax.models.layers.BatchNorm`.

    Attributes:
      axis_name: the mapped axis whose devices share statistics, if any.
      epsilon: added to the variance.
      fewest: minimum real entries for batch statistics; with fewer the given ones are used.
      leak: slope of a leaky ReLU that follows, None without.
    """

    axis_name: str | None
    epsilon: float
    fewest: int = 1
    leak: float | None = None


class Normalized(NamedTuple):
    """The result, its mean and variance, and the number of real entries."""

    y: Float[Array, "*b c"]
    mean: Float[Array, " c"]
    var: Float[Array, " c"]
    number: Float[Array, ""]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def batch_normalize(
    rule: Rule,
    x: Float[Array, "*b c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    mean: Float[Array, " c"],
    var: Float[Array, " c"],
    mask: Bool[Array, "*b"] | None,
) -> Normalized:
    """Normalises by the statistics of the real entries, multiplies by scale and adds bias.

    Args:
      rule: how.
      x: in the type of the statistics.
      scale: of each channel.
      bias: likewise.
      mean: of each channel, for batches with too few real entries.
      var: likewise.
      mask: the real entries; None if all are. In masked sets a channel whose real entries are all
        equal becomes its bias and has no gradient.

    Returns:
      Mean, variance and number have no gradient.
    """
    batch_mean, batch_var, count = _statistics(rule, x, mask)
    enough = count >= rule.fewest
    mean, var = jnp.where(enough, batch_mean, mean), jnp.where(enough, batch_var, var)
    y = normalize_by(rule, x, scale, bias, mean, var, mask)
    return Normalized(y, mean, var, count)


def _forward(
    rule: Rule, x: jax.Array, scale: jax.Array, bias: jax.Array, *rest: Any
) -> tuple[Normalized, tuple[Any, ...]]:
    result = batch_normalize(rule, x, scale, bias, *rest)
    return result, (x, scale, bias, *result[1:], rest[-1])


def _backward(rule: Rule, kept: tuple[Any, ...], gradient: Normalized) -> tuple[Any, ...]:
    x, scale, bias, mean, var, count, mask = kept
    g = gradient.y
    if rule.leak is not None:
        g = _leak(rule, _before_activation(rule, x, scale, bias, mean, var, mask), g)
    rate = jax.lax.rsqrt(var + rule.epsilon)
    centered = x - mean
    total = sum_entries(g)
    of_rate = sum_entries(g * centered)
    if mask is None:
        varies, shares = jnp.ones((), bool), 1 / count
    else:
        varies = ~_same(mean, var)
        real = jnp.where(count >= rule.fewest, mask, False)[..., None]
        shares = jnp.where(real, 1 / jnp.maximum(count, 1), 0)
    through_mean = _global_sum(rule, total)
    through_var = jnp.square(rate) * _global_sum(rule, of_rate)
    slope = jnp.where(varies, scale * rate, 0)
    dx = slope * (g - shares * (through_mean + centered * through_var))
    d_scale = jnp.where(varies, rate * of_rate, 0)
    return dx, d_scale, total, jnp.zeros_like(mean), jnp.zeros_like(var), None


batch_normalize.defvjp(_forward, _backward)


def _statistics(
    rule: Rule, x: jax.Array, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean, biased variance and number of the real entries of all devices."""
    number = math.prod(x.shape[:-1]) if mask is None else jnp.sum(mask)
    count = _global_sum(rule, jnp.asarray(number, x.dtype))
    divisor = jnp.maximum(count, 1)
    mean = _global_sum(rule, sum_entries(x, mask)) / divisor
    var = _global_sum(rule, sum_entries(jnp.square(x - mean), mask)) / divisor
    return mean, var, count


def sum_entries(
    x: Float[Array, "*b c"], mask: Bool[Array, "*b"] | None = None
) -> Float[Array, " c"]:
    """The sum of the real entries, by default all, in a form that suits CPUs.

    There, XLA would sum windows of 32 along each axis, entry by entry, after storing x. Sums of 16
    neighbours are computed along with x, in the lanes of a register; a product with ones adds them.
    """
    if mask is not None:
        x = jnp.where(mask[..., None], x, 0)
    return jax.lax.platform_dependent(x, cpu=_sum_by_products, default=_sum_all)


def _sum_by_products(x: jax.Array) -> jax.Array:
    x = x.reshape(-1, x.shape[-1])
    while len(x) % _GROUP == 0 and len(x) > _GROUP**2:
        x = jnp.sum(x.reshape(-1, _GROUP, x.shape[-1]), axis=1)
    return jnp.ones(len(x), x.dtype) @ x


def _sum_all(x: jax.Array) -> jax.Array:
    return jnp.sum(x, tuple(range(x.ndim - 1)))


def normalize_by(
    rule: Rule,
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    mask: jax.Array | None = None,
) -> jax.Array:
    """`batch_normalize` by given statistics."""
    y = _before_activation(rule, x, scale, bias, mean, var, mask)
    return _leak(rule, y, y)


def _before_activation(
    rule: Rule,
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    mask: jax.Array | None,
) -> jax.Array:
    y = (x - mean) * (scale * jax.lax.rsqrt(var + rule.epsilon)) + bias
    return y if mask is None else jnp.where(_same(mean, var), bias, y)


def _same(mean: jax.Array, var: jax.Array) -> jax.Array:
    """Channels whose entries differ by rounding alone."""
    return var <= jnp.square(_ALL_THE_SAME * jnp.finfo(mean.dtype).eps * mean)


def _leak(rule: Rule, y: jax.Array, values: jax.Array) -> jax.Array:
    """The values times the slope of the activation at y."""
    return values if rule.leak is None else jnp.where(y >= 0, values, rule.leak * values)


def _global_sum(rule: Rule, x: jax.Array) -> jax.Array:
    if rule.axis_name is None:
        return x
    # A sum over one device is skipped: XLA would keep it, and not fuse the code around it.
    return jax.lax.psum(x, rule.axis_name) if jax.lax.axis_size(rule.axis_name) > 1 else x
