"""Segmentation metrics: pooled Dice and surface distances.

Labels and predictions are integer class numbers, 0 the background; results are for the classes
1..d-1, in order. Where a label is negative nobody annotated, and nothing counts. Volumes are arrays
of any number of axes, with a spacing in mm for each.

Pooled Dice is the paper's (docs/method.md section 8): pixels are first counted over all slices of
all volumes. Counts are integers and add up, so batches, devices and their order do not matter. The
other metrics cover one volume at a time (Maier-Hein et al., Metrics Reloaded, Nature Methods 2024).
They are NaN for a class that neither has; if only one of the two has it, the distance is the
volume's diagonal.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kafjax.regions import Groups, members

Counts = TypeVar("Counts", np.ndarray, jax.Array)


def count_pixels(
    prediction: ArrayLike,
    label: ArrayLike,
    num_classes: int,
    *,
    valid: ArrayLike | None = None,
    groups: Groups | None = None,
) -> jax.Array:
    """Counts the pixels of each class, on the device.

    Args:
      prediction: int [b, ...], class numbers.
      label: int [b, ...], the same shape; pixels below 0 are not annotated and do not count.
      num_classes: d, with the background.
      valid: bool [b]; false samples do not count.
      groups: class numbers of each structure to count in place of the foreground classes.

    Returns:
      int32 [d, 3]: pixels of the class in both, in the prediction, in the label. One call counts
      up to 2^31 pixels; add the results of several as Python or NumPy int64 numbers.
    """
    if groups is None:
        classes = jnp.arange(num_classes)
        predicted = jnp.asarray(prediction)[..., None] == classes
        labelled = jnp.asarray(label)[..., None] == classes
    else:
        predicted, labelled = (members(jnp.asarray(x), [[0], *groups]) for x in (prediction, label))
    predicted &= jnp.asarray(label)[..., None] >= 0
    if valid is not None:
        real = jnp.asarray(valid).reshape(-1, *[1] * (predicted.ndim - 1))
        predicted, labelled = predicted & real, labelled & real
    pixels = tuple(range(labelled.ndim - 1))
    columns = (predicted & labelled, predicted, labelled)
    return jnp.stack([jnp.sum(c, axis=pixels, dtype=jnp.int32) for c in columns], axis=-1)


def pooled_dice(counts: Counts) -> Counts:
    """Dice of each foreground class, 2 |A and B| / (|A| + |B|), from summed counts.

    Args:
      counts: int [d, 3], sums of `count_pixels`; on the host or traced.

    Returns:
      float [d - 1], in [0, 1]; NaN for a class in neither the predictions nor the labels.
    """
    both, predicted, labelled = counts[1:].T
    with np.errstate(invalid="ignore"):
        return 2 * both / (predicted + labelled)


def mean_pooled_dice(counts: np.ndarray) -> float:
    """The mean of `pooled_dice` over the foreground classes, ignoring NaN; NaN if all are."""
    dice = pooled_dice(np.asarray(counts))
    found = ~np.isnan(dice)
    return float(dice[found].mean()) if found.any() else float("nan")


def slice_dice(prediction: np.ndarray, label: np.ndarray, num_classes: int) -> float:
    """`mean_pooled_dice` of one slice; arguments as `count_pixels`."""
    return mean_pooled_dice(np.asarray(count_pixels(prediction, label, num_classes)))


class ClassMetrics(NamedTuple):
    """One class of one volume.

    Attributes:
      dice: in [0, 1]; NaN where neither the prediction nor the label has the class. HD95 and ASSD
        are also NaN where a part of the volume is not annotated: its surfaces are not known.
      hd95: mm, the greater of the two directed 95th percentiles of the distances between surfaces.
      assd: mm, the mean of all those distances, both ways.
      empty: neither has the class; dice, hd95 and assd are NaN.
      missed: only one of them has it: dice is 0, hd95 and assd are the volume's diagonal.
    """

    dice: float
    hd95: float
    assd: float
    empty: bool
    missed: bool


def volume_metrics(
    prediction: np.ndarray,
    label: np.ndarray,
    *,
    num_classes: int,
    spacing: Sequence[float],
    groups: Groups | None = None,
) -> list[ClassMetrics]:
    """Dice, HD95 and ASSD of each foreground class of a volume.

    A surface consists of the elements with a neighbour along an axis that is not of the class or is
    outside the volume; distances are between centres of elements.

    Args:
      prediction: int array, class numbers.
      label: int array of the same shape.
      num_classes: d, with the background.
      spacing: mm between elements along each axis of the arrays.
      groups: class numbers of each structure to measure in place of the foreground classes.

    Raises:
      ValueError: prediction, label and spacing do not match.
    """
    if prediction.shape != label.shape or len(spacing) != label.ndim:
        raise ValueError(
            f"prediction {prediction.shape}, label {label.shape} and spacing {tuple(spacing)}; "
            "expected equal shapes, and a spacing for each axis"
        )
    known = label >= 0
    found = [
        _class_metrics(
            _inside(prediction, group) & known, _inside(label, group), np.asarray(spacing, float)
        )
        for group in groups or [[i] for i in range(1, num_classes)]
    ]
    return found if known.all() else [m._replace(hd95=np.nan, assd=np.nan) for m in found]


def _inside(classes: np.ndarray, group: Sequence[int]) -> np.ndarray:
    """Marks the elements of a group of classes; for one class faster than `np.isin`."""
    return functools.reduce(np.logical_or, [classes == number for number in group])


def _class_metrics(a: np.ndarray, b: np.ndarray, spacing: np.ndarray) -> ClassMetrics:
    total = int(a.sum()) + int(b.sum())
    if total == 0:
        return ClassMetrics(np.nan, np.nan, np.nan, empty=True, missed=False)
    if not a.any() or not b.any():
        diagonal = float(np.linalg.norm(spacing * a.shape))
        return ClassMetrics(0.0, diagonal, diagonal, empty=False, missed=True)
    there, back = surface_distances(a, b, spacing=spacing)
    return ClassMetrics(
        dice=2 * int((a & b).sum()) / total,
        hd95=float(max(np.percentile(there, 95), np.percentile(back, 95))),
        assd=float(np.concatenate([there, back]).mean()),
        empty=False,
        missed=False,
    )


def surface_distances(
    a: np.ndarray, b: np.ndarray, *, spacing: Sequence[float] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Distances from each surface element of one mask to the other's surface, both ways.

    Args:
      a: bool array, not all false.
      b: bool array of the same shape, not all false.
      spacing: mm along each axis.

    Returns:
      float64 [surface elements of a] and [surface elements of b], in mm.
    """
    from scipy import ndimage  # takes longer to import than JAX; training needs no distances

    # No surface lies outside the box around both masks, and volumes are mostly background.
    (box,) = ndimage.find_objects((a | b).astype(np.uint8))
    surface_a, surface_b = _surface(a[box]), _surface(b[box])
    to_a, to_b = (
        ndimage.distance_transform_edt(~surface, sampling=spacing)
        for surface in (surface_a, surface_b)
    )
    return to_b[surface_a], to_a[surface_b]


def _surface(mask: np.ndarray) -> np.ndarray:
    from scipy import ndimage

    return mask & ~ndimage.binary_erosion(mask)
