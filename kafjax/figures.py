"""Pictures of what a run sees, drawn with matplotlib's Agg canvas.

Images are [h, w] or [h, w, 1] of any range, keypoints [k, 2] as (row, col) in pixels of their
image. Each figure has a canvas of its own: no display, no global state of pyplot, and the same
input gives the same bytes.
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

# Okabe and Ito's palette, whose colours readers with any colour vision tell apart.
MATCHED_COLOUR = "#56B4E9"
UNMATCHED_COLOUR = "#E69F00"
LINE_COLOUR = "#009E73"

# Sizes in pixels of the picture.
GAP = 16
TEXT_HEIGHT = 24
_LEAST_HEIGHT = 384  # of the views: smaller images are enlarged by whole factors
_DPI = 100


def draw_pair(
    image_1: ArrayLike,
    image_2: ArrayLike,
    keypoints_1: ArrayLike,
    mask_1: ArrayLike,
    keypoints_2: ArrayLike,
    mask_2: ArrayLike,
    correspondence: ArrayLike,
    *,
    title: str | None = None,
) -> np.ndarray:
    """Draws two views side by side with their keypoints and correspondences.

    Matched keypoints are blue, unmatched ones orange, correspondences green lines; a caption below
    counts them. The grey levels of each view run from its 1st to its 99th percentile.

    Args:
      image_1: [h, w] or [h, w, 1], the left view.
      image_2: of the same h x w, the right view.
      keypoints_1: [k, 2], (row, col).
      mask_1: bool [k], which are real; others are not drawn.
      keypoints_2: [k', 2].
      mask_2: bool [k'].
      correspondence: integer [k], index into keypoints_2 or -1; not drawn where an end is masked.
      title: a line above.

    Returns:
      uint8 [h', w', 3], RGB. With a zoom z >= 1, image pixels are z x z; the left view begins at
      column 0, the right one `GAP` columns after its end, both at row `TEXT_HEIGHT`.

    Raises:
      ValueError: images of different or unsuitable shape.
    """
    views = [np.asarray(image, np.float32) for image in (image_1, image_2)]
    height, width = _common_shape(*views)
    zoom = max(1, round(_LEAST_HEIGHT / height))
    figure, axes = _canvas(height * zoom, 2 * width * zoom + GAP)
    keypoints = [np.asarray(places) for places in (keypoints_1, keypoints_2)]
    masks = [np.asarray(mask, bool) for mask in (mask_1, mask_2)]
    pairs = _real_pairs(np.asarray(correspondence), *masks)

    origins = np.array([[0, 0], [0, width * zoom + GAP]])
    centres = [o + (p + 0.5) * zoom for o, p in zip(origins, keypoints, strict=True)]
    for view, origin in zip(views, origins, strict=True):
        _draw_view(axes, view.reshape(height, width), origin[1], zoom)
    _draw_lines(axes, centres[0][pairs[:, 0]], centres[1][pairs[:, 1]])
    for places, mask, matched in zip(centres, masks, pairs.T, strict=True):
        unmatched = np.setdiff1d(np.flatnonzero(mask), matched)
        _draw_points(axes, places[unmatched], UNMATCHED_COLOUR)
        _draw_points(axes, places[matched], MATCHED_COLOUR)
    counts = f"{masks[0].sum()} and {masks[1].sum()} keypoints, {len(pairs)} correspondences"
    _write(figure, counts, at=TEXT_HEIGHT / 2)
    _write(figure, title or "", at=height * zoom + 1.5 * TEXT_HEIGHT)
    return _render(figure)


def _common_shape(view_1: np.ndarray, view_2: np.ndarray) -> tuple[int, int]:
    shape = view_1.shape
    if view_2.shape != shape or len(shape) not in (2, 3) or shape[2:] not in ((), (1,)):
        raise ValueError(
            f"images have shapes {shape} and {view_2.shape}, expected the same [h, w] or [h, w, 1]"
        )
    return shape[0], shape[1]


def _real_pairs(correspondence: np.ndarray, mask_1: np.ndarray, mask_2: np.ndarray) -> np.ndarray:
    """[n, 2] indices of corresponding keypoints, both real."""
    index = np.flatnonzero((correspondence >= 0) & mask_1)
    pairs = np.stack([index, correspondence[index]], axis=1)
    return pairs[mask_2[pairs[:, 1]]]


def _canvas(height: int, width: int) -> tuple[Figure, Axes]:
    """A white figure whose axes are the views' rectangle, in pixels, rows downwards."""
    total = height + 2 * TEXT_HEIGHT
    figure = Figure(figsize=(width / _DPI, total / _DPI), dpi=_DPI)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, TEXT_HEIGHT / total, 1, height / total))
    axes.set_axis_off()
    axes.set(xlim=(0, width), ylim=(height, 0), autoscale_on=False)
    return figure, axes


def _draw_view(axes: Axes, view: np.ndarray, left: int, zoom: int) -> None:
    height, width = view.shape
    low, high = np.percentile(view, (1, 99))
    extent = (left, left + width * zoom, height * zoom, 0)
    axes.imshow(
        view, "gray", aspect="auto", vmin=low, vmax=high, extent=extent, interpolation="nearest"
    )


def _draw_lines(axes: Axes, starts: np.ndarray, ends: np.ndarray) -> None:
    segments = np.stack([starts, ends], axis=1)[..., ::-1]
    axes.add_collection(
        LineCollection(list(segments), colors=LINE_COLOUR, linewidths=0.7, alpha=0.8)
    )


def _draw_points(axes: Axes, places: np.ndarray, colour: str) -> None:
    axes.plot(places[:, 1], places[:, 0], "o", color=colour, markersize=3.6, markeredgewidth=0)


def _write(figure: Figure, text: str, *, at: float) -> None:
    """Writes a centred line; `at` is its middle in pixels from the bottom."""
    middle = at / (figure.get_figheight() * _DPI)
    figure.text(0.5, middle, text, ha="center", va="center", fontsize=9)


def _render(figure: Figure) -> np.ndarray:
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3].copy()
