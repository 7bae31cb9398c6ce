"""Slices with their reference, the predictions of runs, and the Dice of each prediction.

Validation, figures and reports draw them with this module.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from kafjax.drawing.figures import (
    LINE,
    WIDTH,
    make_grid,
    wrap,
    write_above,
    write_below,
    write_beside,
)
from kafjax.drawing.overlay import class_colours, draw_labels, grey

_OPACITY = 0.65  # of classes over a slice


class SegmentedSlice(NamedTuple):
    """A slice, its reference and the predictions of runs; class 0 is the background.

    Attributes:
      title: volume and slice.
      image: [h, w].
      reference: int [h, w].
      predictions: int [h, w] each.
      dice: of each prediction; NaN if neither it nor the reference has a class.
      marks: text after each Dice; none by default.
      pixel_aspect: height of a pixel over its width.
    """

    title: str
    image: np.ndarray
    reference: np.ndarray
    predictions: Sequence[np.ndarray]
    dice: Sequence[float]
    marks: Sequence[str] | None = None
    pixel_aspect: float = 1.0

    def panels(self) -> list[tuple[np.ndarray, str]]:
        """Image, reference and predictions: pictures uint8 [h, w, 3], and the notes below them."""
        marks = self.marks or [""] * len(self.dice)
        texts = ["-" if math.isnan(dice) else f"{dice:.3f}" for dice in self.dice]
        notes = [f"Dice {text}{mark}" for text, mark in zip(texts, marks, strict=True)]
        labels = (self.reference, *self.predictions)
        drawn = [draw_labels(self.image, label, opacity=_OPACITY) for label in labels]
        return list(zip([grey(self.image), *drawn], ["", "", *notes], strict=True))


def draw_segmentations(
    rows: Sequence[SegmentedSlice],
    columns: Sequence[str],
    classes: Sequence[str],
    *,
    footnote: str = "",
) -> Figure:
    """Draws a grid of slices, in grey and with reference and predictions in colour, and a legend.

    Args:
      rows: one for each slice.
      columns: titles of the predictions, one for each prediction of a row.
      classes: names of all classes, the background first; the legend has the visible ones.
      footnote: text next to the legend.
    """
    labels = [label for row in rows for label in (row.reference, *row.predictions)]
    shown = np.unique(np.concatenate([np.unique(label) for label in labels]))
    fills = class_colours(len(classes)) / 255
    patches = [Patch(fc=fills[i], ec="0.3", lw=0.4, label=classes[i]) for i in shown if i > 0]
    patches += [Patch(fc="none", ec="none", label=footnote)] if footnote else []
    heights = [row.image.shape[0] * row.pixel_aspect / row.image.shape[1] for row in rows]
    shape = len(rows), 2 + len(columns)
    titles = [wrap(title, WIDTH / shape[1] - 0.2) for title in ("image", "reference", *columns)]
    top = 0.06 + LINE * max(title.count("\n") + 1 for title in titles)
    grid = make_grid(*shape, max(heights), row_gap=0.17, top=top, bottom=0.2, legend=patches)
    for panel, title in zip(grid[0], titles, strict=True):
        write_above(panel, title)
    for row, axes in zip(rows, grid, strict=True):
        write_beside(axes[0], row.title)
        for panel, (picture, note) in zip(axes, row.panels(), strict=True):
            panel.imshow(picture, interpolation="nearest", aspect=row.pixel_aspect)
            write_below(panel, note)
    figure: Figure = grid[0, 0].figure
    return figure
