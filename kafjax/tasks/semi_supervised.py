"""Segmentation from a few labelled slices and many unlabelled ones, with a teacher.

The teacher is the network with the run's averaged weights (`optimizer.average_decay`), which are
also what validation and prediction use. It sees a batch's slices without changes of intensity, and
normalises by the batch's own statistics: running ones lag behind, and are partly those of mixed
slices. `config.semi.method`:

    mean_teacher    the student's probabilities in every slice are drawn to the teacher's
                    (Tarvainen and Valpola, NeurIPS 2017; there both see noise)
    copy_paste      a box of each labelled slice is pasted into an unlabelled one and the reverse;
                    the teacher's classes, of each only the largest component, are the labels there
                    (Bai et al., CVPR 2023; there a separate run on labelled slices comes first)

The weight of the unlabelled part is 0 during the fraction `start` of the schedule and then rises to
`weight` over the fraction `ramp`. Until `start` the unlabelled places of a batch hold labelled
slices, so copy_paste mixes labelled with labelled: the paper's first stage, in the same run.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from kafjax import augment
from kafjax.components import largest_components
from kafjax.intensity import augment_intensity
from kafjax.labels import IGNORED
from kafjax.losses import consistency
from kafjax.mixing import draw_box, paste_keypoints
from kafjax.tasks.base import Batch, Metrics, make_intensity, make_transform, sample_keys
from kafjax.tasks.segmentation import Segmentation

if TYPE_CHECKING:
    import grain

    from kafjax.data.batches import BatchOptions
    from kafjax.data.dataset import SliceDataset
    from kafjax.data.splits import Split

METHODS = ("mean_teacher", "copy_paste")

# Numbers folded into a sample's key that `augment_view` does not use for its own.
_INTENSITY = 100
_BOX = 101


def ramp_up(progress: jax.Array, *, start: float, ramp: float) -> jax.Array:
    """The fraction of the largest weight after a fraction of the schedule.

    0 before `start`; then exp(-5 (1 - t)^2) while t rises from 0 to 1 over `ramp` (Laine and Aila,
    ICLR 2017).

    Args:
      progress: float, any shape.
      start: in [0, 1].
      ramp: in [0, 1].
    """
    t = jnp.clip((progress - start) / max(ramp, 1e-9), 0, 1)
    return jnp.where(progress < start, 0.0, jnp.exp(-5 * (1 - t) ** 2))


class SemiSupervised(Segmentation):
    """Segmentation with `config.semi`.

    Batches are those of `kafjax.data.batches.semi_supervised_batches`. Args and errors are those of
    `Segmentation`.
    """

    has_teacher = True
    _ignores = True

    def _make_transform(self, config: Any) -> Callable[..., Any]:
        return make_transform(augment.augment_view, config, with_intensity=False)

    def batches(
        self,
        dataset: "SliceDataset",
        options: "BatchOptions",
        split: "Split",
        *,
        start_step: int = 0,
    ) -> "grain.DatasetIterator":
        """Batches with the split's unlabelled volumes; see `semi_supervised_batches`."""
        from kafjax.data.batches import semi_supervised_batches, steps_per_epoch

        epoch = steps_per_epoch(dataset, options.num_labelled, split.train, labelled=True)
        schedule_steps = self._config.num_epochs * epoch
        return semi_supervised_batches(
            dataset,
            options,
            volumes=split.train,
            unlabelled=split.unlabelled,
            labelled_steps=int(np.ceil(self._config.semi.start * schedule_steps)),
            schedule_steps=schedule_steps,
            start_step=start_step,
        )

    def sample(self, dataset: "SliceDataset", record: int) -> Batch:
        """The record's slice with its label."""
        fields = super().sample(dataset, record)
        return {**fields, "labelled": np.array(True), "progress": np.array(0, np.float32)}

    def augment(self, batch: Batch) -> Batch:
        """What the student sees, before slices are mixed."""
        return self._change_intensities(self._warp(batch))

    def _warp(self, batch: Batch) -> Batch:
        """What the teacher sees: every slice moved with its keypoints and label."""
        moved = super().augment(batch)
        known = batch["labelled"][:, None, None]
        return {**moved, "label": jnp.where(known, moved["label"], IGNORED)}

    def _change_intensities(self, batch: Batch) -> Batch:
        config = self._config.augment
        intensity = make_intensity(self._config) if config is not None else None
        if intensity is None:
            return batch

        def one(key: jax.Array, image: jax.Array) -> jax.Array:
            return augment_intensity(jax.random.fold_in(key, _INTENSITY), image, config=intensity)

        return {**batch, "image": jax.vmap(one)(sample_keys(batch), batch["image"])}

    def loss(
        self, params: Any, batch_stats: Any, batch: Batch, teacher: Any = None
    ) -> tuple[jax.Array, tuple[Metrics, Any]]:
        """The loss by labels plus the weighted loss by the teacher; metrics; running statistics.

        Args:
          params: the student's.
          batch_stats: the student's running statistics.
          batch: a device's part.
          teacher: averaged {'params', 'batch_stats'}; by default the student's own.
        """
        teacher = teacher or {"params": params, "batch_stats": batch_stats}
        weak = self._warp(batch)
        strong = self._change_intensities(weak)
        method = self._mean_teacher if self._config.semi.method == "mean_teacher" else self._paste
        total, by_teacher, (metrics, batch_stats) = method(
            params, batch_stats, teacher, weak, strong
        )
        semi = self._config.semi
        risen = ramp_up(batch["progress"][0], start=semi.start, ramp=semi.ramp)
        total += semi.weight * risen * by_teacher
        labelled = self._sum(jnp.sum(batch["labelled"], dtype=jnp.float32))
        unlabelled = self._sum(jnp.sum(~batch["labelled"], dtype=jnp.float32))
        metrics |= {
            "loss": total,
            "loss_unlabelled": by_teacher,
            "unlabelled_weight": semi.weight * risen,
            "labelled_slices": labelled,
            "unlabelled_slices": unlabelled,
        }
        return total, (metrics, batch_stats)

    def _mean_teacher(
        self, params: Any, batch_stats: Any, teacher: Any, weak: Batch, strong: Batch
    ) -> tuple[jax.Array, jax.Array, tuple[Metrics, Any]]:
        """(loss by labels, loss by the teacher, (metrics, new running statistics))."""
        logits, batch_stats = self.apply(params, batch_stats, strong)
        total, metrics = self._supervise(logits, strong)
        return total, consistency(logits, self._teach(teacher, weak)), (metrics, batch_stats)

    def _paste(
        self, params: Any, batch_stats: Any, teacher: Any, weak: Batch, strong: Batch
    ) -> tuple[jax.Array, jax.Array, tuple[Metrics, Any]]:
        """(loss by labels, loss by the teacher, (metrics, new running statistics))."""
        second = {name: values[1::2] for name, values in weak.items()}
        classes = jnp.argmax(self._teach(teacher, second), axis=-1)
        classes = largest_components(classes, self._num_classes)
        mixed, pseudo = self.mix(strong, classes)
        logits, batch_stats = self.apply(params, batch_stats, mixed)
        total, metrics = self._supervise(logits, mixed)
        by_teacher = self._weigh(self._terms(logits, pseudo))
        return total, by_teacher, (metrics, batch_stats)

    def _teach(self, teacher: Any, batch: Batch) -> jax.Array:
        """The teacher's logits."""
        logits, _ = self.apply(teacher["params"], teacher["batch_stats"], batch)
        return jax.lax.stop_gradient(logits)

    def mix(self, batch: Batch, classes: jax.Array) -> tuple[Batch, jax.Array]:
        """Slices 0 and 1, 2 and 3, ... of a batch with a box exchanged.

        Args:
          batch: of b slices.
          classes: int [b / 2, h, w], the teacher's, of the second slice of each pair.

        Returns:
          The batch, whose labels are `IGNORED` where a slice without a label is shown; and int
          [b, h, w], the teacher's classes there and `IGNORED` elsewhere.
        """
        first, second = ({name: values[i::2] for name, values in batch.items()} for i in (0, 1))
        pseudo = jnp.where(second["labelled"][:, None, None], IGNORED, classes)
        height, width = classes.shape[1:]

        def one(key: jax.Array) -> jax.Array:
            key = jax.random.fold_in(key, _BOX)
            return draw_box(key, (height, width), share=self._config.semi.box)

        box = jax.vmap(one)(sample_keys(first))
        none = jnp.full_like(pseudo, IGNORED)

        def paste(inner: Batch, outer: Batch) -> Batch:
            keypoints, mask = jax.vmap(paste_keypoints)(
                *(inner["keypoints"], inner["keypoint_mask"]),
                *(outer["keypoints"], outer["keypoint_mask"]),
                box,
            )
            return {
                "image": jnp.where(box[..., None], inner["image"], outer["image"]),
                **{n: jnp.where(box, inner[n], outer[n]) for n in ("label", "pseudo")},
                "keypoints": keypoints,
                "keypoint_mask": mask,
            }

        first, second = {**first, "pseudo": none}, {**second, "pseudo": pseudo}
        both = (paste(first, second), paste(second, first))
        mixed = {name: _interleave(*(side[name] for side in both)) for name in both[0]}
        return mixed, mixed.pop("pseudo")


def _interleave(first: jax.Array, second: jax.Array) -> jax.Array:
    """[n, ...] and [n, ...] in turn: [2 n, ...]."""
    return jnp.stack([first, second], axis=1).reshape(-1, *first.shape[1:])
