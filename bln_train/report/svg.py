"""Parts of a drawing as SVG: scales, axes, markers, legends. No torch here.

Every drawing is WIDTH units wide, so its text can be read where that is the width of a phone. Markers, dashes and hatches tell
apart whatever colours tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from bln_train.report.palette import NUM_COLORS

WIDTH = 400
LEFT, RIGHT, TOP, PLOT_HEIGHT = 56, 14, 12, 190
LINE = 15
"""Height of a line of text."""
DASHES = ("", "6 3", "2 3", "8 3 2 3")
_NUM_MARKERS = 6
_PLUS = "-1.3,-4 1.3,-4 1.3,-1.3 4,-1.3 4,1.3 1.3,1.3 1.3,4 -1.3,4 -1.3,1.3 -4,1.3 -4,-1.3 -1.3,-1.3"


@dataclass(frozen=True)
class Drawing:
    """A chart; as text it is an SVG element for a page."""

    title: str
    height: float
    """In units, of which the drawing is WIDTH wide."""
    content: str
    """SVG elements."""

    def __str__(self) -> str:
        label = f'role="img" aria-label="{escape(self.title)}"'
        return f'<svg viewBox="0 0 {WIDTH} {self.height:.0f}" {label}>{self.content}</svg>'


@dataclass(frozen=True)
class Axis:
    """What an axis shows."""

    label: str
    log: int = 0
    """Base of a logarithmic axis; 0 for a linear one."""
    from_zero: bool = False
    """Whether the axis begins at 0."""
    limits: tuple[float, float] | None = None
    """Its ends, where lines are cut; None for an axis as long as the values need."""


class Scale:
    """Values to places along an axis, and its ticks.

    Args:
        values: what the axis has to show.
        begin, end: places of its ends.
        log: base of a logarithmic axis; 0 for a linear one.
        whole: ticks of a linear axis are whole numbers, and the axis ends at the outermost values, not at ticks.
        limits: values at the ends.
    """

    def __init__(
        self,
        values: Sequence[float],
        begin: float,
        end: float,
        *,
        log: int = 0,
        whole: bool = False,
        limits: tuple[float, float] | None = None,
    ) -> None:
        self.log = log
        inside = [self._bend(v) for v in limits or values if math.isfinite(v) and (v > 0 or not log)] or [0.0, 1.0]
        low, high = min(inside), max(inside)
        if high - low < 1e-9 * max(1.0, abs(high)):
            room = max(0.5, 1e-3 * abs(high))
            low, high = low - room, high + room
        step = 1.0 if log and high - low >= 1 else _nice_step((high - low) / 5, whole=whole and not log)
        if log and (high - low) / step > 8:
            step = math.ceil((high - low) / 8)
        if not whole and limits is None:
            low, high = step * math.floor(low / step + 1e-9), step * math.ceil(high / step - 1e-9)
        self.low, self.high, self.begin, self.end = low, high, begin, end
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        self.ticks = [
            (self._place(n * step), f"{log ** (n * step) if log else n * step:.4g}") for n in range(first, last + 1)
        ]

    def _bend(self, value: float) -> float:
        return math.log2(value) / math.log2(self.log) if self.log else value

    def _place(self, bent: float) -> float:
        return self.begin + (self.end - self.begin) * (bent - self.low) / (self.high - self.low)

    def __call__(self, value: float) -> float:
        """The place of a value; what a logarithmic axis cannot show is far below it."""
        return self._place(self._bend(max(value, 2.0**-40) if self.log else value))


def _nice_step(size: float, *, whole: bool) -> float:
    power = 10.0 ** math.floor(math.log10(size))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= size * 0.999)
    return max(1.0, step) if whole else step


def grid(x_of: Scale, y_of: Scale, x_label: str, y_label: str) -> str:
    """Both axes of the plot's area, with their ticks and labels."""
    bottom = TOP + PLOT_HEIGHT
    parts = [y_grid(y_of, y_label)]
    for place, tick in x_of.ticks:
        parts.append(f'<line class="axis" x1="{place:.1f}" x2="{place:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(text(place, bottom + 16, tick, "middle"))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, bottom + 32, x_label, "middle"))
    return "".join(parts)


def y_grid(y_of: Scale, label: str) -> str:
    """The vertical axis, with a line across the plot at each tick."""
    parts = []
    for place, tick in y_of.ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(text(LEFT - 5, place + 4, tick, "end"))
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_of.begin}" y2="{y_of.begin}"/>')
    middle = (y_of.begin + y_of.end) / 2
    parts.append(
        f'<text text-anchor="middle" transform="translate(11 {middle:.1f}) rotate(-90)">{escape(label)}</text>'
    )
    return "".join(parts)


def clipped(parts: Sequence[str]) -> str:
    """What is inside the plot's area of `parts`."""
    box = f'{LEFT} {TOP} {WIDTH - RIGHT - LEFT} {PLOT_HEIGHT}"'
    size = f'x="{LEFT}" y="{TOP}" width="{WIDTH - RIGHT - LEFT}" height="{PLOT_HEIGHT}"'
    return f'<svg {size} viewBox="{box}>{"".join(parts)}</svg>'


def marker(n: int, x: float, y: float) -> str:
    """The mark of the n-th kind of line."""
    kind = f'class="mark f{n % NUM_COLORS}"'
    if n % _NUM_MARKERS == 0:
        return f'<circle {kind} cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'
    shapes = ("-3,-3 3,-3 3,3 -3,3", "0,-4 4,3 -4,3", "0,-5 4,0 0,5 -4,0", "0,4 4,-3 -4,-3", _PLUS)
    return f'<polygon {kind} transform="translate({x:.1f} {y:.1f})" points="{shapes[n % _NUM_MARKERS - 1]}"/>'


def patch(k: int, x: float, y: float, width: float, height: float) -> str:
    """A hatched rectangle, in the look of the k-th part of a stack."""
    box = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}"'
    return f'<rect class="f{k % NUM_COLORS}" {box}/><rect class="h{k % 5}" {box}/>'


def level_line(x1: float, y1: float, x2: float, y2: float, n: int = 0) -> str:
    """A dashed line at a value that is no datum; `n` tells two of them apart."""
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line class="level" stroke-dasharray="{("5 3", "2 2")[n % 2]}" {ends}/>'


def text(x: float, y: float, words: str, anchor: str) -> str:
    """Words at a place, which is their `start`, `middle` or `end`."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def short(words: str, length: int) -> str:
    """Words that fit; the tables beside a drawing have all of them."""
    return words if len(words) <= length else f"{words[: length - 1]}…"


def with_legend(title: str, parts: Sequence[str], keys: Sequence[tuple[str, str]], height: float) -> Drawing:
    """The parts and below them the legend, in two columns where its words are short."""
    columns = 2 if all(len(name) <= 24 for name, _ in keys) else 1
    rows = math.ceil(len(keys) / columns)
    legend = []
    for n, (name, sample) in enumerate(keys):
        x, y = 12 + (n % columns) * WIDTH / 2, height + 8 + (n // columns) * (LINE + 2)
        legend.append(f'<g transform="translate({x:.1f} {y:.1f})">{sample}{text(33, 4, short(name, 58), "start")}</g>')
    return Drawing(title, height + rows * (LINE + 2) + 6, "".join([*parts, *legend]))
