"""Local contrast: the first blocks of a decoder learn to distinguish the places of a slice.

The second stage of GLCL (Chaitanya et al., NeurIPS 2020): the encoder comes from a run with the
global loss of partitions (`gcl`) and is frozen. Batches are those of `kafjax.tasks.pretraining`,
but only the anchors are used, because the neighbours show other places.
"""

from typing import Any

import jax
import jax.numpy as jnp

from kafjax import augment
from kafjax.intensity import change_intensity
from kafjax.losses import local_contrastive_loss
from kafjax.tasks.base import Batch, Metrics, make_transform, sample_keys
from kafjax.tasks.pretraining import Pretraining


class LocalContrast(Pretraining):
    """Self-supervised pretraining of a decoder's first blocks on a frozen encoder.

    Args:
      config: the run's config.
      axis_name: the mapped axis over which a batch is spread, if any.

    Raises:
      ValueError: a config field has an invalid value.
    """

    frozen = ("encoder",)

    def __init__(self, config: Any, *, axis_name: str | None = None):
        super().__init__(config, axis_name=axis_name)
        self._transform = make_transform(augment.augment_view, config)

    def augment(self, batch: Batch) -> Batch:
        """Two views of every anchor: the same spatial transform, independent intensities.

        Pixels of the two show the same places, and keypoints correspond to themselves.
        """

        def one(key: jax.Array, image: Any, keypoints: Any, mask: Any) -> Any:
            spatial, *own = jax.random.split(key, 3)
            image, keypoints, mask = self._transform(spatial, image, keypoints, mask)
            views = jnp.stack([change_intensity(k, image) for k in own])
            same = jnp.where(mask, jnp.arange(mask.size), -1)
            return views, jnp.stack([keypoints] * 2), jnp.stack([mask] * 2), same

        fields = ("image", "keypoints", "keypoint_mask")
        anchors = (batch[field][:, 0] for field in fields)
        moved = jax.vmap(one)(sample_keys(batch), *anchors)
        return {**batch, **dict(zip((*fields, "correspondence"), moved, strict=True))}

    def loss(
        self, params: Any, batch_stats: Any, batch: Batch
    ) -> tuple[jax.Array, tuple[Metrics, Any]]:
        """The loss of a training step, its metrics, and the new running statistics."""
        batch = self.augment(batch)
        (first, second), batch_stats = self.apply(params, batch_stats, batch)
        temperature = self._config.loss.temperature
        total = local_contrastive_loss(first, second, temperature=temperature)
        keypoints = jnp.mean(jnp.sum(batch["keypoint_mask"], axis=-1))
        return total, ({"loss": total, "keypoints": keypoints}, batch_stats)
