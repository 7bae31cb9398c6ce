"""The curves of a report, drawn by matplotlib as SVG.

Their colours follow the reader's light or dark mode: SVG has no scripts here, only a style.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kafjax.drawing.colours import CURVES, CURVES_ON_BLACK
from kafjax.drawing.figures import svg_text
from kafjax.report.html import Element, element, figure, image, legend, note

_DASHES = ("solid", (0, (4, 2)), (0, (1, 1)), (0, (6, 2, 1, 2)))  # after all colours are used once
_MOST_POINTS = 300
_TEXT, _TEXT_ON_BLACK = "#5a5a66", "#a6a6b4"
_SIZE = (4.5, 2.75)  # inches
# Each colour as drawn, and what stands for it on a dark page.
_DARK = dict(zip((*CURVES, _TEXT), (*CURVES_ON_BLACK, _TEXT_ON_BLACK), strict=True))


class Curve(NamedTuple):
    """A line of a chart: its run's name and number, and its points with step ascending."""

    name: str
    number: int
    steps: Sequence[float]
    values: Sequence[float]


def chart(title: str, curves: Sequence[Curve]) -> Element:
    """A chart of curves over the step; its alternative text says where they start and end.

    Values that are not finite are left out. More than 300 points are drawn as means of neighbours.
    """
    drawn = [thinned for curve in curves if (thinned := thin(curve)).steps]
    if not drawn:
        return element("figure", element("figcaption", title), note("no finite value"))
    ends = [
        f"{c.name} from {c.values[0]:.4g} at step {c.steps[0]:g} to {c.values[-1]:.4g} at step "
        f"{c.steps[-1]:g}"
        for c in drawn
    ]
    return figure(_as_svg(draw(drawn)), f"{title} by step: {'; '.join(ends)}", title)


def draw(curves: Sequence[Curve]) -> Figure:
    """The chart as a figure."""
    drawing = Figure(figsize=_SIZE, layout="constrained")
    axes = drawing.add_subplot()
    for curve in curves:
        marker: dict[str, Any] = {"marker": "o", "ms": 3} if len(curve.steps) <= 12 else {}
        axes.plot(curve.steps, curve.values, **_style(curve.number), **marker)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:.4g}")
    axes.set_xlabel("step", color=_TEXT)
    axes.tick_params(colors=_TEXT, length=0)
    axes.grid(axis="y", color=_TEXT, alpha=0.3)
    axes.spines[:].set_visible(False)
    return drawing


def curve_legend(names: Mapping[int, str]) -> Element:
    """The lines that stand for runs, by number."""
    entries = []
    for number, name in names.items():
        sample = Figure(figsize=(0.28, 0.12))
        axes = sample.add_axes((0, 0, 1, 1), xlim=(0, 1), ylim=(-1, 1))
        axes.set_axis_off()
        axes.plot([0, 1], [0, 0], **_style(number))
        entries.append((image(_as_svg(sample), ""), name))
    return legend(entries)


def thin(curve: Curve) -> Curve:
    """The finite points; of more than the most, the means of as many equal parts."""
    points = np.asarray([curve.steps, curve.values], float).T
    points = points[np.isfinite(points).all(axis=1)]
    if len(points) > _MOST_POINTS:
        points = np.stack([part.mean(axis=0) for part in np.array_split(points, _MOST_POINTS)])
    return curve._replace(steps=points[:, 0].tolist(), values=points[:, 1].tolist())


def _style(number: int) -> dict[str, Any]:
    dash = _DASHES[number // len(CURVES) % len(_DASHES)]
    return {"color": CURVES[number % len(CURVES)], "ls": dash, "lw": 1.5}


def _as_svg(drawing: Figure) -> str:
    """The text of an SVG file, each of whose colours has a counterpart in dark mode."""
    text = svg_text(drawing)
    light, dark = "", ""
    for i, (colour, on_dark) in enumerate(_DARK.items()):
        text = text.replace(colour, f"var(--c{i})")
        light += f"--c{i}:{colour};"
        dark += f"--c{i}:{on_dark};"
    head = text.index(">") + 1
    rules = f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"
    return f"{text[:head]}<style>{rules}</style>{text[head:]}"
