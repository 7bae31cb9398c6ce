"""Contrastive and segmentation losses.

`position` is int [b, 2], a slice's number in its volume, from 1, and the volume's number of slices.
Losses are float32 (or wider) scalars, whatever the inputs' type.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Integer, ScalarLike

from kafjax.labels import IGNORED

# The supervised contrastive loss of Khosla et al. is scaled by temperature / base temperature.
BASE_TEMPERATURE = 0.07

CONTRASTIVE_METHODS = ("simclr", "gcl", "pcl")

# Position thresholds are integer multiples of one over this.
_POSITION_PARTS = 10_000

SEGMENTATION_LOSSES = ("cross_entropy", "dice")

MIN_LOCAL_EDGE = 8  # pixels of a map, so that its 13 local regions are distinct


def positive_pairs(
    method: str, position: jax.Array, *, position_threshold: float = 0.1, num_partitions: int = 4
) -> Bool[Array, "b b"]:
    """Marks the samples of a batch that are positives of each other, by integer arithmetic.

    Args:
      method: 'simclr', a sample's views only; 'gcl', slices in the same one of `num_partitions`
        equal parts of the volume (Chaitanya et al. 2020); 'pcl', positions, i / n for slice i of n,
        nearer than `position_threshold` (Zeng et al. 2021), excluding equality.
      position: int [b, 2], the slice's number i, from 1, and n, up to 46340.
      position_threshold: for 'pcl', a fraction of the volume, rounded to four decimals.
      num_partitions: for 'gcl'.

    Returns:
      A symmetric matrix, true on the diagonal.

    Raises:
      ValueError: `method` is not one of the three, or `position` is not int [b, 2].
    """
    if position.shape[1:] != (2,) or not jnp.issubdtype(position.dtype, jnp.integer):
        raise ValueError(f"position is {position.dtype} {position.shape}, expected int [b, 2]")
    number, total = position[:, 0], position[:, 1]
    own = jnp.eye(len(number), dtype=bool)
    if method == "simclr":
        return own
    if method == "gcl":
        # Part p of P holds the positions in ((p - 1) / P, p / P].
        partition = -(-num_partitions * number // total)
        return partition[:, None] == partition[None, :]
    if method == "pcl":
        # |i / n - j / m| < t is |i m - j n| < t n m, or less than t n m rounded up. The remainder
        # modulo `_POSITION_PARTS` is handled separately, so that int32 suffices.
        apart = jnp.abs(number[:, None] * total[None, :] - number[None, :] * total[:, None])
        whole, rest = jnp.divmod(total[:, None] * total[None, :], _POSITION_PARTS)
        parts = round(position_threshold * _POSITION_PARTS)
        return own | (apart < parts * whole - (-parts * rest // _POSITION_PARTS))
    raise ValueError(f"contrastive method is {method!r}, expected one of {CONTRASTIVE_METHODS}")


def collapsed_loss(num_samples: int, temperature: float) -> float:
    """`supervised_contrastive_loss` of two views whose embeddings are all equal.

    Each anchor's probability is then uniform over the other 2 B - 1 views, whatever its positives:
    ln(2 B - 1) T / 0.07.

    Args:
      num_samples: B, of the global batch.
      temperature: T.
    """
    return math.log(2 * num_samples - 1) * temperature / BASE_TEMPERATURE


def supervised_contrastive_loss(
    views: Sequence[Float[Array, "b e"]],
    positives: Bool[Array, "n n"],
    *,
    temperature: ScalarLike = 0.1,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """Supervised contrastive loss over several views of a batch (docs/method.md section 6).

    For anchor i with positives P(i) among all other views of all samples,
    `-1 / |P(i)| * sum_p log(exp(s_ip / T) / sum_{a != i} exp(s_ia / T))` with cosine similarities
    s; the mean over anchors that have a positive, times T / 0.07. (Khosla et al. 2020, equation 2.)

    Args:
      views: the same samples' embeddings in each view; need not be normalised.
      positives: over the samples of the global batch, n = b times the devices. A sample's other
        views are its positives where the diagonal is true.
      temperature: T.
      axis_name: the mapped axis over which the batch is spread, if any. Every device then gets
        the loss of the global batch, negatives of all devices included.

    Returns:
      The loss; 0 if no anchor has a positive.
    """
    dtype = jnp.promote_types(views[0].dtype, jnp.float32)
    stacked = jnp.stack(views).astype(dtype)
    if axis_name is not None:
        stacked = jax.lax.all_gather(stacked, axis_name, axis=1, tiled=True)
    embeddings = stacked.reshape(-1, stacked.shape[-1])
    norm = jnp.sqrt(jnp.maximum(jnp.sum(embeddings**2, axis=-1, keepdims=True), 1e-24))
    embeddings = embeddings / norm
    highest = jax.lax.Precision.HIGHEST
    logits = jnp.matmul(embeddings, embeddings.T, precision=highest) / temperature

    others = ~jnp.eye(logits.shape[0], dtype=bool)
    positives = jnp.tile(positives, (len(views), len(views))) & others
    log_probability = logits - jax.nn.logsumexp(logits, axis=1, where=others, keepdims=True)
    num_positives = jnp.sum(positives, axis=1)
    anchor_loss = -jnp.sum(log_probability, axis=1, where=positives) / jnp.maximum(num_positives, 1)
    num_anchors = jnp.sum(num_positives > 0)
    scale = temperature / BASE_TEMPERATURE
    return jnp.asarray(scale * jnp.sum(anchor_loss) / jnp.maximum(num_anchors, 1))


def local_contrastive_loss(
    first: Float[Array, "b h w e"],
    second: Float[Array, "b h w e"],
    *,
    temperature: ScalarLike = 0.1,
) -> Float[Array, ""]:
    """Local contrast over fixed regions, L^R of Chaitanya et al. (NeurIPS 2020, section 3.2).

    A region is 3 x 3 pixels of a map, as a normalised vector of 9e numbers. With s_ij the
    similarity of the first map's region i and the second's region j, region i's loss is
    `-log(exp(s_ii / T) / sum_j exp(s_ij / T))`; the mean over regions, over both directions, and
    over samples.

    Args:
      first: features of one view; h and w are at least 8.
      second: features of another view, aligned with the first pixel by pixel.
      temperature: T.

    Raises:
      ValueError: the maps are too small for 13 distinct regions.
    """
    height, width = first.shape[1:3]
    if min(height, width) < MIN_LOCAL_EDGE:
        raise ValueError(
            f"feature maps of {height} x {width} pixels, expected at least {MIN_LOCAL_EDGE} each"
        )
    rows, cols = local_regions(height, width)
    near = np.arange(-1, 2)
    at = rows[:, None, None] + near[:, None], cols[:, None, None] + near

    def regions(x: jax.Array) -> jax.Array:
        taken = x[:, at[0], at[1]].astype(jnp.promote_types(x.dtype, jnp.float32))
        taken = taken.reshape(*taken.shape[:2], -1)
        squares = jnp.sum(taken**2, axis=-1, keepdims=True)
        return taken / jnp.sqrt(jnp.maximum(squares, 1e-24))

    highest = jax.lax.Precision.HIGHEST
    logits = jnp.einsum("bie,bje->bij", regions(first), regions(second), precision=highest)
    logits = logits / temperature
    forward, backward = (jax.nn.log_softmax(logits, axis=axis) for axis in (1, 2))
    return -jnp.mean(jnp.diagonal(forward + backward, axis1=1, axis2=2)) / 2


def local_regions(height: int, width: int) -> tuple[Int[np.ndarray, "13"], Int[np.ndarray, "13"]]:
    """Rows and columns of the centres of a map's local regions.

    A 3 x 3 grid and the four points between.
    """
    coarse, between = (1 / 6, 1 / 2, 5 / 6), (1 / 3, 2 / 3)
    places = [*itertools.product(coarse, coarse), *itertools.product(between, between)]
    rows, cols = np.floor(np.array(places) * (height, width)).astype(int).T
    return np.clip(rows, 1, height - 2), np.clip(cols, 1, width - 2)


def cross_entropy(
    logits: Float[Array, "b h w d"],
    label: Integer[Array, "b h w"],
    *,
    class_weights: Sequence[float] | None = None,
    ignoring: bool = False,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """Mean cross-entropy over all pixels.

    Args:
      logits: of d classes.
      label: class numbers below d.
      class_weights: d numbers that weight each pixel by its class in the mean.
      ignoring: the label may have pixels `IGNORED`, which do not count. 0 if all are.
      axis_name: the mapped axis over which a batch is spread, if any. With class weights or
        `ignoring` every device gets the loss of the global batch; without, the loss of its own
        part, and the mean over devices is the same.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    # Integer labels would need a gather, whose gradient, a scatter, is slow to compile and run.
    of_label = jax.nn.one_hot(label, logits.shape[-1], dtype=logits.dtype)
    of_pixel = optax.softmax_cross_entropy(logits, of_label)
    if class_weights is None and not ignoring:
        return jnp.mean(of_pixel)
    # An ignored pixel is of no class, so its weight is 0.
    of_class = jnp.ones(logits.shape[-1]) if class_weights is None else jnp.asarray(class_weights)
    weights = of_label @ of_class.astype(logits.dtype)
    total, weight = _global_sum((jnp.sum(weights * of_pixel), jnp.sum(weights)), axis_name)
    return total / jnp.maximum(weight, jnp.finfo(logits.dtype).tiny)


def dice_loss(
    logits: Float[Array, "b h w d"],
    label: Integer[Array, "b h w"],
    *,
    class_weights: Sequence[float] | None = None,
    ignoring: bool = False,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """The mean of one minus the soft Dice of each foreground class over the whole batch.

    With p the predicted probabilities and t the label of a class, Dice is
    `(2 sum(p t) + 2) / (sum p + sum t + 2)` (Milletari et al. 2016). Sums cover all pixels of the
    global batch, as in nnU-Net, because a class may be absent from a slice. It is
    `optax.losses.dice_loss(..., axis=(0, 1, 2), ignore_background=True)` spread over devices.

    Args:
      logits: of d classes.
      label: class numbers below d.
      class_weights: d numbers that weight the mean; the background's is not used.
      ignoring: the label may have pixels `IGNORED`, which no sum covers.
      axis_name: the mapped axis over which a batch is spread, if any. Every device then gets the
        loss of the global batch.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    of_label = jax.nn.one_hot(label, logits.shape[-1], dtype=logits.dtype)[..., 1:]
    probabilities = jax.nn.softmax(logits)[..., 1:]
    if ignoring:
        probabilities *= (label != IGNORED)[..., None]
    loss = _one_minus_dice(probabilities, of_label, axis_name)
    if class_weights is None:
        return jnp.mean(loss)
    weights = jnp.asarray(class_weights, loss.dtype)[1:]
    return jnp.sum(weights * loss) / jnp.sum(weights)


def region_cross_entropy(
    logits: Float[Array, "b h w r"],
    inside: Bool[Array, "b h w r"],
    known: Bool[Array, "b h w"],
    *,
    ignoring: bool = False,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """Mean binary cross-entropy over all pixels and regions.

    Args:
      logits: of r regions, which may overlap.
      inside: whether a pixel is inside of a region.
      known: whether a pixel is annotated.
      ignoring: pixels may be unknown, and those do not count. 0 if all are.
      axis_name: as of `cross_entropy`.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    of_pixel = optax.sigmoid_binary_cross_entropy(logits, inside.astype(logits.dtype))
    if not ignoring:
        return jnp.mean(of_pixel)
    weights = jnp.broadcast_to(known[..., None], of_pixel.shape).astype(logits.dtype)
    total, weight = _global_sum((jnp.sum(weights * of_pixel), jnp.sum(weights)), axis_name)
    return total / jnp.maximum(weight, 1)


def region_dice_loss(
    logits: Float[Array, "b h w r"],
    inside: Bool[Array, "b h w r"],
    known: Bool[Array, "b h w"],
    *,
    ignoring: bool = False,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """The mean of one minus the soft Dice of each region over the whole batch, as `dice_loss`.

    Args:
      logits: of r regions, which may overlap.
      inside: whether a pixel is inside of a region.
      known: whether a pixel is annotated.
      ignoring: pixels may be unknown, which no sum covers.
      axis_name: as of `dice_loss`.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    probabilities = jax.nn.sigmoid(logits)
    if ignoring:
        probabilities *= known[..., None]
    return jnp.mean(_one_minus_dice(probabilities, inside.astype(logits.dtype), axis_name))


def _one_minus_dice(probabilities: jax.Array, of_label: jax.Array, axis_name: str | None) -> Any:
    """One minus the soft Dice of each of d structures, [b, h, w, d], over the global batch."""
    pixels = (0, 1, 2)
    common, both = _global_sum(
        (
            jnp.sum(probabilities * of_label, axis=pixels),
            jnp.sum(probabilities + of_label, axis=pixels),
        ),
        axis_name,
    )
    return 1 - (2 * common + 2) / (both + 2)


def consistency(
    logits: Float[Array, "b h w d"],
    target: Float[Array, "b h w d"],
) -> Float[Array, ""]:
    """Mean over pixels of the squared distance between two predictions' probabilities.

    The consistency cost of Tarvainen and Valpola (NeurIPS 2017), summed over classes.

    Args:
      logits: the student's.
      target: the teacher's logits.
    """
    student, teacher = (
        jax.nn.softmax(x.astype(jnp.promote_types(x.dtype, jnp.float32))) for x in (logits, target)
    )
    return jnp.mean(jnp.sum((student - teacher) ** 2, axis=-1))


def _global_sum(sums: Any, axis_name: str | None) -> Any:
    """Also sums over devices; gradients are those of the sum of all devices' losses."""
    return sums if axis_name is None else jax.lax.psum(sums, axis_name)
