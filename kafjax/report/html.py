"""The parts that a report's page is made of: elements, tables and pictures.

Elements are those of `xml.etree.ElementTree`, which escapes every text and attribute. The page is
`template.html` with them. Nothing on it loads anything: pictures are data URIs.
"""

import base64
import importlib.resources
import io
import string
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib.image
import numpy as np

Element = ElementTree.Element
Child = Element | str


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


def page(*body: Element) -> str:
    """The whole page as text."""
    template = importlib.resources.files("kafjax.report").joinpath("template.html")
    texts = [ElementTree.tostring(part, encoding="unicode", method="html") for part in body]
    return string.Template(template.read_text("utf-8")).substitute(body="\n".join(texts))


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
    """A line about what is missing, or how something is meant."""
    return element("p", text, class_="note")


def legend(entries: Sequence[tuple[Child, str]]) -> Element:
    """The samples of a legend with their texts."""
    return element("ul", *(element("li", *entry) for entry in entries), class_="legend")


def image(content: np.ndarray | bytes | str, alt: str) -> Element:
    """A picture, uint8 [h, w, 3], the bytes of a PNG or the text of an SVG."""
    kind = "svg+xml" if isinstance(content, str) else "png"
    data = content.encode() if isinstance(content, str) else _png(content)
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return element("img", src=source, alt=alt)


def figure(content: np.ndarray | bytes | str, alt: str, caption: str) -> Element:
    """An `image` with a caption."""
    return element("figure", image(content, alt), element("figcaption", caption))


def _cell(content: Child | None) -> Child:
    return "-" if content is None else content


def _png(content: np.ndarray | bytes) -> bytes:
    if isinstance(content, bytes):
        return content
    stream = io.BytesIO()
    nothing: dict[str, Any] = {"Software": None}  # matplotlib's version would be in the bytes
    matplotlib.image.imsave(stream, content, format="png", metadata=nothing)
    return stream.getvalue()
