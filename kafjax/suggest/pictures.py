"""Pictures of suggested volumes."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from kafjax.data.dataset import SliceDataset
from kafjax.drawing.figures import LINE, make_grid, wrap, write_above, write_below, write_beside
from kafjax.drawing.overlay import class_colours, draw_labels, grey

_COLUMNS = 5
_WIDEST = 1.6  # inches of a slice


class UncertainSlice(NamedTuple):
    """A volume's slice with its prediction and entropy.

    Attributes:
      title: volume and slice.
      image: [h, w].
      prediction: int [h, w].
      entropy: [h, w], 0 to 1.
      pixel_aspect: height of a pixel over its width.
    """

    title: str
    image: np.ndarray
    prediction: np.ndarray
    entropy: np.ndarray
    pixel_aspect: float


def draw_typical(dataset: SliceDataset, volumes: Sequence[str]) -> Figure:
    """A row for each volume: five slices at equal distances, with their numbers from 0."""
    rows = []
    for name in volumes:
        records = dataset.volumes[name]
        places = [(2 * i + 1) * len(records) // (2 * _COLUMNS) for i in range(_COLUMNS)]
        rows.append([(place, dataset.read(records[place])) for place in places])
    aspects = [float(row[0][1].spacing[0] / row[0][1].spacing[1]) for row in rows]
    heights = [
        row[0][1].image.shape[0] / row[0][1].image.shape[1] * aspect
        for row, aspect in zip(rows, aspects, strict=True)
    ]
    grid = make_grid(
        len(rows), _COLUMNS, max(heights), row_gap=0.17, top=0.06, bottom=0.2, widest=_WIDEST
    )
    for axes, name, row, aspect in zip(grid, volumes, rows, aspects, strict=True):
        write_beside(axes[0], wrap(name, _WIDEST))
        for panel, (place, one) in zip(axes, row, strict=True):
            panel.imshow(grey(one.image[..., 0]), interpolation="nearest", aspect=aspect)
            write_below(panel, f"slice {place}")
    figure: Figure = grid[0, 0].figure
    return figure


def draw_uncertain(rows: Sequence[UncertainSlice], classes: Sequence[str]) -> Figure:
    """A row for each slice: in grey, with its prediction, and its entropy, yellow at 1."""
    fills = class_colours(len(classes)) / 255
    shown = np.unique(np.concatenate([np.unique(row.prediction) for row in rows]))
    patches = [Patch(fc=fills[i], ec="0.3", lw=0.4, label=classes[i]) for i in shown if i > 0]
    heights = [row.image.shape[0] * row.pixel_aspect / row.image.shape[1] for row in rows]
    grid = make_grid(
        *(len(rows), 3, max(heights)),
        row_gap=0.1,
        top=0.06 + LINE,
        bottom=0.1,
        widest=_WIDEST,
        legend=patches,
    )
    for panel, title in zip(grid[0], ("image", "prediction", "entropy"), strict=True):
        write_above(panel, title)
    for axes, row in zip(grid, rows, strict=True):
        write_beside(axes[0], wrap(row.title, _WIDEST))
        pictures = grey(row.image), draw_labels(row.image, row.prediction), row.entropy
        for panel, picture in zip(axes, pictures, strict=True):
            style = {"vmin": 0, "vmax": 1, "cmap": "cividis"} if picture.ndim == 2 else {}
            panel.imshow(picture, interpolation="nearest", aspect=row.pixel_aspect, **style)
    figure: Figure = grid[0, 0].figure
    return figure
