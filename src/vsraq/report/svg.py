# SPDX-License-Identifier: Apache-2.0
"""A figure as SVG inside a page: the page's colours, texts to point at, own ids."""

import io
import json
import re
from collections.abc import Mapping
from xml.etree import ElementTree

from vsraq.report.picture import GRID, INK, MUTED, PALETTE, Grid, Picture

_SVG = "http://www.w3.org/2000/svg"
_LINK = "http://www.w3.org/1999/xlink"
_FONT = re.compile(r"(font(?:-family)?: [^;]*?)'[^;]*sans-serif")
_COLOUR = re.compile(r"#[0-9a-f]{6}\b")

# by what the page's style calls them
VARIABLES: Mapping[str, str] = {
    **{colour: f"--series-{i}" for i, colour in enumerate(PALETTE)},
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    "#ffffff": "--surface",
}


def inline_svg(picture: Picture) -> str:
    """Return a figure as an SVG element.

    Its colours are variables of the page's style. Texts to point at are `title`
    elements, and the values of heat maps a `data-grid` attribute. The element refers to
    `NAME-title` and `NAME-description` of the page.

    Args:
        picture: The figure.
    """
    file = io.StringIO()
    picture.figure.savefig(
        file, format="svg", transparent=True, metadata={"Date": None}
    )
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _LINK)
    root = ElementTree.fromstring(file.getvalue())
    for element in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(element)
    _add_values(root, picture)
    for element in root.iter():
        _adapt(element, picture)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{picture.name}-title")
    root.set("aria-describedby", f"{picture.name}-description")
    return ElementTree.tostring(root, encoding="unicode")


def _add_values(root: ElementTree.Element, picture: Picture) -> None:
    """Add texts to point at, and the values of heat maps."""
    groups = {element.get("id"): element for element in root.iter()}
    for gid, texts in picture.tips.items():
        group = groups[gid]
        marks = list(group.iter(f"{{{_SVG}}}use")) or list(
            group.iter(f"{{{_SVG}}}path")
        )
        for mark, text in zip(marks, texts, strict=True):
            holder = ElementTree.SubElement(mark, f"{{{_SVG}}}title")
            holder.text = text
    for gid, grid in picture.grids.items():
        groups[gid].set("data-grid", _as_json(grid))


def _as_json(grid: Grid) -> str:
    values = [[v if v is None else round(v, 3) for v in row] for row in grid.values]
    content = grid._asdict() | {"values": values}
    return json.dumps(content, separators=(",", ":"))


def _adapt(element: ElementTree.Element, picture: Picture) -> None:
    """Make ids the figure's own, and colours and the font those of the page."""

    def colour(match: re.Match[str]) -> str:
        found = VARIABLES.get(match[0])
        mixed = picture.colours.get(match[0], match[0])
        return f"var({found}, {match[0]})" if found else mixed

    name = picture.name
    for key, value in element.attrib.items():
        if key == "id":
            element.set(key, f"{name}-{value}")
        elif key.endswith("href") and value.startswith("#"):
            element.set(key, f"#{name}-{value[1:]}")
        elif value.startswith("url(#"):
            element.set(key, f"url(#{name}-{value[5:]}")
        elif key == "style":
            value = _FONT.sub(r"\1var(--font)", value)
            element.set(key, _COLOUR.sub(colour, value))
