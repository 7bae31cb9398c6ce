"""Drawing with matplotlib: pairs of slices with their keypoints, grids of slices, and files.

Images are [h, w] or [h, w, 1] of any range, keypoints [k, 2] as (row, col) in pixels of their
image. Each figure has its own canvas: no display, no global pyplot state, and the same input gives
the same bytes. Figure sizes are in inches; `WIDTH` is the width of a printed page.
"""

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from kafjax.drawing import colours
from kafjax.drawing.overlay import grey
from kafjax.errors import UserError
from kafjax.files import replacing

# Sizes in pixels of the picture of a pair.
GAP = 16
TEXT_HEIGHT = 24
_LEAST_HEIGHT = 384  # of the views; smaller images are enlarged by integer factors
_DPI = 100

WIDTH = 7.2  # inches, of a figure
FONT_SIZE = 7  # points
_LETTER = 0.0085 * FONT_SIZE  # inches, the usual width of one
LINE = 0.0165 * FONT_SIZE  # inches from line to line
_FILE_DPI = 300
# What would differ from one writing to the next, or from one matplotlib to the next.
_METADATA: dict[str, dict[str, None]] = {
    ".png": {"Software": None},
    ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    ".svg": {"Date": None, "Creator": None},
}


class Pair(NamedTuple):
    """Two slices of h x w with their keypoints.

    Attributes:
      images: [2, h, w].
      keypoints: integer [k, 2] of each.
      masks: bool [k] of each, true for real keypoints.
      correspondence: integer [k], index into the second's keypoints or -1.
    """

    images: np.ndarray
    keypoints: Sequence[np.ndarray]
    masks: Sequence[np.ndarray]
    correspondence: np.ndarray

    def matches(self) -> np.ndarray:
        """[n, 2] indices of corresponding keypoints, both real."""
        index = np.flatnonzero((self.correspondence >= 0) & self.masks[0])
        matches = np.stack([index, self.correspondence[index]], axis=1)
        return matches[self.masks[1][matches[:, 1]]]


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
    counts them. Each view's grey levels span its 1st to 99th percentile.

    Args:
      image_1: [h, w] or [h, w, 1], the left view.
      image_2: of the same h x w, the right view.
      keypoints_1: [k, 2], (row, col).
      mask_1: bool [k], true for real keypoints; others are not drawn.
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
    height, width = _common_shape(np.shape(image_1), np.shape(image_2))
    pair = Pair(
        np.stack([np.reshape(image, (height, width)) for image in (image_1, image_2)]),
        [np.asarray(keypoints) for keypoints in (keypoints_1, keypoints_2)],
        [np.asarray(mask, bool) for mask in (mask_1, mask_2)],
        np.asarray(correspondence),
    )
    zoom = max(1, round(_LEAST_HEIGHT / height))
    figure, axes = _canvas(height * zoom, 2 * width * zoom + GAP)
    plot_pair(axes, pair, second=(0, width * zoom + GAP), zoom=zoom)
    counts = f"{_counts(pair.masks)} keypoints, {len(pair.matches())} correspondences"
    _write(figure, counts, at=TEXT_HEIGHT / 2)
    _write(figure, title or "", at=height * zoom + 1.5 * TEXT_HEIGHT)
    return render(figure)


def plot_pair(
    axes: Axes,
    pair: Pair,
    *,
    second: tuple[float, float],
    zoom: float = 1,
    lines: bool = True,
    lost: Sequence[np.ndarray] | None = None,
    marker_size: float = 3.6,
    line_width: float = 0.7,
) -> None:
    """Plots a pair's views, keypoints and correspondences into axes, as `draw_pair`.

    Args:
      axes: lengths are in their units; rows run downwards.
      pair: what to plot.
      second: (row, col) at which the second view begins; the first begins at (0, 0).
      zoom: the side of an image's pixel.
      lines: whether correspondences are plotted.
      lost: bool [k] of each view, keypoints that become masked later: drawn as purple crosses,
        their correspondences as purple lines.
      marker_size: of a keypoint, in points.
      line_width: in points.
    """
    _, height, width = pair.images.shape
    matches = pair.matches()
    lost = [np.zeros_like(mask) for mask in pair.masks] if lost is None else lost
    origins = np.array([(0, 0), second])
    centres = [o + (p + 0.5) * zoom for o, p in zip(origins, pair.keypoints, strict=True)]
    for image, (top, left) in zip(pair.images, origins, strict=True):
        extent = (left, left + width * zoom, top + height * zoom, top)
        axes.imshow(grey(image), aspect="auto", extent=extent, interpolation="nearest")
    if lines:
        ends = np.stack([centres[i][matches[:, i]] for i in range(2)], axis=1)
        broken = lost[0][matches[:, 0]] | lost[1][matches[:, 1]]
        for chosen, colour in ((~broken, colours.CORRESPONDENCE), (broken, colours.MASKED)):
            _plot_lines(axes, ends[chosen], colour, line_width)
    for places, mask, gone, matched in zip(centres, pair.masks, lost, matches.T, strict=True):
        is_matched = np.isin(np.arange(len(mask)), matched)
        for chosen, colour, marker in (
            (mask & ~gone & ~is_matched, colours.UNMATCHED, "o"),
            (mask & ~gone & is_matched, colours.MATCHED, "o"),
            (mask & gone, colours.MASKED, "x"),
        ):
            _plot_points(axes, places[chosen], colour, marker, marker_size)


def make_grid(
    num_rows: int,
    num_columns: int,
    aspect: float,
    *,
    gaps: Sequence[float] | None = None,
    row_gap: float = 0.06,
    top: float = 0.2,
    bottom: float = 0.05,
    widest: float = 1.7,
    legend: Sequence[Any] = (),
) -> np.ndarray:
    """A new figure, at most `WIDTH` wide, and its Axes [rows, columns] for images, without ticks.

    Args:
      num_rows: of the grid.
      num_columns: of the grid.
      aspect: height over width of each of the axes.
      gaps: inches between columns, `num_columns - 1` of them.
      row_gap: inches between rows.
      top: inches above the grid.
      bottom: inches below it, without the legend.
      widest: maximum width of a column, inches.
      legend: labelled artists, shown below.
    """
    left, right = 0.3, 0.03
    gaps = [0.06] * (num_columns - 1) if gaps is None else gaps
    side = min(widest, (WIDTH - left - right - sum(gaps)) / num_columns)
    width = left + right + num_columns * side + sum(gaps)
    columns = _legend_columns(legend, width)
    bottom += 1.4 * LINE * math.ceil(len(legend) / columns)
    height = top + bottom + num_rows * side * aspect + (num_rows - 1) * row_gap
    figure = Figure(figsize=(width, height))
    axes = np.empty((num_rows, num_columns), object)
    for row, column in np.ndindex(axes.shape):
        x = left + column * side + sum(gaps[:column])
        y = height - top - (row + 1) * side * aspect - row * row_gap
        place = (x / width, y / height, side / width, side * aspect / height)
        axes[row, column] = panel = figure.add_axes(place)
        panel.set_axis_off()
    if legend:
        _add_legend(figure, legend, columns)
    return axes


def write_above(axes: Axes, text: str, *, lift: float = 2.0) -> None:
    """Writes a centred text `lift` points above axes."""
    _annotate(axes, text, (0.5, 1), (0, lift), ha="center", va="bottom")


def write_below(axes: Axes, text: str) -> None:
    """Writes a centred text below axes."""
    _annotate(axes, text, (0.5, 0), (0, -2), ha="center", va="top")


def write_beside(axes: Axes, text: str, *, height: float = 0.5) -> None:
    """Writes vertical text left of axes, centred at a fraction of their height."""
    _annotate(axes, text, (0, height), (-3, 0), ha="right", va="center", rotation=90)


def wrap(text: str, length: float) -> str:
    """Breaks a name after `_`, `-`, `/` or a space into lines of `length` inches if possible."""
    lines = [""]
    for piece in re.findall(r"[^_\-/ ]*[_\-/ ]?", text):
        if lines[-1] and len(lines[-1] + piece.rstrip()) * _LETTER > length:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.strip() for line in lines)


def _annotate(
    axes: Axes, text: str, place: tuple[float, float], offset: tuple[float, float], **style: Any
) -> None:
    axes.annotate(
        text, place, offset, "axes fraction", "offset points", fontsize=FONT_SIZE, **style
    )


def _add_legend(figure: Figure, handles: Sequence[Any], columns: int) -> None:
    figure.legend(
        handles=handles,
        loc="lower center",
        ncols=columns,
        fontsize=FONT_SIZE,
        frameon=False,
        borderpad=0.2,
        handlelength=1.4,
        columnspacing=1.2,
    )


def _legend_columns(handles: Sequence[Any], width: float) -> int:
    """The number of legend entries that fit side by side in `width` inches; 1 or more."""
    widths = [0.42 + _LETTER * len(str(handle.get_label())) for handle in handles]
    if sum(widths) <= width:
        return max(1, len(handles))
    return max(1, int(width / max(widths)))


def check_output(path: Path) -> None:
    """Raises `ValueError` unless figures can be written to the path: PNG, PDF or SVG."""
    if path.suffix.lower() not in _METADATA:
        raise UserError(f"{path}: expected the extension {', '.join(_METADATA)}")
    if path.is_dir():
        raise UserError(f"{path}: a folder; expected the name of a file")


def svg_text(figure: Figure) -> str:
    """A figure as SVG, without the XML header, with text in the reader's font."""
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "kafjax", "svg.fonttype": "none"}):
        figure.savefig(stream, format="svg", metadata=_METADATA[".svg"], transparent=True)
    text = stream.getvalue()
    return text[text.index("<svg") :]


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure atomically, as PNG, PDF or SVG by the extension.

    The same figure gives the same bytes.

    Raises:
      ValueError: another extension.
    """
    check_output(path)
    suffix = path.suffix.lower()
    path.parent.mkdir(parents=True, exist_ok=True)
    fonts = matplotlib.rc_context({"svg.hashsalt": "kafjax", "pdf.fonttype": 42})
    with fonts, replacing(path) as partial:
        figure.savefig(partial, dpi=_FILE_DPI, format=suffix[1:], metadata=_METADATA[suffix])


def render(figure: Figure) -> np.ndarray:
    """A figure's pixels, uint8 [h, w, 3], RGB, at its own resolution."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3].copy()


def _common_shape(shape: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, int]:
    if other != shape or len(shape) not in (2, 3) or shape[2:] not in ((), (1,)):
        raise UserError(
            f"images have shapes {shape} and {other}, expected the same [h, w] or [h, w, 1]"
        )
    return shape[0], shape[1]


def _counts(masks: Sequence[np.ndarray]) -> str:
    return f"{masks[0].sum()} and {masks[1].sum()}"


def _canvas(height: int, width: int) -> tuple[Figure, Axes]:
    """A white figure whose axes are the views' rectangle, in pixels, rows downwards."""
    total = height + 2 * TEXT_HEIGHT
    figure = Figure(figsize=(width / _DPI, total / _DPI), dpi=_DPI)
    axes = figure.add_axes((0, TEXT_HEIGHT / total, 1, height / total))
    axes.set_axis_off()
    axes.set(xlim=(0, width), ylim=(height, 0), autoscale_on=False)
    return figure, axes


def _plot_lines(axes: Axes, ends: np.ndarray, colour: str, width: float) -> None:
    """Plots lines between [n, 2, 2] ends."""
    axes.add_collection(
        LineCollection(list(ends[..., ::-1]), colors=colour, linewidths=width, alpha=0.8)
    )


def _plot_points(axes: Axes, places: np.ndarray, colour: str, marker: str, size: float) -> None:
    width = 0.0 if marker == "o" else size / 4
    style: dict[str, Any] = {"marker": marker, "ms": size, "mew": width, "ls": ""}
    axes.plot(places[:, 1], places[:, 0], color=colour, **style)


def _write(figure: Figure, text: str, *, at: float) -> None:
    """Writes a centred line; `at` is its vertical centre in pixels from the bottom."""
    middle = at / (figure.get_figheight() * _DPI)
    figure.text(0.5, middle, text, ha="center", va="center", fontsize=9)
