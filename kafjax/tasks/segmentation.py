"""The segmentation task: labelled slices, their losses, and Dice over all pixels.

docs/method.md sections 6 to 8. Batches are those of
`kafjax.data.batches.segmentation_batches` or `evaluation_batches`; `b` is a device's part.
Imports no reader, like `kafjax.tasks.pretraining`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from kafjax import augment, losses
from kafjax.labels import IGNORED
from kafjax.regions import Groups
from kafjax.segmentation_metrics import count_pixels, mean_pooled_dice, pooled_dice
from kafjax.tasks.base import Batch, Metrics, Task, make_transform, sample_keys

if TYPE_CHECKING:
    import grain

    from kafjax.data.batches import BatchOptions
    from kafjax.data.dataset import SliceDataset
    from kafjax.data.splits import Split


def changes_anything(config: Any) -> bool:
    """Whether `config.augment` changes any slice."""
    if config is None:
        return False
    transform, intensity = config.transform, config.get("intensity")
    probabilities = (
        transform.mirror_probability,
        transform.spatial_probability,
        intensity.probability if intensity is not None else 0,
    )
    return any(probabilities)


class Segmentation(Task):
    """Supervised segmentation, from scratch or from a pretrained encoder.

    Args:
      config: the run's config. If `config.augment` changes nothing, augmentation is skipped.
      axis_name: the mapped axis over which a batch is spread, if any.

    Raises:
      ValueError: a config field has an invalid value.
    """

    best_metric = "validation_dice"
    best_mode = "max"

    @property
    def _ignores(self) -> bool:
        """Whether pixels of a label may be `IGNORED`."""
        return bool(self._config.data.get("sparse_labels"))

    def __init__(self, config: Any, *, axis_name: str | None = None):
        super().__init__(config, axis_name=axis_name)
        self._num_classes = config.model.num_classes
        self._transform = None
        if changes_anything(config.augment):
            self._transform = self._make_transform(config)

    def _make_transform(self, config: Any) -> Callable[..., Any]:
        return make_transform(augment.augment_view, config)

    def batches(
        self,
        dataset: "SliceDataset",
        options: "BatchOptions",
        split: "Split",
        *,
        start_step: int = 0,
    ) -> "grain.DatasetIterator":
        """Batches of labelled slices; see `kafjax.data.batches.segmentation_batches`."""
        from kafjax.data.batches import segmentation_batches

        return segmentation_batches(dataset, options, volumes=split.train, start_step=start_step)

    def sample(self, dataset: "SliceDataset", record: int) -> Batch:
        """The record's slice with its label."""
        from kafjax.data.samples import make_labelled

        return make_labelled(dataset, 0, record, seed=self._config.seed, **self.patch)

    def augment(self, batch: Batch) -> Batch:
        """Transforms every slice with its label, with keys that depend only on seed and sample."""
        if self._transform is None:
            return batch

        def one(key: jax.Array, image: Any, keypoints: Any, mask: Any, label: Any) -> Any:
            assert self._transform is not None
            return self._transform(key, image, keypoints, mask, label=label[..., None] - outside)

        # Outside the slice is background, or, where labels are sparse, more than is annotated.
        outside = IGNORED if self._config.data.get("sparse_labels") else 0
        fields = ("image", "keypoints", "keypoint_mask", "label")
        image, keypoints, mask, label = jax.vmap(one)(
            sample_keys(batch), *(batch[field] for field in fields)
        )
        label = label[..., 0] + outside
        moved = dict(zip(fields, (image, keypoints, mask, label), strict=True))
        return {**batch, **moved}

    def loss(
        self, params: Any, batch_stats: Any, batch: Batch
    ) -> tuple[jax.Array, tuple[Metrics, Any]]:
        """The total loss of a training step, its metrics, and the new running statistics.

        The metric `dice` is pooled over the whole batch, the mean over the classes in the labels or
        predictions, and 1 if there are none.
        """
        batch = self.augment(batch)
        logits, batch_stats = self.apply(params, batch_stats, batch)
        total, metrics = self._supervise(logits, batch)
        return total, (metrics, batch_stats)

    def _supervise(self, logits: jax.Array, batch: Batch) -> tuple[jax.Array, Metrics]:
        """The loss by labels, and a step's metrics."""
        terms = self._terms(logits, batch["label"])
        total = self._weigh(terms)
        counts = self._count(self.labels(logits), batch["label"])
        dice = jnp.nan_to_num(jnp.nanmean(pooled_dice(self._sum(counts))), nan=1.0)
        metrics = {
            "loss": total,
            **({f"loss_{name}": term for name, term in terms.items()} if len(terms) > 1 else {}),
            "dice": dice,
            "keypoints": jnp.mean(jnp.sum(batch["keypoint_mask"], axis=-1)),
        }
        return total, metrics

    @property
    def _groups(self) -> Groups | None:
        """The labels of each structure that is scored; by default of each class its own."""
        return None

    def probabilities(self, logits: jax.Array) -> jax.Array:
        """Probabilities of the classes."""
        return jax.nn.softmax(logits)

    def labels(self, logits: jax.Array) -> jax.Array:
        """The predicted classes."""
        return jnp.argmax(logits, axis=-1)

    def _count(self, labels: jax.Array, label: jax.Array, **valid: jax.Array) -> jax.Array:
        return count_pixels(labels, label, self._num_classes, groups=self._groups, **valid)

    def _sum(self, counts: jax.Array) -> jax.Array:
        """The sum over devices."""
        return counts if self._axis_name is None else jax.lax.psum(counts, self._axis_name)

    def _weigh(self, terms: Metrics) -> jax.Array:
        weights = self._config.loss.weights
        return sum((weights[name] * term for name, term in terms.items()), jnp.zeros(()))

    def _terms(self, logits: jax.Array, label: jax.Array) -> Metrics:
        """The unweighted losses with a non-zero weight."""
        config = self._config.loss
        options = {
            "class_weights": config.class_weights,
            "ignoring": self._ignores,
            "axis_name": self._axis_name,
        }
        named = {"cross_entropy": losses.cross_entropy, "dice": losses.dice_loss}
        return {
            name: loss(logits, label, **options)
            for name, loss in named.items()
            if config.weights[name]
        }

    def predict(self, variables: Any, batch: Batch) -> jax.Array:
        """Logits [b, h, w, d] of unaugmented slices, with the running statistics."""
        fields = ("image", "keypoints", "keypoint_mask")
        inputs = (batch[field] for field in fields)
        logits: Any = self._model.apply(variables, *inputs, train=False)
        return logits

    def count(self, variables: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Validates slices, each separately.

        Returns:
          Pixel counts int32 [b, d, 3] to sum over slices, 0 for invalid ones, and the predicted
          classes uint8 [b, h, w].
        """
        prediction = self.labels(self.predict(variables, batch))

        def one(*of_slice: jax.Array) -> jax.Array:
            classes, label, valid = (x[None] for x in of_slice)
            return self._count(classes, label, valid=valid)

        counts = jax.vmap(one)(prediction, batch["label"], batch["valid"])
        return counts, prediction.astype(jnp.uint8)

    def scores(self, counts: np.ndarray) -> dict[str, float]:
        """Pooled Dice from summed counts: the mean over classes, and each class that occurs."""
        dice = pooled_dice(counts)
        each = {f"validation_dice_{i + 1}": float(x) for i, x in enumerate(dice) if not np.isnan(x)}
        return {"validation_dice": mean_pooled_dice(counts), **each}

    def picture(self, batch: Batch) -> dict[str, np.ndarray]:
        """The batch's first slice as training sees it: name -> uint8 [h, w, 3]."""
        from kafjax.drawing.overlay import draw_sample

        seen = self.first_seen(batch)
        image, label = seen["image"][..., 0], seen["label"]
        return {"slice": draw_sample(image, label, seen["keypoints"], seen["keypoint_mask"])}
