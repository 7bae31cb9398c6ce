"""Contrastive losses and cross-entropy against loops, scipy and the release's values."""

import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import log_softmax

from kafjax.losses import (
    collapsed_loss,
    cross_entropy,
    dice_loss,
    local_contrastive_loss,
    local_regions,
    positive_pairs,
    supervised_contrastive_loss,
)
from tests.devices import run_on_four_devices
from tests.release_weights import GOLDEN, whole_positions

METHODS = ("simclr", "gcl", "pcl")


def loop_loss(views: np.ndarray, positives: np.ndarray, temperature: float) -> float:
    """The loss of views [v, n, e] term by term, as Khosla et al. 2020, equation 2, defines it."""
    num_views, n, _ = views.shape
    rows = [(v, i) for v in range(num_views) for i in range(n)]
    unit = {row: views[row] / np.linalg.norm(views[row]) for row in rows}
    terms = []
    for anchor in rows:
        others = [row for row in rows if row != anchor]
        similar = {row: np.exp(unit[anchor] @ unit[row] / temperature) for row in others}
        friends = [row for row in others if positives[anchor[1], row[1]]]
        if friends:
            total = sum(similar.values())
            terms.append(-np.mean([np.log(similar[row] / total) for row in friends]))
    return float(temperature / 0.07 * np.mean(terms)) if terms else 0.0


def positions(total: int) -> np.ndarray:
    """All slices of a volume, int32 [n, 2]."""
    return np.array([(i, total) for i in range(1, total + 1)], np.int32)


def exact_positives(position: np.ndarray, threshold: str) -> list[list[bool]]:
    """|i / n - j / m| < t in fractions; a sample is its own positive at any t."""
    places = [Fraction(int(i), int(n)) for i, n in position]
    t = Fraction(threshold)
    return [[a is b or abs(a - b) < t for b in places] for a in places]


def random_views(num_views: int = 2, n: int = 5, e: int = 8) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((num_views, n, e))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_contrastive_loss_is_the_releases(method: str, temperature: float) -> None:
    with np.load(GOLDEN / "losses.npz") as golden, jax.enable_x64(True):
        # The golden partitions are not those of the golden positions.
        partition, position = golden["partition"], whole_positions(golden["slice_position"])
        positives = positive_pairs(method, position, position_threshold=0.2)
        if method == "gcl":
            positives = jnp.asarray(partition[:, None] == partition[None, :])
        views = [jnp.asarray(golden["features"][:, i], jnp.float64) for i in range(2)]
        loss = jax.jit(supervised_contrastive_loss)(views, positives, temperature=temperature)
        expected = golden[f"loss_{method}_T{temperature}"]
        np.testing.assert_allclose(loss, expected, rtol=1e-10)


@pytest.mark.parametrize("num_slices", [4, 7, 12, 100, 255])
def test_partitions_are_quarters_of_the_volume(num_slices: int) -> None:
    position = positions(num_slices)
    quarter = np.array([math.ceil(Fraction(4 * int(i), int(n))) for i, n in position])  # 1..4
    found = positive_pairs("gcl", jnp.asarray(position))
    np.testing.assert_array_equal(found, quarter[:, None] == quarter[None, :])


def test_positives_of_pcl_are_nearer_than_the_threshold() -> None:
    position = np.array([(10, 100), (19, 100), (31, 100), (100, 100)], np.int32)
    found = positive_pairs("pcl", jnp.asarray(position), position_threshold=0.1)
    np.testing.assert_array_equal(found, exact_positives(position, "0.1"))


@pytest.mark.parametrize("threshold", ["0.1", "0.35", "0.3333", "0.0001", "0.07", "1", "0"])
@pytest.mark.parametrize("totals", [(200,), (10, 12, 181, 200), (4096, 46340, 1, 3)])
def test_positives_at_the_threshold_do_not_depend_on_rounding(
    threshold: str, totals: tuple[int, ...]
) -> None:
    """All slices of a volume of 200; of volumes of several sizes, also the largest."""
    volumes = [positions(n) for n in totals]
    most = 400 // len(volumes)
    position = np.concatenate([v[:: max(1, -(-len(v) // most))] for v in volumes])
    find = functools.partial(positive_pairs, "pcl", position_threshold=float(threshold))
    found = np.asarray(jax.jit(find)(jnp.asarray(position)))
    np.testing.assert_array_equal(found, exact_positives(position, threshold))
    np.testing.assert_array_equal(found, found.T)


def test_a_threshold_counts_to_four_decimals() -> None:
    position = positions(200)
    found, rounded = (
        positive_pairs("pcl", jnp.asarray(position), position_threshold=t) for t in (0.10004, 0.1)
    )
    np.testing.assert_array_equal(found, rounded)


@pytest.mark.parametrize("position", [np.ones(4, np.float32), np.ones((4, 2)), np.ones(4, int)])
def test_positions_that_are_no_whole_numbers_are_refused(position: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"position is .*, expected int \[b, 2\]"):
        positive_pairs("pcl", jnp.asarray(position))


def test_positives_of_simclr_are_a_samples_own_views() -> None:
    found = positive_pairs("simclr", jnp.asarray([(1, 2)] * 3))
    np.testing.assert_array_equal(found, np.eye(3, dtype=bool))


def test_an_unknown_method_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'moco'.*simclr.*gcl.*pcl"):
        positive_pairs("moco", jnp.ones((2, 2), int))


@pytest.mark.parametrize("num_views", [2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_contrastive_loss_equals_a_loop(method: str, num_views: int) -> None:
    views = random_views(num_views)
    position = jnp.asarray([(i, 100) for i in (5, 10, 30, 80, 100)])
    positives = positive_pairs(method, position, position_threshold=0.25)
    loss = jax.jit(supervised_contrastive_loss)(list(jnp.asarray(views)), positives)
    np.testing.assert_allclose(loss, loop_loss(views, np.asarray(positives), 0.1), rtol=1e-5)


def test_anchors_without_positive_do_not_count() -> None:
    views = random_views()[:1]
    positives = np.eye(5, dtype=bool)
    positives[0, 1] = positives[1, 0] = True
    loss = supervised_contrastive_loss(list(jnp.asarray(views)), jnp.asarray(positives))
    np.testing.assert_allclose(loss, loop_loss(views, positives, 0.1), rtol=1e-5)


def test_without_any_positive_loss_and_gradient_are_zero() -> None:
    views = jnp.asarray(random_views()[0])
    no_pair = jnp.eye(5, dtype=bool)
    value, gradient = jax.value_and_grad(lambda x: supervised_contrastive_loss([x], no_pair))(views)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_a_zero_embedding_gives_no_nan() -> None:
    views = jnp.asarray(random_views()).at[:, 0].set(0)
    eye = jnp.eye(5, dtype=bool)
    differentiate = jax.value_and_grad(lambda x: supervised_contrastive_loss(list(x), eye))
    value, gradient = jax.jit(differentiate)(views)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_contrastive_loss_of_bfloat16_is_computed_in_float32() -> None:
    views = jnp.asarray(random_views(), jnp.bfloat16)
    eye = jnp.eye(5, dtype=bool)
    loss = supervised_contrastive_loss(list(views), eye)
    assert loss.dtype == jnp.float32
    expected = loop_loss(np.asarray(views, np.float64), np.asarray(eye), 0.1)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


FOUR_DEVICES = """
    import jax, jax.numpy as jnp, numpy as np
    from kafjax.losses import positive_pairs, supervised_contrastive_loss

    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((8, 2, 6)), jnp.float32)
    w = jnp.asarray(rng.standard_normal((6, 5)), jnp.float32)
    position = jnp.asarray([(i, 100) for i in rng.integers(1, 101, 8)])
    assert jax.device_count() == 4

    for method in ("simclr", "gcl", "pcl"):
        positives = positive_pairs(method, position, position_threshold=0.2)

        def loss(w, x, axis_name=None):
            views = (x[:, 0] @ w, x[:, 1] @ w)
            return supervised_contrastive_loss(views, positives, axis_name=axis_name)

        def step(w, x):
            value, gradient = jax.value_and_grad(loss)(w, x, "batch")
            return value, jax.lax.pmean(gradient, "batch")

        value, gradient = jax.value_and_grad(loss)(w, x)
        values, gradients = jax.pmap(step, axis_name="batch", in_axes=(None, 0))(
            w, x.reshape(4, 2, 2, 6)
        )
        np.testing.assert_allclose(values, np.full(4, value), rtol=1e-6)
        for of_device in gradients:
            np.testing.assert_allclose(of_device, gradient, rtol=1e-4, atol=1e-6)
    print("equal")
"""


def test_four_devices_have_the_loss_and_gradients_of_one() -> None:
    assert run_on_four_devices(FOUR_DEVICES) == "equal\n"


def test_cross_entropy_is_the_mean_over_pixels() -> None:
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((2, 3, 5, 4))
    label = rng.integers(0, 4, (2, 3, 5))
    expected = -np.take_along_axis(log_softmax(logits, axis=-1), label[..., None], axis=-1).mean()
    found = jax.jit(cross_entropy)(jnp.asarray(logits), jnp.asarray(label))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    rounded = cross_entropy(jnp.asarray(logits, jnp.bfloat16), jnp.asarray(label))
    assert rounded.dtype == jnp.float32


def test_local_contrastive_loss_equals_a_loop() -> None:
    first, second = np.random.default_rng(0).standard_normal((2, 2, 12, 9, 3))
    terms = []
    for maps in ((first, second), (second, first)):
        for b in range(2):
            centres = list(zip(*local_regions(12, 9), strict=True))
            cut = [[m[b, r - 1 : r + 2, c - 1 : c + 2].ravel() for r, c in centres] for m in maps]
            here, there = ([x / np.linalg.norm(x) for x in regions] for regions in cut)
            for i, region in enumerate(here):
                similar = [np.exp(region @ other / 0.2) for other in there]
                terms.append(-np.log(similar[i] / sum(similar)))
    found = jax.jit(local_contrastive_loss)(first, second, temperature=0.2)
    np.testing.assert_allclose(found, np.mean(terms), rtol=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (9, 30), (256, 176)])
def test_local_regions_are_13_places_inside(size: tuple[int, int]) -> None:
    places = set(zip(*local_regions(*size), strict=True))
    assert len(places) == 13
    assert all(1 <= x < edge - 1 for place in places for x, edge in zip(place, size, strict=True))


def test_local_contrast_of_small_maps_is_refused() -> None:
    with pytest.raises(ValueError, match="7 x 9 pixels, expected at least 8"):
        local_contrastive_loss(jnp.zeros((1, 7, 9, 2)), jnp.zeros((1, 7, 9, 2)))


def random_labels(seed: int = 2, d: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Logits [4, 6, 5, d], and labels with the third class in only one slice."""
    rng = np.random.default_rng(seed)
    label = rng.choice([0, 1, 3], (4, 6, 5), p=[0.7, 0.2, 0.1])
    label[1, :2] = 2
    return 2 * rng.standard_normal((4, 6, 5, d)), label


@pytest.mark.parametrize("weights", [None, (1.0, 2.0, 0.0, 5.0)])
def test_dice_loss_is_optaxs_over_the_batch(weights: tuple[float, ...] | None) -> None:
    logits, label = random_labels()
    of_class = optax.losses.dice_loss(
        jnp.asarray(logits),
        jax.nn.one_hot(label, 4),
        axis=(0, 1, 2),
        ignore_background=True,
        reduction="none",
    )
    expected = np.average(of_class, weights=None if weights is None else weights[1:])
    found = jax.jit(lambda x, y: dice_loss(x, y, class_weights=weights))(logits, label)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    rounded = dice_loss(jnp.asarray(logits, jnp.bfloat16), jnp.asarray(label))
    assert rounded.dtype == jnp.float32


def test_dice_loss_of_a_perfect_prediction_is_near_0_and_of_an_absent_class_too() -> None:
    label = random_labels()[1] % 2
    sure = 60 * np.eye(3)[label]
    assert float(dice_loss(sure, label)) < 1e-6
    assert float(dice_loss(-sure, label)) > 0.4


def test_weighted_cross_entropy_is_the_weighted_mean_over_pixels() -> None:
    logits, label = random_labels()
    weights = np.array([0.5, 2.0, 1.0, 0.0])
    picked = np.take_along_axis(log_softmax(logits, axis=-1), label[..., None], axis=-1)[..., 0]
    expected = -np.average(picked, weights=weights[label])
    found = cross_entropy(jnp.asarray(logits), jnp.asarray(label), class_weights=tuple(weights))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    equal = cross_entropy(jnp.asarray(logits), jnp.asarray(label), class_weights=(3.0,) * 4)
    np.testing.assert_allclose(equal, cross_entropy(logits, label), rtol=1e-6)


SEGMENTATION_ON_FOUR_DEVICES = """
    import functools
    import jax, jax.numpy as jnp, numpy as np
    from kafjax.losses import cross_entropy, dice_loss
    from tests.test_losses import random_labels

    logits, label = random_labels()
    x, label = jnp.asarray(logits, jnp.float32), jnp.asarray(label)
    w = jnp.eye(4) + 0.1
    weights = (0.5, 2.0, 1.0, 3.0)

    for function, options in (
        (cross_entropy, {}),
        (cross_entropy, {"class_weights": weights}),
        (dice_loss, {}),
        (dice_loss, {"class_weights": weights}),
        (cross_entropy, {"ignoring": True}),
        (dice_loss, {"ignoring": True}),
    ):
        if options.get("ignoring"):  # devices with different numbers of annotated pixels
            label = label.at[0].set(-1).at[1, :2].set(-1)
        def loss(w, x, label, axis_name=None):
            return function(x @ w, label, axis_name=axis_name, **options)

        def step(w, x, label):
            pair = jax.value_and_grad(loss)(w, x, label, "batch")
            return jax.lax.pmean(pair, "batch")

        value, gradient = jax.value_and_grad(loss)(w, x, label)
        values, gradients = jax.pmap(step, axis_name="batch", in_axes=(None, 0, 0))(
            w, x[:, None], label[:, None]
        )
        np.testing.assert_allclose(values, np.full(4, value), rtol=1e-6)
        for of_device in gradients:
            np.testing.assert_allclose(of_device, gradient, rtol=1e-4, atol=1e-7)
    print("equal")
"""


def test_segmentation_losses_of_four_devices_are_those_of_one() -> None:
    assert run_on_four_devices(SEGMENTATION_ON_FOUR_DEVICES) == "equal\n"


@pytest.mark.parametrize("n", [2, 8, 16])
@pytest.mark.parametrize("threshold", [0.01, 0.35, 2.0])
def test_embeddings_that_are_all_alike_have_one_loss_whatever_the_positives(
    n: int, threshold: float
) -> None:
    views = np.ones((2, n, 4)) * np.random.default_rng(0).random((2, n, 1))  # lengths do not matter
    position = jnp.asarray(positions(n))
    positives = positive_pairs("pcl", position, position_threshold=threshold)
    found = supervised_contrastive_loss(list(map(jnp.asarray, views)), positives, temperature=0.2)
    np.testing.assert_allclose(found, collapsed_loss(n, 0.2), rtol=1e-5)
    assert collapsed_loss(16, 0.1) == pytest.approx(4.906, abs=5e-4)
