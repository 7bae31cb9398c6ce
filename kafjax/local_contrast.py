"""Local contrast: the first blocks of a decoder learn to tell the places of a slice apart.

The second stage of GLCL (Chaitanya et al., NeurIPS 2020): the encoder comes from a run with the
global loss of partitions (`gcl`) and stays as it is. Batches are those of `kafjax.pretrain`, of
which only the anchors are used; the neighbours show other places.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kafjax import augment
from kafjax.losses import local_contrastive_loss
from kafjax.models import example_inputs, init_variables
from kafjax.task import apply_training, draw_first_pair, make_model, make_transform, sample_keys

Metrics = dict[str, jax.Array]


class LocalContrast:
    """Self-supervised pretraining of a decoder's first blocks on a frozen encoder.

    Args:
      config: the run's config.
      axis_name: the mapped axis over which a batch is spread, if any.

    Raises:
      ValueError: a field of the config has no such value.
    """

    def __init__(self, config: Any, *, axis_name: str | None = None):
        self._config = config
        self._transform = make_transform(augment.augment_view, config)
        self._model = make_model(config, axis_name)
        self._jitted_augment = jax.jit(self.augment)

    def init(self) -> dict[str, Any]:
        """Fresh variables {'params', 'batch_stats'} of NumPy arrays, a function of config.seed."""
        return init_variables(self._model, self._config.seed, *example_inputs("local_contrast"))

    def augment(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Two views of every anchor: one spatial transform for both, intensities of their own.

        Pixels of the two show the same places, and keypoints correspond to themselves.
        """

        def one(key: jax.Array, image: Any, keypoints: Any, mask: Any) -> Any:
            spatial, *own = jax.random.split(key, 3)
            image, keypoints, mask = self._transform(spatial, image, keypoints, mask)
            views = jnp.stack([augment.change_intensity(k, image) for k in own])
            same = jnp.where(mask, jnp.arange(mask.size), -1)
            return views, jnp.stack([keypoints] * 2), jnp.stack([mask] * 2), same

        fields = ("image", "keypoints", "keypoint_mask")
        anchors = (batch[field][:, 0] for field in fields)
        moved = jax.vmap(one)(sample_keys(batch), *anchors)
        return {**batch, **dict(zip((*fields, "correspondence"), moved, strict=True))}

    def loss(
        self, params: Any, batch_stats: Any, batch: dict[str, jax.Array]
    ) -> tuple[jax.Array, tuple[Metrics, Any]]:
        """The loss of a training step, its metrics, and the new running statistics."""
        batch = self.augment(batch)
        inputs = (batch["image"], batch["keypoints"], batch["keypoint_mask"])
        (first, second), batch_stats = apply_training(
            self._model,
            params,
            batch_stats,
            inputs,
            num_microbatches=self._config.num_microbatches,
        )
        temperature = self._config.loss.temperature
        total = local_contrastive_loss(first, second, temperature=temperature)
        keypoints = jnp.mean(jnp.sum(batch["keypoint_mask"], axis=-1))
        return total, ({"loss": total, "keypoints": keypoints}, batch_stats)

    def picture(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch's first pair as training sees it: name -> uint8 [h, w, 3]."""
        return draw_first_pair(self._jitted_augment, batch)
