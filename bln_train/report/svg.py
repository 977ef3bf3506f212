"""Drawings as inline SVG: axes, lines, stacked bars, bands. Colours are CSS variables of the page. No torch here.

Every drawing is WIDTH units wide, so that its text can be read where that is the width of a phone. What colours tell is told by
markers, dashes or hatches as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 400
_LEFT, _RIGHT, _TOP, _PLOT_HEIGHT = 56, 10, 12, 190
_LINE = 15  # height of a line of text
_DASHES = ("", "6 3", "2 3", "8 3 2 3")
_NUM_MARKERS = 6
_PLUS = "-1.3,-4 1.3,-4 1.3,-1.3 4,-1.3 4,1.3 1.3,1.3 1.3,4 -1.3,4 -1.3,1.3 -4,1.3 -4,-1.3 -1.3,-1.3"
NUM_COLORS = 8


@dataclass(frozen=True)
class Series:
    """A line of a chart."""

    label: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Bar:
    """A stack of parts; `text` is written at its end."""

    label: str
    parts: Sequence[float]
    text: str


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    log2_x: bool = False,
    from_zero: bool = False,
    level: tuple[float, str] | None = None,
) -> str:
    """Lines with markers, and a legend below.

    Args:
        log2_x: powers of two are evenly spaced.
        from_zero: the vertical axis begins at 0.
        level: where to draw a horizontal line, and what it is.
    """
    points = [(x, y) for line in series for x, y in line.points if math.isfinite(x) and math.isfinite(y)]
    xs, ys = [x for x, _ in points], [y for _, y in points] + ([level[0]] if level else [])
    x_of = _Scale(xs, _LEFT, WIDTH - _RIGHT, log2=log2_x, whole=True)
    y_of = _Scale(ys + [0.0] * from_zero, _TOP + _PLOT_HEIGHT, _TOP)
    parts = [_grid(x_of, y_of, x_label, y_label)]
    for n, line in enumerate(series):
        places = [(x_of(x), y_of(y)) for x, y in line.points if math.isfinite(x) and math.isfinite(y)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline class="line s{n % NUM_COLORS}" stroke-dasharray="{_DASHES[n % 4]}" points="{path}"/>')
        every = math.ceil(len(places) / 12)
        marked = [p for i, p in enumerate(places) if i % every == n % every or len(places) < 2]
        parts += [_marker(n, x, y) for x, y in marked]
    if level:
        parts.append(_level_line(_LEFT, y_of(level[0]), WIDTH - _RIGHT, y_of(level[0])))
    keys = [
        (
            line.label,
            f'<line class="line s{n % NUM_COLORS}" stroke-dasharray="{_DASHES[n % 4]}" x2="26"/>{_marker(n, 13, 0)}',
        )
        for n, line in enumerate(series)
    ]
    if level:
        keys.append((level[1], _level_line(0, 0, 26, 0)))
    return _drawing(title, parts, keys, _TOP + _PLOT_HEIGHT + 40)


def bar_chart(
    title: str,
    bars: Sequence[Bar],
    names: Sequence[str],
    *,
    x_label: str,
    levels: Sequence[tuple[float, str]] = (),
) -> str:
    """Horizontal stacks, each below its label; `names` are those of their parts, `levels` vertical lines with what they are."""
    height = _TOP + 2.6 * _LINE * len(bars)
    ends = [sum(bar.parts) for bar in bars] + [value for value, _ in levels]
    x_of = _Scale([0.0, *ends], 8, WIDTH - 16)
    parts, labels = [], []  # labels on top of all lines
    for place, tick in x_of.ticks:
        parts.append(f'<line class="grid" x1="{place:.1f}" x2="{place:.1f}" y1="{_TOP}" y2="{height:.1f}"/>')
        parts.append(_text(place, height + 14, tick, "middle"))
    for n, bar in enumerate(bars):
        y, x = _TOP + 2.6 * _LINE * n, x_of(0)
        labels.append(_text(8, y + 11, f"{_short(bar.label, 46)}: {bar.text}", "start"))
        for k, value in enumerate(bar.parts):
            width = x_of(value) - x_of(0)
            if width > 0:
                parts.append(_patch(k, x, y + 16, width, 17))
            x += width
    for n, (value, _) in enumerate(levels):
        parts.append(_level_line(x_of(value), _TOP, x_of(value), height, n))
    parts.append(_text(WIDTH / 2, height + 30, x_label, "middle"))
    keys = [(name, _patch(k, 0, -6, 26, 12)) for k, name in enumerate(names)]
    keys += [(what, _level_line(13, -7, 13, 7, n)) for n, (_, what) in enumerate(levels)]
    return _drawing(title, parts + labels, keys, height + 40)


def area_chart(
    title: str,
    names: Sequence[str],
    layers: Sequence[Sequence[float]],
    phases: Sequence[tuple[str, int]],
    *,
    y_label: str,
    level: tuple[float, str] | None = None,
) -> str:
    """Stacked steps, a step for each point, under the names of the phases that the points belong to.

    Args:
        layers: of each name a value for each point.
        phases: name and number of points of each, in order; the name of every other one is a line lower.
    """
    num_points = sum(number for _, number in phases)
    sums = [sum(values) for values in zip(*layers, strict=True)]
    top = _TOP + 2 * _LINE
    y_of = _Scale([0.0, *sums, *([level[0]] if level else [])], top + _PLOT_HEIGHT, top)
    width = (WIDTH - _RIGHT - _LEFT) / num_points
    below = [0.0] * num_points
    parts = [_y_grid(y_of, y_label)]
    for k, values in enumerate(layers):
        above = [a + b for a, b in zip(below, values, strict=True)]
        if any(values):
            outline = " ".join([*_steps(above, width, y_of), *reversed(_steps(below, width, y_of))])
            parts += [f'<polygon class="{kind}" points="{outline}"/>' for kind in (f"f{k % NUM_COLORS}", f"h{k % 5}")]
        below = above
    start = 0
    for n, (name, number) in enumerate(phases):
        x, x_end = _LEFT + width * start, _LEFT + width * (start + number)
        parts.append(f'<line class="phase" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{top + _PLOT_HEIGHT}"/>')
        parts.append(_text((x + x_end) / 2, _TOP + 8 + _LINE * (n % 2), name, "middle"))
        start += number
    if level:
        parts.append(_level_line(_LEFT, y_of(level[0]), WIDTH - _RIGHT, y_of(level[0])))
    parts.append(
        _text((_LEFT + WIDTH) / 2, top + _PLOT_HEIGHT + 16, "operators of one step, in order, not to scale", "middle")
    )
    keys = [(name, _patch(k, 0, -6, 26, 12)) for k, name in enumerate(names)]
    if level:
        keys.append((level[1], _level_line(0, 0, 26, 0)))
    return _drawing(title, parts, keys, top + _PLOT_HEIGHT + 24)


def band_chart(
    title: str,
    bands: Sequence[tuple[float, float, float]],
    *,
    x_label: str,
    y_label: str,
    level: tuple[float, str],
    key: str,
    log: bool = False,
) -> str:
    """Of each place 1, 2, ... a bar from low to high with a dot between; `key` says what they are."""
    values = [v for band in bands for v in band] + [level[0]]
    x_of = _Scale([0.5, len(bands) + 0.5], _LEFT, WIDTH - _RIGHT, whole=True)
    y_of = _Scale(values, _TOP + _PLOT_HEIGHT, _TOP, log2=log)
    parts = [_grid(x_of, y_of, x_label, y_label), _level_line(_LEFT, y_of(level[0]), WIDTH - _RIGHT, y_of(level[0]))]
    for n, (low, middle, high) in enumerate(bands, start=1):
        parts.append(_band(x_of(n), y_of(low), y_of(middle), y_of(high)))
    keys = [(key, _band(13, 6, 0, -6)), (level[1], _level_line(0, 0, 26, 0))]
    return _drawing(title, parts, keys, _TOP + _PLOT_HEIGHT + 40)


class _Scale:
    """Values to places along an axis, and its ticks."""

    def __init__(
        self, values: Sequence[float], begin: float, end: float, *, log2: bool = False, whole: bool = False
    ) -> None:
        self.log2 = log2
        inside = [self._bend(v) for v in values if math.isfinite(v) and (v > 0 or not log2)] or [0.0, 1.0]
        low, high = min(inside), max(inside)
        if high - low < 1e-9 * max(1.0, abs(high)):
            room = max(0.5, 1e-3 * abs(high))
            low, high = low - room, high + room
        step = 1.0 if log2 and high - low >= 1 else _nice_step((high - low) / 5, whole=whole and not log2)
        if log2 and (high - low) / step > 8:
            step = math.ceil((high - low) / 8)
        if not whole:
            low, high = step * math.floor(low / step + 1e-9), step * math.ceil(high / step - 1e-9)
        self.low, self.high, self.begin, self.end = low, high, begin, end
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        self.ticks = [
            (self._place(n * step), f"{2 ** (n * step) if log2 else n * step:.4g}") for n in range(first, last + 1)
        ]

    def _bend(self, value: float) -> float:
        return math.log2(value) if self.log2 else value

    def _place(self, bent: float) -> float:
        return self.begin + (self.end - self.begin) * (bent - self.low) / (self.high - self.low)

    def __call__(self, value: float) -> float:
        return self._place(self._bend(max(value, 2.0**-40) if self.log2 else value))


def _nice_step(size: float, *, whole: bool) -> float:
    power = 10.0 ** math.floor(math.log10(size))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= size * 0.999)
    return max(1.0, step) if whole else step


def _grid(x_of: _Scale, y_of: _Scale, x_label: str, y_label: str) -> str:
    bottom = _TOP + _PLOT_HEIGHT
    parts = [_y_grid(y_of, y_label)]
    for place, tick in x_of.ticks:
        parts.append(f'<line class="axis" x1="{place:.1f}" x2="{place:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(_text(place, bottom + 16, tick, "middle"))
    parts.append(_text((_LEFT + WIDTH - _RIGHT) / 2, bottom + 32, x_label, "middle"))
    return "".join(parts)


def _y_grid(y_of: _Scale, label: str) -> str:
    parts = []
    for place, tick in y_of.ticks:
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(_text(_LEFT - 5, place + 4, tick, "end"))
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y_of.begin}" y2="{y_of.begin}"/>')
    middle = (y_of.begin + y_of.end) / 2
    parts.append(
        f'<text text-anchor="middle" transform="translate(11 {middle:.1f}) rotate(-90)">{escape(label)}</text>'
    )
    return "".join(parts)


def _steps(values: Sequence[float], width: float, y_of: _Scale) -> list[str]:
    return [f"{_LEFT + width * (n + side):.1f},{y_of(v):.1f}" for n, v in enumerate(values) for side in (0, 1)]


def _band(x: float, low: float, middle: float, high: float) -> str:
    return (
        f'<line class="line s0" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
        f'<circle class="f0" cx="{x:.1f}" cy="{middle:.1f}" r="3"/>'
    )


def _marker(n: int, x: float, y: float) -> str:
    kind = f'class="mark f{n % NUM_COLORS}"'
    if n % _NUM_MARKERS == 0:
        return f'<circle {kind} cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'
    shapes = ("-3,-3 3,-3 3,3 -3,3", "0,-4 4,3 -4,3", "0,-5 4,0 0,5 -4,0", "0,4 4,-3 -4,-3", _PLUS)
    return f'<polygon {kind} transform="translate({x:.1f} {y:.1f})" points="{shapes[n % _NUM_MARKERS - 1]}"/>'


def _patch(k: int, x: float, y: float, width: float, height: float) -> str:
    box = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}"'
    return f'<rect class="f{k % NUM_COLORS}" {box}/><rect class="h{k % 5}" {box}/>'


def _level_line(x1: float, y1: float, x2: float, y2: float, n: int = 0) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line class="level" stroke-dasharray="{("5 3", "2 2")[n % 2]}" {ends}/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _short(text: str, length: int) -> str:
    """Text that fits; tables have the whole."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _drawing(title: str, parts: Sequence[str], keys: Sequence[tuple[str, str]], height: float) -> str:
    """The parts and below them the legend, in two columns where its words are short."""
    columns = 2 if all(len(name) <= 22 for name, _ in keys) else 1
    rows = math.ceil(len(keys) / columns)
    legend = []
    for n, (name, drawing) in enumerate(keys):
        x, y = 12 + (n % columns) * WIDTH / 2, height + 8 + (n // columns) * (_LINE + 2)
        legend.append(
            f'<g transform="translate({x:.1f} {y:.1f})">{drawing}{_text(33, 4, _short(name, 58), "start")}</g>'
        )
    total = height + rows * (_LINE + 2) + 6
    return f'<svg viewBox="0 0 {WIDTH} {total:.0f}" role="img" aria-label="{escape(title)}">{"".join(parts)}{"".join(legend)}</svg>'
