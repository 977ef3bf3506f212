"""Drawings as an SVG file of their own, light or dark as its reader prefers. No torch here."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from html import escape

from bln_train.report.palette import DARK, HATCHES, LIGHT, STYLE, with_colors
from bln_train.report.svg import LINE, WIDTH, Drawing, text

_CHARACTERS = 62
"""Of a title that fit into the width of a drawing."""
_SCALE = 1.6
"""Pixels for a unit, where nobody asks for another size."""
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def sheet(title: str, panels: Sequence[tuple[str, Drawing]], *, columns: int = 1) -> str:
    """The text of an SVG file: panels in rows, each under its heading, and the title above all."""
    lines = textwrap.wrap(title, _CHARACTERS * columns)
    parts = [text(columns * WIDTH / 2, LINE * (n + 1), line, "middle") for n, line in enumerate(lines)]
    y = LINE * (len(lines) + 0.5)
    above = LINE if any(heading for heading, _ in panels) else 0
    for start in range(0, len(panels), columns):
        row = panels[start : start + columns]
        for k, (heading, drawing) in enumerate(row):
            parts.append(text(WIDTH * k + 8, y + above - 4, heading, "start"))
            box = f'x="{WIDTH * k}" y="{y + above:.0f}" width="{WIDTH}" height="{drawing.height:.0f}"'
            parts.append(f"<svg {box}>{drawing.content}</svg>")
        y += max(drawing.height for _, drawing in row) + above + LINE
    width = WIDTH * columns
    dark = f"@media (prefers-color-scheme: dark) {{ {with_colors(STYLE + '.page { fill: var(--page); }', DARK)} }}"
    style = with_colors(STYLE + ".page { fill: var(--page); }", LIGHT) + dark
    size = f'width="{_SCALE * width:.0f}" height="{_SCALE * y:.0f}" viewBox="0 0 {width} {y:.0f}"'
    page = f'<rect class="page" width="{width}" height="{y:.0f}"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(title)}">'
    content = "".join([head, f"<style>{style}</style>", HATCHES, page, *parts, "</svg>\n"])
    return _NO_XML.sub("\N{REPLACEMENT CHARACTER}", content)
