"""Segmentation of a dataset with regions, which may overlap: sigmoid in place of softmax."""

from typing import Any

import jax

from kafjax import losses
from kafjax.regions import members, write_labels
from kafjax.tasks.base import Metrics
from kafjax.tasks.segmentation import Segmentation


class RegionSegmentation(Segmentation):
    """Segmentation with `config.data.regions` and `regions_class_order`, facts of the dataset.

    The losses are the binary cross-entropy and the Dice of regions, and scores are of the regions
    in the written labels, which are those of `kafjax.regions`. Args and errors are those of
    `Segmentation`.
    """

    @property
    def _groups(self) -> tuple[tuple[int, ...], ...]:
        return tuple(map(tuple, self._config.data.regions))

    def probabilities(self, logits: jax.Array) -> jax.Array:
        """Probabilities of the regions."""
        return jax.nn.sigmoid(logits)

    def labels(self, logits: jax.Array) -> jax.Array:
        """The written labels."""
        return write_labels(logits > 0, self._config.data.regions_class_order)

    def _terms(self, logits: jax.Array, label: jax.Array) -> Metrics:
        options: dict[str, Any] = {"ignoring": self._ignores, "axis_name": self._axis_name}
        known = label >= 0
        inside = members(label, self._groups)
        named = {"cross_entropy": losses.region_cross_entropy, "dice": losses.region_dice_loss}
        return {
            name: loss(logits, inside, known, **options)
            for name, loss in named.items()
            if self._config.loss.weights[name]
        }
