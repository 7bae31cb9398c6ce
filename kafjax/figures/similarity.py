"""Figure 4 of the appendix: the similarity of a query point's feature to all others.

A point of a slice has a feature in a run's encoder at each level; the maps show its cosine with the
features of the slice, of a neighbour, and of both after augmentation. If features follow the
anatomy, the maps are bright only at the query and its counterparts. Levels are 0
to 3, finest first, and 4, the centre.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kafjax.augment import AugmentConfig
from kafjax.checkpoint.checkpointer import load_variables
from kafjax.data.dataset import SliceDataset, context_of
from kafjax.data.patches import PatchSize, patch_origin
from kafjax.data.samples import Batch
from kafjax.drawing.colours import VERMILION
from kafjax.drawing.figures import FONT_SIZE, make_grid, wrap, write_above, write_beside
from kafjax.drawing.overlay import grey
from kafjax.errors import UserError
from kafjax.figures.choice import (
    augment_sample,
    check_run_dataset,
    choose_offset,
    make_chosen_pair,
)
from kafjax.models import encoder_of
from kafjax.models.unet import NUM_LEVELS
from kafjax.workdir.workdir import Workdir, name_runs

LEVELS = range(NUM_LEVELS + 1)
_MULTIPLE = 2**NUM_LEVELS
_COLUMNS = ("slice", "neighbour", "slice,\naugmented", "neighbour,\naugmented")
_COLOUR_MAP = "cividis"
_RED = VERMILION  # stands out from grey, blue and yellow
_STAR: dict[str, Any] = {"marker": "*", "mfc": _RED, "mec": "white", "mew": 0.5, "ls": ""}
_RING: dict[str, Any] = {"marker": "o", "mfc": "none", "mec": _RED, "mew": 1.0, "ls": ""}
_MOST_LEVELS = 3  # that fit a page's width
_ALWAYS = AugmentConfig(spatial_probability=1.0)  # without a transform the views are equal


class Point(NamedTuple):
    """The position of an anatomical point in the four views, and in which of them it is visible.

    Attributes:
      places: int [4, 2], (row, col) in the slice, its neighbour, and both augmented.
      found: bool [4].
    """

    places: np.ndarray
    found: np.ndarray


class Views(NamedTuple):
    """A slice, its neighbour, and both augmented, as network inputs.

    Attributes:
      images: float32 [4, h, w, c].
      keypoints: int32 [4, k, 2].
      masks: bool [4, k].
      query: the point whose feature is compared.
    """

    images: np.ndarray
    keypoints: np.ndarray
    masks: np.ndarray
    query: Point


def similarity_figure(
    dataset: SliceDataset,
    record: int,
    workdirs: Sequence[str | os.PathLike[str]],
    *,
    query: tuple[int, int] | None = None,
    offset: int | None = None,
    levels: Sequence[int] = (1, 3),
    seed: int = 0,
) -> Figure:
    """Draws a row of maps for each run, four at each level.

    Args:
      dataset: where the slices are.
      record: number of the slice's record.
      workdirs: of pretraining or segmentation runs, of any network.
      query: (row, col) in the slice; by default its keypoint with the most correspondences.
      offset: of the neighbour; by default the next slice, else the previous one.
      levels: of the encoder, one to three of 0 to 4.
      seed: of the augmentation.

    Raises:
      ValueError: no such neighbour, query, level or run, or a run on another dataset.
    """
    _check_levels(levels)
    configs = [_read_config(workdir, dataset) for workdir in workdirs]
    dataset = dataset.with_context(max(map(context_of, configs)))
    patch_size = _patch_size(dataset, record, configs[0])
    offset = choose_offset(dataset, record, offset)
    views = make_views(dataset, record, offset, query=query, patch_size=patch_size, seed=seed)
    maps = [
        similarity_maps(config, _load(workdir), views, levels)
        for config, workdir in zip(configs, workdirs, strict=True)
    ]
    names = name_runs(workdirs)
    title = f"{dataset.describe_record(record)}, neighbour {offset:+d}"
    return _draw(views, dict(zip(names, maps, strict=True)), levels, title)


def make_views(
    dataset: SliceDataset,
    record: int,
    offset: int,
    *,
    query: tuple[int, int] | None,
    patch_size: PatchSize,
    seed: int,
) -> Views:
    """The four views of a pair, with the query's position in each.

    Args:
      query: (row, col) in the slice's own pixels, or None for a keypoint.
      patch_size: not smaller than the slice.

    Others as in `similarity_figure`. Raises `ValueError` for a query outside the slice, or without
    a query if the slice has no keypoints.
    """
    whole = dataset.read(record)
    size = whole.image.shape[0], whole.image.shape[1]
    sample = make_chosen_pair(dataset, record, offset, patch_size=patch_size, seed=seed)
    added = (0, 0) if query is None else query
    if not all(0 <= place < length for place, length in zip(added, size, strict=True)):
        raise UserError(
            f"the query is {query}; expected a pixel of {size[0]} rows, {size[1]} columns"
        )
    # The query is an additional keypoint of both slices.
    sample = _append(sample, added - patch_origin(size, patch_size, None))
    moved = augment_sample(sample, mode="analytic", config=_ALWAYS)
    counts = (whole.correspondences >= 0).sum(axis=0)
    index = choose_query(counts, sample, moved) if query is None else len(counts)
    partner = sample["correspondence"][index]
    fields = ("image", "keypoints", "keypoint_mask")
    images, keypoints, masks = (np.concatenate([sample[f], moved[f]]) for f in fields)
    chosen = np.array([index, partner, index, partner])
    point = Point(keypoints[range(4), chosen], masks[range(4), chosen] & (chosen >= 0))
    return Views(images, keypoints[:, :-1], masks[:, :-1], point)


def choose_query(counts: np.ndarray, before: Batch, after: Batch) -> int:
    """The keypoint with the most correspondences; ties go to the one nearest the centre.

    Keypoints that correspond in both pairs come first, then those real in both.

    Args:
      counts: int [k], correspondences of the slice's keypoints with all neighbours.
      before: a pretraining sample of at least k keypoints.
      after: the same, augmented.

    Raises:
      ValueError: the slice has no keypoint.
    """
    k = len(counts)
    masks = [sample["keypoint_mask"][0, :k] for sample in (before, after)]
    if not masks[0].any():
        raise UserError("the slice has no keypoint; expected a point of it as --query")
    matched = (before["correspondence"][:k] >= 0) & (after["correspondence"][:k] >= 0)
    middle = np.array(before["image"].shape[1:3]) / 2
    distance = np.linalg.norm(before["keypoints"][0, :k] - middle, axis=-1)
    order = np.lexsort((distance, -counts, ~matched, ~masks[1], ~masks[0]))
    return int(order[0])


def similarity_maps(
    config: Any, variables: Mapping[str, Any], views: Views, levels: Sequence[int]
) -> list[np.ndarray]:
    """Cosine of the query's feature in the slice with every feature of the views.

    Args:
      config: of a run.
      variables: {'params', 'batch_stats'} of its network.
      views: the network's inputs.
      levels: of the encoder.

    Returns:
      For each level float32 [4, h, w] at the level's resolution, in [-1, 1].
    """
    encoder, parts = encoder_of(config.model, variables)

    @jax.jit
    def encode(variables: Any, *inputs: Any) -> Any:
        encoding = encoder.apply(variables, *inputs, train=False)
        return (*encoding.levels, encoding.center)

    # A smaller context than another run's is the first of the channels.
    images = views.images[..., : config.model.get("num_channels") or 1]
    features = encode(parts, images, views.keypoints, views.masks)
    chosen = [np.asarray(features[level], np.float32) for level in levels]
    place = views.query.places[0]
    return [cosine_map(x, place * x.shape[1:3] // views.images.shape[1:3]) for x in chosen]


def cosine_map(features: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Cosine [b, h, w] of features [b, h, w, c] with that of the first map at (row, col)."""
    norms = np.linalg.norm(features, axis=-1, keepdims=True)
    units = features / np.maximum(norms, np.finfo(np.float32).tiny)
    return units @ units[0, place[0], place[1]]


def _check_levels(levels: Sequence[int]) -> None:
    known = all(level in LEVELS for level in levels)
    if not known or not 1 <= len(levels) <= _MOST_LEVELS:
        given, choices = " ".join(map(str, levels)), ", ".join(map(str, LEVELS))
        raise UserError(f"levels are {given}; expected one to {_MOST_LEVELS} of {choices}")


def _append(sample: Batch, place: np.ndarray) -> Batch:
    """The sample with one more keypoint, unmatched, at the same place of both views."""
    places = np.broadcast_to(place, (2, 1, 2)).astype(np.int32)
    return {
        **sample,
        "keypoints": np.concatenate([sample["keypoints"], places], axis=1),
        "keypoint_mask": np.pad(sample["keypoint_mask"], ((0, 0), (0, 1)), constant_values=True),
        "correspondence": np.pad(sample["correspondence"], (0, 1), constant_values=-1),
    }


def _read_config(workdir: str | os.PathLike[str], dataset: SliceDataset) -> Any:
    config = ml_collections.ConfigDict(Workdir(workdir).read_config())
    check_run_dataset(workdir, config, dataset)
    return config


def _load(workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """The variables of the best step by validation, or of the newest without validation."""
    return load_variables(workdir, step=Workdir(workdir).select_step()[0])


def _patch_size(dataset: SliceDataset, record: int, config: Any) -> PatchSize:
    """The run's patch, enlarged to the slice so that nothing is cropped."""
    rows, columns, _ = dataset.read(record).image.shape
    h, w = config.data.patch_size
    return max(h, -(-rows // _MULTIPLE) * _MULTIPLE), max(w, -(-columns // _MULTIPLE) * _MULTIPLE)


def _draw(
    views: Views, maps: Mapping[str, Sequence[np.ndarray]], levels: Sequence[int], title: str
) -> Figure:
    """A row of images above a row of maps for each run, and a colour bar for all."""
    _, height, width, _ = views.images.shape
    gaps = [0.03 if i % 4 else 0.14 for i in range(1, 4 * len(levels))]
    shape = 1 + len(maps), 4 * len(levels)
    grid = make_grid(
        *shape, height / width, gaps=gaps, row_gap=0.03, top=0.47, bottom=0.12, legend=_legend()
    )
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    lowest = min(float(x.min()) for of_run in maps.values() for x in of_run)
    for j, axes in enumerate(grid[0]):
        axes.imshow(grey(views.images[j % 4, ..., 0]), extent=extent)
        write_above(axes, _COLUMNS[j % 4])
        for i, of_run in enumerate(maps.values(), start=1):
            similarity = of_run[j // 4][j % 4]
            style = {"vmin": lowest, "vmax": 1.0, "cmap": _COLOUR_MAP, "interpolation": "nearest"}
            colours = grid[i, j].imshow(similarity, extent=extent, **style)
        for panel in grid[:, j]:
            _mark(panel, views.query, j % 4)
    figure: Figure = grid[0, 0].figure
    for axes, name in zip(grid[1:, 0], maps, strict=True):
        write_beside(axes, wrap(name, axes.get_position().height * figure.get_figheight()))
    _write_levels(grid, next(iter(maps.values())), levels)
    _add_colour_bar(figure, colours)
    x, y = 1 - 0.03 / figure.get_figwidth(), 0.09 / figure.get_figheight()
    figure.text(x, y, title, fontsize=FONT_SIZE, ha="right", va="center")
    return figure


def _legend() -> list[Line2D]:
    return [
        Line2D([], [], label="query", markersize=8, **_STAR),
        Line2D([], [], label="keypoint that corresponds", markersize=5, **_RING),
    ]


def _mark(axes: Axes, query: Point, view: int) -> None:
    """A star at the query, and a ring at its counterpart in the neighbour."""
    if query.found[view]:
        row, column = query.places[view]
        style = {"markersize": 4.5, **_RING} if view % 2 else {"markersize": 6.0, **_STAR}
        axes.plot(column, row, **style)


def _write_levels(grid: np.ndarray, maps: Sequence[np.ndarray], levels: Sequence[int]) -> None:
    """A heading over the four columns of each level."""
    figure = grid[0, 0].figure
    for i, (level, of_level) in enumerate(zip(levels, maps, strict=True)):
        first, last = (grid[0, 4 * i + j].get_position() for j in (0, 3))
        _, rows, columns = of_level.shape
        text = f"level {level}: {rows} x {columns} features"
        middle = (first.x0 + last.x1) / 2
        top = 1 - 0.05 / figure.get_figheight()
        figure.text(middle, top, text, fontsize=FONT_SIZE + 1, ha="center", va="top")


def _add_colour_bar(figure: Figure, colours: Any) -> None:
    """A horizontal bar at the bottom left."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((0.3 / width, 0.15 / height, 1.2 / width, 0.07 / height))
    bar = figure.colorbar(colours, cax=axes, orientation="horizontal")
    axes.tick_params(labelsize=FONT_SIZE - 1, length=2, pad=1)
    style: dict[str, Any] = {"fontsize": FONT_SIZE, "va": "center", "transform": axes.transAxes}
    axes.text(1.08, 0.5, "cosine", **style)
    bar.outline.set_linewidth(0.4)
