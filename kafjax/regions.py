"""Regions: structures that are unions of labels and may overlap, as in nnU-Net's `dataset.json`.

A network has an output for each region, without a background, and its sigmoid is the probability
that a pixel is inside. Labels are written in nnU-Net's order: each region above a half writes its
own label, `regions_class_order`, over what the regions before it have written. Arrays are NumPy's
or JAX's, which preparation does not import.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import jax

# Label numbers of each region, such as ((1, 2, 3), (2, 3), (3,)).
Groups = Sequence[Sequence[int]]


class Region(NamedTuple):
    """A region's name, its labels, and the one that a predicted pixel of it is written as."""

    name: str
    labels: tuple[int, ...]
    written: int


def regions_of(metadata: Mapping[str, Any]) -> tuple[Region, ...]:
    """The regions of a dataset, from its metadata; most have none."""
    found = metadata.get("regions", ())
    return tuple(Region(name, tuple(labels), written) for name, labels, written in found)


def structures_of(metadata: Mapping[str, Any]) -> tuple[tuple[str, ...], Groups | None]:
    """Names of what is scored in a dataset, and the labels of each.

    These are the regions and then the single labels or, without regions, the classes. None stands
    for the labels 1, 2, ... of classes.
    """
    classes = tuple(metadata["classes"][1:])
    regions = regions_of(metadata)
    if not regions:
        return classes, None
    single = [(number,) for number in range(1, len(classes) + 1)]
    return (*(r.name for r in regions), *classes), [*(r.labels for r in regions), *single]


def members(label: "jax.Array", groups: Groups) -> "jax.Array":
    """Marks the pixels inside each group of labels: bool [..., groups]."""
    import jax.numpy as jnp

    return jnp.stack([jnp.isin(label, jnp.asarray(group)) for group in groups], axis=-1)


def write_labels(inside: Any, written: Sequence[int]) -> Any:
    """Labels, uint8, of pixels that are inside of regions, bool [..., regions]."""
    if isinstance(inside, np.ndarray):
        xp: Any = np
    else:
        import jax.numpy as xp
    labels = xp.zeros(inside.shape[:-1], xp.uint8)
    for i, number in enumerate(written):
        labels = xp.where(inside[..., i], xp.uint8(number), labels)
    return labels


def most_probable(probabilities: np.ndarray, metadata: Mapping[str, Any]) -> np.ndarray:
    """A dataset's labels, uint8, from probabilities of its classes or of its regions [..., d]."""
    if regions := regions_of(metadata):
        return write_labels(probabilities > 0.5, [region.written for region in regions])
    return probabilities.argmax(axis=-1).astype(np.uint8)
