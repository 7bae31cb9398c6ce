"""An embedding for each volume, from the encoder of a run."""

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from kafjax.checkpoint.checkpointer import load_variables
from kafjax.data.dataset import SliceDataset
from kafjax.data.patches import choose_keypoints, cut_view, keypoints_inside, patch_origin
from kafjax.models import build_model
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
    encoder = build_model(config.model).encoder
    parts = {name: tree["encoder"] for name, tree in variables.items() if "encoder" in tree}

    @jax.jit
    def encode(parts: Any, image: Any, keypoints: Any, mask: Any) -> Any:
        center = encoder.apply(parts, image, keypoints, mask, train=False).center
        return center.astype(np.float32).mean(axis=(1, 2))

    records = [record for name in volumes for record in dataset.volumes[name]]
    views = (_view(dataset, record, config) for record in records)
    features = [encode(parts, *batch) for batch in _batches(views, config.batch_size)]
    of_slice = iter(np.concatenate(features))
    means = [np.mean([next(of_slice) for _ in dataset.volumes[name]], axis=0) for name in volumes]
    return normalise(np.stack(means))


def normalise(embeddings: np.ndarray) -> np.ndarray:
    """Vectors [n, c] divided by their lengths."""
    lengths = np.linalg.norm(embeddings, axis=-1, keepdims=True)
    return embeddings / np.maximum(lengths, np.finfo(np.float32).tiny)


def _view(dataset: SliceDataset, record: int, config: Any) -> dict[str, np.ndarray]:
    """A slice's central patch, as in evaluation."""
    whole, size = dataset.read(record), tuple(config.data.patch_size)
    origin = patch_origin(whole.image.shape[:2], size, None)
    inside = keypoints_inside(whole.keypoints, whole.mask, origin, size)
    strongest = dataset.metadata.get("keypoint_order") == "strength"
    places = config.data.get("patch_keypoints")
    chosen = choose_keypoints(inside, places, None, strongest=strongest)
    return cut_view(whole.image, whole.keypoints, whole.mask, origin, size, chosen=chosen)


def _batches(views: Iterator[dict[str, np.ndarray]], size: int) -> Iterator[list[np.ndarray]]:
    """Image, keypoints and mask of `size` views; the last batch is filled up with its first view.

    What the fillers give is at the end and left over.
    """
    while some := list(itertools.islice(views, size)):
        full = some + some[:1] * (size - len(some))
        yield [np.stack([v[f] for v in full]) for f in ("image", "keypoints", "keypoint_mask")]
