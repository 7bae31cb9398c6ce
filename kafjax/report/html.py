"""The parts that a report's page is made of: elements, tables, charts, pictures and its style.

Elements are those of `xml.etree.ElementTree`, which escapes every text and attribute when the page
is written. Nothing on the page loads anything: pictures are data URIs, charts inline SVG without
scripts, whose colours follow the reader's light or dark mode. Chart coordinates are in CSS pixels.
"""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from xml.etree import ElementTree

import matplotlib.image
import numpy as np
from matplotlib.ticker import MaxNLocator

Element = ElementTree.Element
Child = Element | str

NUM_COLOURS = 8
_DASHES = ("", "6 3", "2 2", "8 3 2 3")  # after the colours have all been used once
_MOST_POINTS = 300

# Of a chart: its whole, and the distances of its axes from the edges.
_WIDTH, _HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 16, 10, 40

_LIGHT = ["0067a5", "c24e00", "00805c", "b8509a", "9a6b00", "2f8fd0", "6b6b6b", "7a1fa2"]
_DARK = ["6ab8f2", "ff9a4d", "2fd0a0", "f0a0d0", "f0e442", "9fd8ff", "b8b8b8", "c99bff"]
# Nothing may load, whatever texts of runs hold.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Curve(NamedTuple):
    """A line of a chart: its run's name and number, and its points with step ascending."""

    name: str
    number: int
    steps: Sequence[float]
    values: Sequence[float]


def element(tag: str, *children: Child, **attributes: str | float) -> Element:
    """An element; `class_` is the attribute class, and _ in other names stands for -."""
    names = {name: name.rstrip("_").replace("_", "-") for name in attributes}
    made = Element(tag, {names[name]: str(value) for name, value in attributes.items()})
    for child in children:
        if isinstance(child, Element):
            made.append(child)
        elif len(made):
            made[-1].tail = (made[-1].tail or "") + child
        else:
            made.text = (made.text or "") + child
    return made


def page(title: str, *body: Child) -> str:
    """The whole page as text."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", _style()),
    )
    root = element("html", head, element("body", element("main", *body)), lang="en")
    return f"<!DOCTYPE html>\n{ElementTree.tostring(root, encoding='unicode', method='html')}\n"


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[Child | None]]) -> Element:
    """A table that scrolls sideways where it is too wide; None is shown as a dash.

    Each row's first cell is its header.
    """
    head = element("tr", *(element("th", text, scope="col") for text in header))
    lines = [
        element(
            "tr",
            element("th", _cell(first), scope="row"),
            *(element("td", _cell(cell)) for cell in rest),
        )
        for first, *rest in rows
    ]
    inner = element(
        "table",
        element("caption", element("span", caption)),
        element("thead", head),
        element("tbody", *lines),
    )
    # Those who have no mouse scroll what has the focus.
    return element("div", inner, class_="scroll", tabindex=0, role="region", aria_label=caption)


def number(value: float | None, digits: int) -> str | None:
    """A number with so many digits after the point, or None."""
    return None if value is None else f"{value:.{digits}f}"


def details(summary: str, *children: Child) -> Element:
    """What is folded away until asked for."""
    return element("details", element("summary", summary), *children)


def note(text: str) -> Element:
    """A line that says what is not there, or how something is meant."""
    return element("p", text, class_="note")


def picture(image: np.ndarray | bytes, alt: str, *caption: Child) -> Element:
    """A picture, uint8 [h, w, 3] or a PNG's bytes, with a caption below it."""
    source = f"data:image/png;base64,{base64.b64encode(_png(image)).decode()}"
    return element("figure", element("img", src=source, alt=alt), element("figcaption", *caption))


def swatch(colour: str, text: str) -> Element:
    """An entry of a legend of filled colours, '#rrggbb'."""
    return element("li", element("i", style=f"background:{colour}", class_="swatch"), text)


def legend(names: Mapping[int, str]) -> Element:
    """The lines that stand for runs, by number."""
    entries = [element("li", _sample(number), name) for number, name in names.items()]
    return element("ul", *entries, class_="legend")


def chart(title: str, curves: Sequence[Curve]) -> Element:
    """A chart of curves over the step; its alternative text tells where they begin and end.

    Values that are not finite are left out. More than 300 points are drawn as means of neighbours.
    """
    drawn = [thinned for curve in curves if (thinned := _thin(curve)).steps]
    if not drawn:
        return element("figure", element("figcaption", title), note("no finite value"))
    x, x_ticks = _scale([s for c in drawn for s in c.steps], _LEFT, _WIDTH - _RIGHT, whole=True)
    y, y_ticks = _scale([v for c in drawn for v in c.values], _HEIGHT - _BOTTOM, _TOP)
    marks = [part for tick in y_ticks for part in _y_tick(y(tick), _tick_text(tick))]
    marks += [
        element("text", f"{tick:,.0f}", x=_rounded(x(tick)), y=_HEIGHT - 22, class_="middle")
        for tick in x_ticks
    ]
    marks.append(
        element("text", "step", x=(_LEFT + _WIDTH - _RIGHT) / 2, y=_HEIGHT - 6, class_="middle")
    )
    lines = [
        _line(curve, [(x(s), y(v)) for s, v in zip(curve.steps, curve.values, strict=True)])
        for curve in drawn
    ]
    ends = [
        f"{c.name} from {c.values[0]:.4g} at step {c.steps[0]:g} to {c.values[-1]:.4g} at step "
        f"{c.steps[-1]:g}"
        for c in drawn
    ]
    drawing = element(
        "svg",
        *marks,
        *lines,
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=f"{title} by step: {'; '.join(ends)}",
    )
    return element("figure", element("figcaption", title), drawing)


def _cell(content: Child | None) -> Child:
    return "-" if content is None else content


def _png(image: np.ndarray | bytes) -> bytes:
    if isinstance(image, bytes):
        return image
    stream = io.BytesIO()
    nothing: dict[str, Any] = {"Software": None}  # matplotlib's version would be in the bytes
    matplotlib.image.imsave(stream, image, format="png", metadata=nothing)
    return stream.getvalue()


def _thin(curve: Curve) -> Curve:
    """The finite points; of more than the most, the means of as many equal parts."""
    points = np.asarray([curve.steps, curve.values], float).T
    points = points[np.isfinite(points).all(axis=1)]
    if len(points) > _MOST_POINTS:
        parts = np.array_split(points, _MOST_POINTS)
        points = np.stack([part.mean(axis=0) for part in parts])
    return curve._replace(steps=points[:, 0].tolist(), values=points[:, 1].tolist())


def _scale(
    values: list[float], start: float, end: float, *, whole: bool = False
) -> tuple[Callable[[float], float], list[float]]:
    """Maps values to pixels, from `start` for the least to `end`, and gives ticks."""
    low, high = min(values), max(values)
    if low == high:
        margin = 1 if whole else abs(low) / 2 or 1
        low, high = low - margin, high + margin
    ticks = np.asarray(MaxNLocator(4, integer=whole).tick_values(low, high)).tolist()
    if not whole:
        low, high = min(low, ticks[0]), max(high, ticks[-1])
    shown = [tick for tick in ticks if low <= tick <= high]
    return lambda value: start + (value - low) / (high - low) * (end - start), shown


def _tick_text(value: float) -> str:
    """At most seven characters, but for a sign."""
    text = f"{value:.4g}"
    if len(text.lstrip("-")) <= 6:
        return text
    digits, power = f"{value:.2e}".split("e")
    return f"{float(digits):g}e{int(power)}"


def _y_tick(y: float, text: str) -> tuple[Element, Element]:
    at = _rounded(y)
    return (
        element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=at, y2=at, class_="grid"),
        element("text", text, x=_LEFT - 6, y=_rounded(y + 4), class_="end"),
    )


def _line(curve: Curve, points: Sequence[tuple[float, float]]) -> Element:
    places = [f"{_rounded(x)},{_rounded(y)}" for x, y in points]
    style = _line_style(curve.number)
    shape = element("polyline", points=" ".join(places), **style)
    dots = [
        element("circle", cx=_rounded(x), cy=_rounded(y), r=2.5, class_=f"dot c{curve.number % 8}")
        for x, y in (points if len(points) <= 12 else ())
    ]
    return element("g", element("title", curve.name), shape, *dots)


def _line_style(number: int) -> dict[str, str]:
    dash = _DASHES[number // NUM_COLOURS % len(_DASHES)]
    return {"class_": f"curve c{number % NUM_COLOURS}", "stroke_dasharray": dash or "none"}


def _sample(number: int) -> Element:
    line = element("line", x1=0, x2=28, y1=6, y2=6, **_line_style(number))
    return element("svg", line, viewBox="0 0 28 12", aria_hidden="true", class_="sample")


def _rounded(pixels: float) -> str:
    return f"{pixels:.1f}"


def _style() -> str:
    def colours(palette: Sequence[str]) -> str:
        return "".join(f"--c{i}:#{colour};" for i, colour in enumerate(palette))

    runs = "".join(f".c{i}{{stroke:var(--c{i});fill:var(--c{i})}}" for i in range(NUM_COLOURS))
    light = "--back:#fff;--text:#1b1b1f;--dim:#5a5a66;--edge:#d4d4dc;--soft:#f3f3f7;--link:#0a58a8;"
    dark = (
        "--back:#15161a;--text:#e8e8ee;--dim:#a6a6b4;--edge:#3a3b45;--soft:#20212a;--link:#8ec5ff;"
    )
    return (
        f":root{{{light}{colours(_LIGHT)}}}"
        f"@media(prefers-color-scheme:dark){{:root{{{dark}{colours(_DARK)}}}}}{runs}{_RULES}"
    )


_RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--text);font:16px/1.5 system-ui,sans-serif}
main{max-width:1180px;margin:0 auto;padding:16px}
h1{font-size:1.6rem;margin:.2em 0}
h2{font-size:1.25rem;margin:2em 0 .5em;border-bottom:1px solid var(--edge);padding-bottom:.2em}
h3{font-size:1.05rem;margin:1.5em 0 .4em}
h1,h2,h3,p,li,figcaption,summary{overflow-wrap:anywhere}
a{color:var(--link)}
nav ul,.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 18px;padding:0;margin:.5em 0}
.legend li{display:flex;align-items:center;gap:6px}
.sample{width:28px;height:12px;flex:none}
.swatch{width:14px;height:14px;border:1px solid var(--dim);flex:none}
.note,figcaption,caption{color:var(--dim);font-size:.9rem}
.charts,.pictures{display:grid;gap:16px}
.charts{grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr))}
.pictures{grid-template-columns:repeat(auto-fill,minmax(min(46%,220px),1fr))}
.wide{grid-template-columns:repeat(auto-fill,minmax(min(100%,460px),1fr))}
figure{margin:0;min-width:0}
figure svg{width:100%;height:auto;display:block}
img{width:100%;height:auto;display:block;background:#000}
.pixels img{image-rendering:pixelated}
svg text{fill:var(--dim);font-size:12px;stroke:none}
.middle{text-anchor:middle}.end{text-anchor:end}
.grid{stroke:var(--edge);stroke-width:1}
.curve{fill:none;stroke-width:2}
.scroll{overflow-x:auto;margin:.6em 0}
table{border-collapse:separate;border-spacing:0;font-size:.875rem;line-height:1.375rem;font-variant-numeric:tabular-nums}
caption{text-align:left;padding-bottom:4px}
caption span{display:block;position:sticky;left:0;max-width:min(1148px,calc(100vw - 32px))}
th,td{padding:4px 10px;border-bottom:1px solid var(--edge);text-align:left;vertical-align:top}
td{white-space:nowrap}
thead th{background:var(--soft);vertical-align:bottom}
tbody th{font-weight:600;background:var(--back)}
tr>th:first-child{position:sticky;left:0;max-width:min(24em,50vw);overflow-wrap:break-word}
details{margin:.6em 0}
summary{cursor:pointer}
"""
