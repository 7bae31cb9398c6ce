"""The pretraining task: pairs of slices, augmentation, two global losses and a local one.

docs/method.md sections 3, 5 and 6. Batches are those of
`kafjax.data.batches.pretraining_batches`; `b` is a device's part. Imports no reader: the
training step works with any batch of that form.
"""

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from kafjax import augment, losses
from kafjax.assignment import matching_loss
from kafjax.models import PretrainingOutput
from kafjax.tasks.base import Batch, Metrics, Task, make_transform, sample_keys

if TYPE_CHECKING:
    import grain

    from kafjax.data.batches import BatchOptions
    from kafjax.data.dataset import SliceDataset
    from kafjax.data.splits import Split


def skipped_shares(mask: jax.Array, correspondence: jax.Array, positives: jax.Array) -> Metrics:
    """Fractions of a batch that the losses skip, or learn less from.

    Args:
      mask: bool [b, 2, k], real keypoints.
      correspondence: int [b, k], -1 for none.
      positives: bool [B, B], over the global batch.

    Returns:
      The fractions of slices without keypoints, of pairs without correspondences, and of samples
      whose only positives are their own views.
    """
    return {
        "slices_without_keypoints": jnp.mean(~jnp.any(mask, axis=-1)),
        "pairs_without_correspondence": jnp.mean(jnp.all(correspondence < 0, axis=-1)),
        "samples_without_positive": jnp.mean(jnp.sum(positives, axis=1) <= 1),
    }


class Pretraining(Task):
    """Self-supervised pretraining of an encoder with KAF's heads.

    Args:
      config: the run's config.
      axis_name: the mapped axis over which a batch is spread, if any.

    Raises:
      ValueError: a config field has an invalid value.
    """

    def __init__(self, config: Any, *, axis_name: str | None = None):
        super().__init__(config, axis_name=axis_name)
        self._transform = make_transform(augment.augment_pair, config)

    def batches(
        self,
        dataset: "SliceDataset",
        options: "BatchOptions",
        split: "Split",
        *,
        start_step: int = 0,
    ) -> "grain.DatasetIterator":
        """Batches of pairs; see `kafjax.data.batches.pretraining_batches`."""
        from kafjax.data.batches import pretraining_batches

        return pretraining_batches(dataset, options, volumes=split.train, start_step=start_step)

    def sample(self, dataset: "SliceDataset", record: int) -> Batch:
        """The record's slice with a neighbour."""
        from kafjax.data.samples import make_pair

        return make_pair(dataset, 0, record, seed=self._config.seed, **self.patch)

    def augment(self, batch: Batch) -> Batch:
        """Transforms both views of every sample with keys that depend only on seed and sample."""
        fields = ("image", "keypoints", "keypoint_mask")
        image, keypoints, mask = (batch[field] for field in fields)
        view_1, view_2 = ((image[:, i], keypoints[:, i], mask[:, i]) for i in range(2))
        view_1, view_2, correspondence = jax.vmap(self._transform)(
            sample_keys(batch), view_1, view_2, batch["correspondence"]
        )
        pairs = zip(fields, view_1, view_2, strict=True)
        stacked = {field: jnp.stack(pair, axis=1) for field, *pair in pairs}
        return {**batch, **stacked, "correspondence": correspondence}

    def loss(
        self, params: Any, batch_stats: Any, batch: Batch
    ) -> tuple[jax.Array, tuple[Metrics, Any]]:
        """The total loss of a training step, its metrics, and the new running statistics."""
        batch = self.augment(batch)
        mask = batch["keypoint_mask"]
        output, batch_stats = self.apply(params, batch_stats, batch)
        positives = self._positives(batch["position"])
        terms = self._terms(output, batch, positives)
        weights = self._config.loss.weights
        total = sum((weights[name] * term for name, term in terms.items()), jnp.zeros(()))
        metrics = {
            "loss": total,
            **{f"loss_{name}": term for name, term in terms.items()},
            "keypoints": jnp.mean(jnp.sum(mask, axis=-1)),
            "correspondences": jnp.mean(jnp.sum(batch["correspondence"] >= 0, axis=-1)),
            **skipped_shares(mask, batch["correspondence"], positives),
        }
        return total, (metrics, batch_stats)

    def picture(self, batch: Batch) -> dict[str, np.ndarray]:
        """The batch's first pair of views as training sees it: 'pair' -> uint8 [h, w, 3]."""
        from kafjax.drawing.figures import draw_pair  # only this needs matplotlib

        view = self.first_seen(batch)
        image, keypoints, mask = view["image"][..., 0], view["keypoints"], view["keypoint_mask"]
        drawn = draw_pair(
            image[0], image[1], keypoints[0], mask[0], keypoints[1], mask[1], view["correspondence"]
        )
        return {"pair": drawn}

    def _positives(self, position: jax.Array) -> jax.Array:
        """The positive pairs of the global batch: bool [B, B]."""
        if self._axis_name is not None:
            position = jax.lax.all_gather(position, self._axis_name, tiled=True)
        config = self._config.loss
        return losses.positive_pairs(
            config.method, position, position_threshold=config.position_threshold
        )

    def _terms(self, output: PretrainingOutput, batch: Batch, positives: jax.Array) -> Metrics:
        """The unweighted losses of the existing heads, those with a non-zero weight."""
        config = self._config.loss
        contrastive = functools.partial(
            losses.supervised_contrastive_loss,
            positives=positives,
            temperature=config.temperature,
            axis_name=self._axis_name,
        )
        terms = {}
        if output.cnn is not None:
            terms["cnn"] = contrastive(output.cnn)
        if output.kaf is not None:
            terms["kaf"] = contrastive(output.kaf)
        if output.log_assignment is not None:
            masks = batch["keypoint_mask"][:, 0], batch["keypoint_mask"][:, 1]
            pairs = matching_loss(output.log_assignment, batch["correspondence"], *masks)
            terms["matching"] = jnp.mean(pairs)
        return terms
