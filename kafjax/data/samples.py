"""Samples for training and validation: patches of one slice, or of a slice and its neighbour.

Layout is NHWC; keypoints are (row, col) in pixels of the patch, and their mask marks the real ones.
Masked keypoints are (0, 0). Images are zero outside the slice; augmentation runs on the device.
Everything random about a sample depends only on the seed and the sample's number.

Sources: Yang et al., NeurIPS 2023 (KAF), appendix on data; the neighbour rules are the release's.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from kafjax.data.dataset import Slice, SliceDataset, neighbour_reach
from kafjax.data.patches import (
    PatchSize,
    choose_keypoints,
    cut_patch,
    cut_view,
    follow_correspondence,
    keypoints_inside,
    patch_origin,
    patch_origin_around,
)
from kafjax.labels import IGNORED

Batch = dict[str, np.ndarray]


def draw_neighbour(rng: np.random.Generator, index: int, num_slices: int, reach: int) -> int:
    """Index of a slice at a uniformly random non-zero offset in -reach..reach, clamped.

    At a volume's border the clamp can return `index` itself.
    """
    offset = int(rng.integers(2 * reach)) - reach
    offset += offset >= 0
    return min(max(index + offset, 0), num_slices - 1)


def make_pair(
    dataset: SliceDataset,
    sample: int,
    record: int,
    *,
    patch_size: PatchSize,
    seed: int,
    patch_keypoints: int | None = None,
) -> Batch:
    """One pretraining sample: the slice `record` and a neighbour, drawn for (seed, sample).

    Returns `image` float32 [2, h, w, c], `keypoints` int32 [2, p, 2], `keypoint_mask` bool [2, p],
    `correspondence` int32 [p] (view 1's keypoint to view 2's index, or -1), `position` int32 [2]
    (the anchor's number, from 1, and the number of slices), `record` int32 [2], `sample` and `seed`
    uint32. In a slice that is its own neighbour every keypoint corresponds to itself. p is
    `patch_keypoints`, or k.
    """
    rng = np.random.default_rng((seed, sample))
    anchor = dataset.read(record)
    reach = neighbour_reach(dataset, record)
    offset = draw_neighbour(rng, anchor.index, anchor.num_slices, reach) - anchor.index
    neighbour = dataset.read(record + offset) if offset else anchor
    both = (anchor, neighbour)
    origins = [patch_origin(view.image.shape[:2], patch_size, rng) for view in both]
    crops = (
        _crop(dataset, view, origin, patch_size, patch_keypoints, rng)
        for view, origin in zip(both, origins, strict=True)
    )
    views, chosen = zip(*crops, strict=True)
    return {
        **{field: np.stack([view[field] for view in views]) for field in views[0]},
        "correspondence": follow_correspondence(_correspondence(anchor, offset), *chosen),
        "position": np.array([anchor.index + 1, anchor.num_slices], np.int32),
        "record": np.array([record, record + offset], np.int32),
        "sample": np.array(sample % 2**32, np.uint32),
        "seed": np.array(seed % 2**32, np.uint32),
    }


def make_labelled(
    dataset: SliceDataset,
    sample: int,
    record: int,
    *,
    patch_size: PatchSize,
    seed: int | None,
    patch_keypoints: int | None = None,
) -> Batch:
    """One labelled slice, cropped at random for (seed, sample), or centrally if seed is None.

    Returns `image` float32 [h, w, c], `label` int32 [h, w], `keypoints` int32 [p, 2],
    `keypoint_mask` bool [p], `record` int32, `sample`, `seed` uint32. p is `patch_keypoints`, or k.
    """
    rng = None if seed is None else np.random.default_rng((seed, sample))
    labelled = dataset.read(record, with_label=True)
    assert labelled.label is not None
    origin = patch_origin(labelled.label.shape, patch_size, rng)
    fields = _labelled_crop(dataset, labelled, origin, patch_size, patch_keypoints, rng)
    return {**fields, **_numbers(sample, record, seed)}


def make_foreground(
    dataset: SliceDataset,
    sample: int,
    record: int,
    *,
    records: Sequence[int] | np.ndarray,
    patch_size: PatchSize,
    seed: int,
    patch_keypoints: int | None = None,
) -> Batch:
    """One labelled slice, cropped at random around a pixel of its foreground, for (seed, sample).

    A slice without foreground is replaced by another of `records`, drawn at random, unless none has
    any. A class is drawn among the slice's, then one of its pixels, as in nnU-Net (Isensee et al.,
    Nature Methods 2021), so that small classes are seen equally often.

    Returns the fields of `make_labelled`.
    """
    rng = np.random.default_rng((seed, sample))
    others = rng.permutation(records)
    candidates = itertools.chain((record,), map(int, others))
    record = next((r for r in candidates if dataset.foreground(r)), record)
    labelled = dataset.read(record, with_label=True)
    assert labelled.label is not None
    classes = dataset.foreground(record)
    if classes:
        pixels = np.argwhere(labelled.label == rng.choice(classes))
        pixel = pixels[rng.integers(len(pixels))]
        origin = patch_origin_around(pixel, labelled.label.shape, patch_size, rng)
    else:
        origin = patch_origin(labelled.label.shape, patch_size, rng)
    fields = _labelled_crop(dataset, labelled, origin, patch_size, patch_keypoints, rng)
    return {**fields, **_numbers(sample, record, seed)}


def make_unlabelled(
    dataset: SliceDataset,
    sample: int,
    record: int,
    *,
    patch_size: PatchSize,
    seed: int | None,
    patch_keypoints: int | None = None,
) -> Batch:
    """One slice cropped as by `make_labelled`, whose label, if it has one, is not read.

    Returns the fields of `make_labelled`; every pixel of the label is `IGNORED`.
    """
    rng = None if seed is None else np.random.default_rng((seed, sample))
    unlabelled = dataset.read(record)
    origin = patch_origin(unlabelled.image.shape[:2], patch_size, rng)
    view, _ = _crop(dataset, unlabelled, origin, patch_size, patch_keypoints, rng)
    label = np.full(patch_size, IGNORED, np.int32)
    return {**view, "label": label, **_numbers(sample, record, seed)}


def _labelled_crop(
    dataset: SliceDataset,
    labelled: Slice,
    origin: np.ndarray,
    patch_size: PatchSize,
    places: int | None,
    rng: np.random.Generator | None,
) -> Batch:
    """A slice's patch with its label."""
    assert labelled.label is not None
    view, _ = _crop(dataset, labelled, origin, patch_size, places, rng)
    # Padding is background, or in datasets with sparse labels not annotated: it would outweigh what
    # is.
    outside = IGNORED if dataset.metadata.get("sparse_labels") else 0
    return {**view, "label": cut_patch(labelled.label - outside, origin, patch_size) + outside}


def _numbers(sample: int, record: int, seed: int | None) -> Batch:
    """A sample's numbers, as fields."""
    return {
        "record": np.array(record, np.int32),
        "sample": np.array(sample % 2**32, np.uint32),
        "seed": np.array((seed or 0) % 2**32, np.uint32),
    }


def _correspondence(anchor: Slice, offset: int) -> np.ndarray:
    """Indices int [k] of the keypoints at a slice offset that match the anchor's, or -1."""
    if offset == 0:
        return np.where(anchor.mask, np.arange(len(anchor.mask)), -1)
    reach = len(anchor.correspondences) // 2
    return anchor.correspondences[offset + reach - (offset > 0)]


def _crop(
    dataset: SliceDataset,
    whole: Slice,
    origin: np.ndarray,
    patch_size: PatchSize,
    places: int | None,
    rng: np.random.Generator | None,
) -> tuple[Batch, np.ndarray]:
    """A slice's patch, and the index of the slice's keypoint in each slot: int [p], or -1."""
    inside = keypoints_inside(whole.keypoints, whole.mask, origin, patch_size)
    strongest = dataset.metadata.get("keypoint_order") == "strength"
    chosen = choose_keypoints(inside, places, rng, strongest=strongest)
    view = cut_view(whole.image, whole.keypoints, whole.mask, origin, patch_size, chosen=chosen)
    return view, chosen
