"""Keypoint matching by optimal transport: masked log-domain Sinkhorn, and the local loss.

The problem between m and n keypoints of two slices is augmented by one more row and column, the
dustbins, at the last index, which receive keypoints without a counterpart. (Sarlin et al., CVPR
2020, section 3.2; docs/method.md 6.)
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Stands for log(0): far below any score, yet finite, so that no gradient is NaN.
_LOG_ZERO = -1e30


def log_optimal_transport(
    scores: Float[Array, "b m n"],
    mask_1: Bool[Array, "b m"],
    mask_2: Bool[Array, "b n"],
    dustbin_score: Float[Array, ""],
    *,
    num_iterations: int = 100,
) -> Float[Array, "b m+1 n+1"]:
    """Solves the partial assignment between two keypoint sets by Sinkhorn iterations.

    Each real keypoint has mass 1 and each dustbin the number of real keypoints of the other side.
    Padding has no effect: the result at real places equals the unpadded problem's. The iterations'
    [m, n] tables are not stored: the backward pass recomputes them from the potentials.

    Args:
      scores: of every pair of keypoints.
      mask_1: true for real keypoints of the first slice.
      mask_2: true for real keypoints of the second slice.
      dustbin_score: the score of every dustbin entry.
      num_iterations: Sinkhorn iterations.

    Returns:
      The log assignment, `log P` with rows of real keypoints summing to 1 (up to convergence);
      about -1e30 at padding.
    """
    dtype = jnp.promote_types(scores.dtype, jnp.float32)
    row_mass, row_mask = _marginal(mask_1, mask_2, dtype)
    column_mass, column_mask = _marginal(mask_2, mask_1, dtype)
    table = jnp.pad(scores.astype(dtype), ((0, 0), (0, 1), (0, 1)))
    dustbin = jnp.zeros(table.shape[1:], bool).at[-1, :].set(True).at[:, -1].set(True)
    table = jnp.where(dustbin, dustbin_score.astype(dtype), table)
    table = jnp.where(row_mask[:, :, None] & column_mask[:, None, :], table, _LOG_ZERO)

    @jax.checkpoint
    def iterate(potentials: tuple[jax.Array, jax.Array], _: None) -> tuple:
        u, v = potentials
        u = row_mass - jax.nn.logsumexp(table + v[:, None, :], axis=2)
        u = jnp.where(row_mask, u, 0.0)
        v = column_mass - jax.nn.logsumexp(table + u[:, :, None], axis=1)
        v = jnp.where(column_mask, v, 0.0)
        return (u, v), None

    start = (jnp.zeros_like(row_mass), jnp.zeros_like(column_mass))
    (u, v), _ = jax.lax.scan(iterate, start, None, length=num_iterations)
    return table + u[:, :, None] + v[:, None, :]


def _marginal(mask: jax.Array, other: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Log mass of each keypoint and of the dustbin [b, k + 1], and the mask of non-zero masses."""
    num_other = jnp.sum(other, axis=1, keepdims=True)
    mass = jnp.concatenate([mask.astype(dtype), num_other.astype(dtype)], axis=1)
    return jnp.log(jnp.maximum(mass, 1.0)), mass > 0


def matching_loss(
    log_assignment: Float[Array, "b rows columns"],
    correspondence: Int[Array, "b m"],
    mask_1: Bool[Array, "b m"],
    mask_2: Bool[Array, "b n"],
    *,
    matched_weight: float = 0.45,
    unmatched_weight: float = 1.0,
) -> Float[Array, " b"]:
    """The local loss of each pair of slices (docs/method.md section 6).

    `-log P` clamped to [0, 100]: 0.45 times its mean over corresponding keypoints, plus 1.0 times
    its mean over the unmatched keypoints of both slices at their dustbin. A term without keypoints
    is 0. A correspondence with a masked end is ignored.

    Args:
      log_assignment: [b, m + 1, n + 1], from `log_optimal_transport`.
      correspondence: the index of the second slice's keypoint or -1. At most one keypoint of the
        first slice may match a keypoint of the second.
      mask_1: true for real keypoints of the first slice.
      mask_2: true for real keypoints of the second slice.
      matched_weight: weight of the corresponding keypoints.
      unmatched_weight: weight of the unmatched keypoints.
    """
    cost = jnp.clip(-log_assignment, 0.0, 100.0)
    num_2 = mask_2.shape[1]
    # Index -1 reads the last place; the first condition discards the result.
    real_end = jnp.take_along_axis(mask_2, correspondence, axis=1)
    matched_1 = mask_1 & (correspondence >= 0) & real_end
    # A match of padding is written past the last place and cut off.
    target = jnp.where(matched_1, correspondence, num_2)
    matched_2 = jax.vmap(lambda t: jnp.zeros(num_2 + 1, bool).at[t].set(True)[:-1])(target)

    matched_cost = jnp.take_along_axis(cost[:, :-1], target[:, :, None], axis=2)[:, :, 0]
    unmatched_cost = jnp.concatenate([cost[:, :-1, -1], cost[:, -1, :-1]], axis=1)
    unmatched = jnp.concatenate([mask_1 & ~matched_1, mask_2 & ~matched_2], axis=1)
    matched_mean = _mean(matched_cost, matched_1)
    return matched_weight * matched_mean + unmatched_weight * _mean(unmatched_cost, unmatched)


def _mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of the real values of each row; 0 for a row without any."""
    return jnp.sum(values, axis=1, where=mask) / jnp.maximum(jnp.sum(mask, axis=1), 1)
