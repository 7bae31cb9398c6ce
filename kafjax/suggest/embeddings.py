"""An embedding for each volume, from the encoder of a run."""

import os
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from kafjax.checkpoint.checkpointer import load_variables
from kafjax.data.dataset import SliceDataset, context_of
from kafjax.data.samples import make_unlabelled
from kafjax.inference.predictor import full_batches
from kafjax.models import encoder_of
from kafjax.workdir.workdir import Workdir


def embed_volumes(
    workdir: str | os.PathLike[str], dataset: SliceDataset, volumes: Sequence[str]
) -> np.ndarray:
    """Means of the deepest features over the positions and slices of each volume.

    Features of the encoder, as in fine-tuning: the heads of pretraining keep what tells a slice's
    position and drop what tells patients apart. Each slice is seen through the run's patch,
    centrally.

    Args:
      workdir: of a run of any task and network.
      dataset: where the volumes are.
      volumes: their names.

    Returns:
      float32 [n, c], of length 1, for cosine distances.
    """
    folder = Workdir(workdir)
    config = ml_collections.ConfigDict(folder.read_config())
    variables = load_variables(folder.path, step=folder.select_step()[0])
    encoder, parts = encoder_of(config.model, variables)

    @jax.jit
    def encode(parts: Any, image: Any, keypoints: Any, mask: Any) -> Any:
        center = encoder.apply(parts, image, keypoints, mask, train=False).center
        return center.astype(np.float32).mean(axis=(1, 2))

    patch: dict[str, Any] = {
        "patch_size": tuple(config.data.patch_size),
        "patch_keypoints": config.data.get("patch_keypoints"),
    }
    dataset = dataset.with_context(context_of(config))
    views = (
        make_unlabelled(dataset, 0, record, seed=None, **patch)
        for name in volumes
        for record in dataset.volumes[name]
    )
    fields = ("image", "keypoints", "keypoint_mask")
    features = [
        np.asarray(encode(parts, *(batch[field] for field in fields)))[:count]
        for batch, count in full_batches(views, config.batch_size)
    ]
    of_slice = iter(np.concatenate(features))
    means = [np.mean([next(of_slice) for _ in dataset.volumes[name]], axis=0) for name in volumes]
    return normalise(np.stack(means))


def normalise(embeddings: np.ndarray) -> np.ndarray:
    """Vectors [n, c] divided by their lengths."""
    lengths = np.linalg.norm(embeddings, axis=-1, keepdims=True)
    return embeddings / np.maximum(lengths, np.finfo(np.float32).tiny)
