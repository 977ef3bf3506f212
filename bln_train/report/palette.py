"""Colours, line styles and hatches of all drawings, for the page and for files of their own. No torch here."""

from __future__ import annotations

import re

# Colours after Okabe and Ito, which most eyes can tell apart, made darker or lighter for a contrast of 3:1 against the page.
LIGHT = {
    "page": "#fff", "ink": "#1b1f24", "soft": "#59636e", "rule": "#d5dae0",
    "c0": "#0072b2", "c1": "#c05600", "c2": "#00835f", "c3": "#b3548c",
    "c4": "#8a6d00", "c5": "#3a8fc4", "c6": "#555", "c7": "#7a4fc0",
}  # fmt: skip
DARK = {
    "page": "#14171b", "ink": "#e6e9ed", "soft": "#a5aeb8", "rule": "#39414a",
    "c0": "#56b4e9", "c1": "#f0935a", "c2": "#2ec79b", "c3": "#e59ac6",
    "c4": "#d9bf4a", "c5": "#8fd0f5", "c6": "#bbb", "c7": "#b79cf0",
}  # fmt: skip
NUM_COLORS = 8
STYLE = """
svg text { fill: var(--ink); font: 11px system-ui, sans-serif; paint-order: stroke; stroke: var(--page); stroke-width: 3px; }
.grid { stroke: var(--rule); } .axis { stroke: var(--soft); } .phase { stroke: var(--soft); stroke-width: .6; }
.line { fill: none; stroke-width: 1.8; } .level { stroke: var(--ink); stroke-width: 1.5; }
.mark { stroke: var(--page); stroke-width: .5; } .spread { fill-opacity: .13; }
.h0 { fill: none; } .h1 { fill: url(#hatch1); } .h2 { fill: url(#hatch2); } .h3 { fill: url(#hatch3); } .h4 { fill: url(#hatch4); }
pattern path { stroke: var(--page); stroke-width: 1.3; fill: none; } pattern circle { fill: var(--page); }
"""
STYLE += "".join(f".s{n} {{ stroke: var(--c{n}); }} .f{n} {{ fill: var(--c{n}); }}\n" for n in range(NUM_COLORS))
HATCHES = """<defs>
<pattern id="hatch1" width="6" height="6" patternUnits="userSpaceOnUse"><path d="M-1,1 L1,-1 M0,6 L6,0 M5,7 L7,5"/></pattern>
<pattern id="hatch2" width="7" height="7" patternUnits="userSpaceOnUse"><path d="M0,0 L7,7 M7,0 L0,7"/></pattern>
<pattern id="hatch3" width="6" height="6" patternUnits="userSpaceOnUse"><circle cx="3" cy="3" r="1.1"/></pattern>
<pattern id="hatch4" width="6" height="6" patternUnits="userSpaceOnUse"><path d="M-1,5 L1,7 M0,0 L6,6 M5,-1 L7,1"/></pattern>
</defs>"""


def variables(colors: dict[str, str]) -> str:
    """The colours as CSS variables."""
    return " ".join(f"--{name}: {color};" for name, color in colors.items())


def with_colors(style: str, colors: dict[str, str]) -> str:
    """`style` with colours in the place of their variables, which viewers other than browsers do not know."""
    return re.sub(r"var\(--(\w+)\)", lambda name: colors[name[1]], style)
