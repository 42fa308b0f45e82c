"""A matplotlib figure as an inline SVG element, which takes its colours and its font from the page."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

_NAMESPACE = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"


def inline(figure: Any, name: str, words: str) -> str:
    """Returns a figure as an `<svg>` element without a fixed size, so that it takes the width there is.

    Args:
        figure: A `matplotlib.figure.Figure`.
        name: The figure's name, different for each figure of a page: it keeps their ids apart.
        words: What the figure shows, for those who cannot see it.
    """
    import matplotlib as mpl

    file = io.StringIO()
    # The ids of clip paths and markers are hashes of this salt and their shapes; text stays text.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"gradsurgery {name}"}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=nothing, transparent=True)
    root = ElementTree.fromstring(file.getvalue())
    for element in root.iter():
        element.tag = element.tag.removeprefix(_NAMESPACE)  # in HTML an svg element needs no namespace
        if element.tag == "g":
            element.attrib.pop(
                "id", None
            )  # figure_1, axes_1, ... are the same in every figure, and nothing refers to them
        if _LINK in element.attrib:
            element.set("href", element.attrib.pop(_LINK))
    box = root.attrib["viewBox"]
    root.attrib.clear()
    root.attrib.update({"viewBox": box, "role": "img", "aria-labelledby": f"{name}-title"})
    title = ElementTree.Element("title", {"id": f"{name}-title"})
    title.text = words
    root.insert(0, title)
    return ElementTree.tostring(root, encoding="unicode")


def style(colours: Mapping[str, str]) -> str:
    """Returns the style sheet that gives every figure the page's colours and font.

    matplotlib writes each colour into the element's style attribute. A rule for each colour replaces it by the page's
    variable of that name, which the dark scheme changes.

    Args:
        colours: Name of a CSS variable -> the colour that the figures are drawn with, as `#rrggbb` in small letters.
    """
    font = "svg text { font-family: system-ui, sans-serif !important; }\n"
    # Without `svg` in front, which would not match the markers: they are copies outside of the figure's tree.
    return font + "".join(
        f'[style*="{what}: {value}"] {{ {what}: var(--{name}) !important; }}\n'
        for name, value in colours.items()
        for what in ("fill", "stroke")
    )
