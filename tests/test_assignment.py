"""Masked Sinkhorn and the local loss against loops, the unpadded problem and golden values."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from kafjax.assignment import log_optimal_transport, matching_loss
from tests.release_weights import GOLDEN


def loop_transport(scores: np.ndarray, dustbin: float, num_iterations: int) -> np.ndarray:
    """Sinkhorn for one pair without padding, with marginals that sum to 1, as in the paper."""
    m, n = scores.shape
    table = np.full((m + 1, n + 1), dustbin)
    table[:m, :n] = scores
    rows = np.log(np.append(np.ones(m), n) / (m + n))
    columns = np.log(np.append(np.ones(n), m) / (m + n))
    u, v = np.zeros(m + 1), np.zeros(n + 1)
    for _ in range(num_iterations):
        for i in range(m + 1):
            u[i] = rows[i] - logsumexp(table[i] + v)
        for j in range(n + 1):
            v[j] = columns[j] - logsumexp(table[:, j] + u)
    return table + u[:, None] + v[None, :] + np.log(m + n)


def loop_matching_loss(log_assignment: np.ndarray, correspondence: np.ndarray) -> float:
    """The local loss of one pair without padding."""
    m, n = (size - 1 for size in log_assignment.shape)
    matched, unmatched = [], []
    for i in range(m):
        if correspondence[i] >= 0:
            matched.append(log_assignment[i, correspondence[i]])
        else:
            unmatched.append(log_assignment[i, n])
    unmatched += [log_assignment[m, j] for j in range(n) if j not in correspondence]
    loss = 0.45 * np.mean(np.clip(-np.array(matched), 0, 100)) if matched else 0.0
    return loss + (np.mean(np.clip(-np.array(unmatched), 0, 100)) if unmatched else 0.0)


def padded_problem(sizes: list[tuple[int, int]], k: int = 9) -> tuple[Any, tuple[Any, Any]]:
    """Scores [b, k, k + 2] and masks whose real places are spread at random."""
    rng = np.random.default_rng(0)
    scores = 2 * rng.standard_normal((len(sizes), k, k + 2))
    mask_1, mask_2 = np.zeros((len(sizes), k), bool), np.zeros((len(sizes), k + 2), bool)
    for b, (m, n) in enumerate(sizes):
        mask_1[b, rng.permutation(k)[:m]] = True
        mask_2[b, rng.permutation(k + 2)[:n]] = True
    return scores, (mask_1, mask_2)


def real_part(table: Any, mask_1: np.ndarray, mask_2: np.ndarray) -> np.ndarray:
    """The unpadded [m + 1, n + 1] in a padded [k + 1, k' + 1]."""
    rows, columns = np.append(mask_1, True), np.append(mask_2, True)
    return np.asarray(table)[rows][:, columns]


def test_transport_is_the_releases() -> None:
    with np.load(GOLDEN / "losses.npz") as golden, jax.enable_x64(True):
        scores = jnp.asarray(golden["ot_scores"], jnp.float64)
        found = jax.jit(log_optimal_transport)(scores, *ones(2, 7, 5), jnp.ones(()))
        np.testing.assert_allclose(found, golden["ot_log_assignment"], rtol=1e-10, atol=1e-10)


def ones(b: int, m: int, n: int) -> tuple[Any, Any]:
    """Masks without padding."""
    return np.ones((b, m), bool), np.ones((b, n), bool)


SIZES = [(9, 11), (4, 7), (7, 2), (1, 1), (1, 11)]


def test_masked_transport_equals_a_loop_over_the_unpadded_problem() -> None:
    scores, masks = padded_problem(SIZES)
    with jax.enable_x64(True):
        solve = jax.jit(log_optimal_transport, static_argnames="num_iterations")
        found = solve(jnp.asarray(scores), *masks, jnp.asarray(0.7), num_iterations=20)
    for b in range(len(SIZES)):
        mask_1, mask_2 = masks[0][b], masks[1][b]
        expected = loop_transport(scores[b][mask_1][:, mask_2], 0.7, 20)
        np.testing.assert_allclose(real_part(found[b], mask_1, mask_2), expected, rtol=1e-9)
        assert (np.asarray(found[b])[~np.append(mask_1, True)] < -1e29).all()


def test_masked_gradients_equal_those_of_the_unpadded_problem() -> None:
    scores, masks = padded_problem([(4, 7)])
    mask_1, mask_2 = masks[0][0], masks[1][0]
    m, n = 4, 7
    weights = np.random.default_rng(1).standard_normal((m + 1, n + 1))

    def padded_loss(scores: jax.Array, dustbin: jax.Array) -> jax.Array:
        table = log_optimal_transport(scores, *masks, dustbin, num_iterations=20)[0]
        return jnp.sum(table[np.append(mask_1, True)][:, np.append(mask_2, True)] * weights)

    def loss(scores: jax.Array, dustbin: jax.Array) -> jax.Array:
        table = log_optimal_transport(scores, *ones(1, m, n), dustbin, num_iterations=20)
        return jnp.sum(table * weights)

    with jax.enable_x64(True):
        small = jnp.asarray(scores[0][mask_1][:, mask_2][None])
        dustbin = jnp.asarray(0.7)
        differentiate = [jax.jit(jax.grad(f, argnums=(0, 1))) for f in (padded_loss, loss)]
        in_padding, of_padded = differentiate[0](jnp.asarray(scores), dustbin)
        unpadded, of_unpadded = differentiate[1](small, dustbin)
        # One finite difference ties both to the loop above.
        step = 1e-6
        ends = [loop_transport(np.asarray(small[0]), 0.7 + s, 20) for s in (step, -step)]
        slope = np.sum((ends[0] - ends[1]) * weights) / (2 * step)
    np.testing.assert_allclose(in_padding[0][mask_1][:, mask_2], unpadded[0], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(of_padded, of_unpadded, rtol=1e-9)
    np.testing.assert_allclose(of_padded, slope, rtol=1e-6)
    inside = mask_1[:, None] & mask_2[None, :]
    np.testing.assert_array_equal(in_padding[0][~inside], 0)


def test_rows_and_columns_sum_to_their_mass() -> None:
    scores, masks = padded_problem(SIZES)
    solve = jax.jit(log_optimal_transport, static_argnames="num_iterations")
    found = solve(jnp.asarray(scores), *masks, jnp.ones(()), num_iterations=200)
    for b, (m, n) in enumerate(SIZES):
        mass = np.exp(real_part(found[b], masks[0][b], masks[1][b]))
        np.testing.assert_allclose(mass.sum(axis=1), np.append(np.ones(m), n), rtol=1e-3)
        np.testing.assert_allclose(mass.sum(axis=0), np.append(np.ones(n), m), rtol=1e-3)


@pytest.mark.parametrize(("m", "n"), [(0, 3), (3, 0), (0, 0)])
def test_a_slice_without_keypoints_sends_the_others_to_the_dustbin(m: int, n: int) -> None:
    scores, (mask_1, mask_2) = padded_problem([(m, n)])
    nothing = jnp.full(mask_1.shape, -1)

    def loss(scores: jax.Array, dustbin: jax.Array) -> Any:
        table = log_optimal_transport(scores, mask_1, mask_2, dustbin, num_iterations=5)
        return matching_loss(table, nothing, mask_1, mask_2)[0], table

    differentiate = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (value, table), gradients = differentiate(jnp.asarray(scores), jnp.ones(()))
    np.testing.assert_allclose(value, 0, atol=1e-6)
    assert all(np.isfinite(g).all() for g in gradients)
    np.testing.assert_allclose(np.exp(table[0, :-1, -1]), mask_1[0], atol=1e-6)
    np.testing.assert_allclose(np.exp(table[0, -1, :-1]), mask_2[0], atol=1e-6)


def test_scores_of_bfloat16_are_transported_in_float32() -> None:
    scores, masks = padded_problem([(4, 7)])
    rounded = jnp.asarray(scores, jnp.bfloat16)
    found = jax.eval_shape(log_optimal_transport, rounded, *masks, jnp.ones(()))
    assert found.dtype == jnp.float32


def random_correspondence(masks: tuple[Any, Any], fraction: float = 0.6) -> np.ndarray:
    """One-to-one pairs among a share of the real keypoints [b, m]."""
    rng = np.random.default_rng(2)
    found = np.full(masks[0].shape, -1)
    for b in range(len(found)):
        first, second = (rng.permutation(np.flatnonzero(mask[b])) for mask in masks)
        num = int(np.ceil(fraction * min(len(first), len(second))))
        found[b, first[:num]] = second[:num]
    return found


@pytest.mark.parametrize("fraction", [0.0, 0.6, 1.0])
def test_matching_loss_equals_a_loop(fraction: float) -> None:
    _, masks = padded_problem(SIZES)
    correspondence = random_correspondence(masks, fraction)
    rng = np.random.default_rng(3)
    # Beyond both ends of the clamp.
    table = rng.uniform(-130, 10, (len(SIZES), masks[0].shape[1] + 1, masks[1].shape[1] + 1))
    found = jax.jit(matching_loss)(jnp.asarray(table), correspondence, *masks)
    for b in range(len(SIZES)):
        mask_1, mask_2 = masks[0][b], masks[1][b]
        number = np.cumsum(mask_2) - 1  # of a real keypoint among the real ones
        real = correspondence[b][mask_1]
        renumbered = np.where(real >= 0, number[real], -1)
        expected = loop_matching_loss(real_part(table[b], mask_1, mask_2), renumbered)
        np.testing.assert_allclose(found[b], expected, rtol=1e-5)


def test_a_correspondence_with_padding_counts_as_none() -> None:
    table = jnp.asarray(np.random.default_rng(4).uniform(-5, 0, (1, 4, 4)))
    mask_1, mask_2 = jnp.array([[True, True, False]]), jnp.array([[True, False, True]])
    found = matching_loss(table, jnp.array([[0, 1, 2]]), mask_1, mask_2)
    expected = matching_loss(table, jnp.array([[0, -1, -1]]), mask_1, mask_2)
    np.testing.assert_array_equal(found, expected)


def test_padding_changes_neither_the_loss_nor_its_gradient() -> None:
    scores, masks = padded_problem([(6, 5)])
    correspondence = random_correspondence(masks)
    mask_1, mask_2 = masks[0][0], masks[1][0]
    real = correspondence[0][mask_1]
    renumbered = np.where(real >= 0, (np.cumsum(mask_2) - 1)[real], -1)[None]

    def loss(scores: jax.Array, matches: Any, mask_1: Any, mask_2: Any) -> jax.Array:
        table = log_optimal_transport(scores, mask_1, mask_2, jnp.ones(()), num_iterations=20)
        return matching_loss(table, matches, mask_1, mask_2)[0]

    with jax.enable_x64(True):
        differentiate = jax.jit(jax.value_and_grad(loss))
        padded = differentiate(jnp.asarray(scores), correspondence, *masks)
        small = jnp.asarray(scores[0][mask_1][:, mask_2][None])
        expected = differentiate(small, renumbered, *ones(1, 6, 5))
    np.testing.assert_allclose(padded[0], expected[0], rtol=1e-10)
    np.testing.assert_allclose(
        padded[1][0][mask_1][:, mask_2], expected[1][0], rtol=1e-8, atol=1e-12
    )


def test_transport_and_loss_batch_like_single_pairs() -> None:
    scores, masks = padded_problem(SIZES)
    correspondence = random_correspondence(masks)

    def loss(scores: Any, mask_1: Any, mask_2: Any, matches: Any) -> jax.Array:
        table = log_optimal_transport(scores, mask_1, mask_2, jnp.ones(()), num_iterations=5)
        return matching_loss(table, matches, mask_1, mask_2)

    inputs = (jnp.asarray(scores), *map(jnp.asarray, masks), jnp.asarray(correspondence))
    together = jax.jit(loss)(*inputs)
    single = jax.jit(jax.vmap(lambda *one: loss(*(x[None] for x in one))[0]))(*inputs)
    np.testing.assert_allclose(together, single, rtol=1e-5)
