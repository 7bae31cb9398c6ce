"""Batches with nothing to learn from: a thousand steps, all finite, and what is skipped counted."""

from collections.abc import Callable, Iterator

import jax
import numpy as np

from kafjax.tasks.base import Batch
from kafjax.tasks.pretraining import Pretraining
from kafjax.training.step import (
    AXIS_NAME,
    init_state,
    make_optimizer,
    make_update,
    replicate,
    step_inputs,
    to_host,
)
from tests.campaigns.campaign import Settings, Tally
from tests.runs import random_batch, tiny_config

USUAL = 1000
_SIZE, _PLACES = 4, 16


def _no_keypoint(batch: Batch, rng: np.random.Generator) -> None:
    batch["keypoint_mask"][:] = False


def _no_keypoint_in_some(batch: Batch, rng: np.random.Generator) -> None:
    batch["keypoint_mask"][rng.random(batch["keypoint_mask"].shape[:2]) < 0.5] = False


def _one_keypoint(batch: Batch, rng: np.random.Generator) -> None:
    batch["keypoint_mask"][:] = np.arange(_PLACES) == int(rng.integers(_PLACES))


def _all_at_one_pixel(batch: Batch, rng: np.random.Generator) -> None:
    batch["keypoints"][:] = rng.integers(0, 32, 2)


def _all_in_a_corner(batch: Batch, rng: np.random.Generator) -> None:
    batch["keypoints"][:] = 31 * rng.integers(0, 2, 2)


def _blank(batch: Batch, rng: np.random.Generator) -> None:
    batch["image"][:] = 0


def _blank_with_keypoints_in_one(batch: Batch, rng: np.random.Generator) -> None:
    batch["image"][int(rng.integers(_SIZE))] = 0


def _bright(batch: Batch, rng: np.random.Generator) -> None:
    batch["image"][:] *= 1e4


def _one_slice_volume(batch: Batch, rng: np.random.Generator) -> None:
    """Both views are the only slice of their volume, which corresponds with itself."""
    for field in ("image", "keypoints", "keypoint_mask"):
        batch[field][:, 1] = batch[field][:, 0]
    batch["correspondence"][:] = np.where(batch["keypoint_mask"][:, 0], np.arange(_PLACES), -1)
    batch["position"][:] = 1, 1


def _no_positive_pair(batch: Batch, rng: np.random.Generator) -> None:
    batch["position"][:, 0] = np.arange(_SIZE) + 1
    batch["position"][:, 1] = _SIZE


def _all_positive(batch: Batch, rng: np.random.Generator) -> None:
    batch["position"][:] = 1, 2


def _no_correspondence(batch: Batch, rng: np.random.Generator) -> None:
    batch["correspondence"][:] = -1


def _all_the_same(batch: Batch, rng: np.random.Generator) -> None:
    for field in ("image", "keypoints", "keypoint_mask", "correspondence", "position"):
        batch[field][:] = batch[field][:1]


KINDS: dict[str, Callable[[Batch, np.random.Generator], None]] = {
    "no keypoint": _no_keypoint,
    "no keypoint in half of the slices": _no_keypoint_in_some,
    "one keypoint": _one_keypoint,
    "all keypoints at one pixel": _all_at_one_pixel,
    "all keypoints in a corner": _all_in_a_corner,
    "blank slices": _blank,
    "one blank pair": _blank_with_keypoints_in_one,
    "ten thousand times as bright": _bright,
    "volumes of one slice": _one_slice_volume,
    "no positive pair": _no_positive_pair,
    "every pair positive": _all_positive,
    "no correspondence": _no_correspondence,
    "one sample throughout": _all_the_same,
}


def uncounted(batch: Batch, metrics: dict[str, np.ndarray], threshold: float) -> str:
    """What of a batch is skipped by the losses and missing from the metrics' shares, or nothing.

    Augmentation may move more keypoints out of a slice, and never one back in.
    """
    without_keypoints = ~batch["keypoint_mask"].any(axis=-1)
    without_correspondence = (batch["correspondence"] < 0).all(axis=-1)
    position = batch["position"][:, 0] / batch["position"][:, 1]
    apart = np.abs(position[:, None] - position) >= threshold
    alone = apart.sum(axis=1) == len(apart) - 1
    least = {
        "slices_without_keypoints": without_keypoints.mean(),
        "pairs_without_correspondence": without_correspondence.mean(),
        "samples_without_positive": alone.mean(),
    }
    missed = [
        f"{name} is {metrics[name]:.3f} of at least {share:.3f}"
        for name, share in least.items()
        if metrics[name] < share - 1e-6
    ]
    return "; ".join(missed)


def run(settings: Settings) -> Iterator[Tally]:
    """One network takes a step on each kind in turn, at the rate of the paper; one compilation."""
    rng = settings.generator("degenerate")
    config = tiny_config(
        settings.scratch / "a/b/c",
        **{"batch_size": _SIZE, "model.name": "kaf_unet", "optimizer.learning_rate": 0.002},
    )
    task = Pretraining(config, axis_name=AXIS_NAME)
    optimizer = make_optimizer(config.optimizer)
    update = make_update(task, optimizer)
    state = replicate(init_state(task, optimizer))
    tally = Tally("degenerate batches: steps without NaN, skipped items counted")
    names = list(KINDS)
    for i in range(settings.tries(USUAL)):
        name = names[i % len(names)]
        batch = random_batch(_SIZE, _PLACES, seed=i)
        KINDS[name](batch, rng)
        state, metrics = update(state, *step_inputs(batch, config.optimizer.learning_rate))
        values = to_host(metrics)
        if bad := [field for field, value in values.items() if not np.isfinite(value)]:
            tally.add("silent", f"step {i}, {name}: {', '.join(bad)} not finite")
            break
        missed = uncounted(batch, values, config.loss.position_threshold)
        tally.expect(not missed, f"step {i}, {name}: {missed}")
    faulty = [x.shape for x in jax.tree.leaves(state) if not np.isfinite(np.asarray(x)).all()]
    if faulty:
        tally.add("silent", f"{len(faulty)} arrays of the state are not finite")
    yield tally
