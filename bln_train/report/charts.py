"""Charts of lines, stacked bars, stacked areas and ranges, as SVG. No torch here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bln_train.report import svg
from bln_train.report.palette import NUM_COLORS
from bln_train.report.svg import LEFT, LINE, PLOT_HEIGHT, RIGHT, TOP, WIDTH, Axis, Drawing, Scale


@dataclass(frozen=True)
class Series:
    """A line of a chart."""

    label: str
    points: Sequence[tuple[float, float]]
    ranges: Sequence[tuple[float, float]] = ()
    """Lowest and highest value at each point; none where there are none."""
    shaded: bool = False
    """Whether the ranges are a shaded band; if not, each is a vertical bar."""
    look: tuple[int, int] | None = None
    """Number of its colour and marker, and of its dash; None for the line's place in the chart."""


@dataclass(frozen=True)
class Bar:
    """A stack of parts; `text` is written behind its label."""

    label: str
    parts: Sequence[float]
    text: str


def line_chart(
    title: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    *,
    level: tuple[float, str] | None = None,
    legend: bool = True,
) -> Drawing:
    """Lines with markers, and a legend below.

    Args:
        level: value of a horizontal line, and its name.
        legend: whether there is one; False where a drawing beside it has it.
    """
    finite = [_finite(line) for line in series]
    ys = [value for line in finite for _, *values in line for value in values] + ([level[0]] if level else [])
    xs = [point[0] for line in finite for point in line]
    x_of = Scale(xs, LEFT, WIDTH - RIGHT, log=x.log, whole=True, limits=x.limits)
    y_of = Scale(ys + [0.0] * y.from_zero, TOP + PLOT_HEIGHT, TOP, log=y.log, limits=y.limits)
    lines: list[str] = []
    keys: list[tuple[str, str]] = []
    for n, (line, points) in enumerate(zip(series, finite, strict=True)):
        places = [(x_of(at), *map(y_of, values)) for at, *values in points]
        lines += _line(line, n, places)
        kind, dash = line.look or (n, n)
        sample = f'<line class="line s{kind % NUM_COLORS}" stroke-dasharray="{svg.DASHES[dash % 4]}" x2="26"/>'
        keys.append((line.label, sample + svg.marker(kind, 13, 0)))
    parts = [svg.grid(x_of, y_of, x.label, y.label), *(lines if y.limits is None else [svg.clipped(lines)])]
    if level:
        parts.append(svg.level_line(LEFT, y_of(level[0]), WIDTH - RIGHT, y_of(level[0])))
        keys.append((level[1], svg.level_line(0, 0, 26, 0)))
    return svg.with_legend(title, parts, keys if legend else [], TOP + PLOT_HEIGHT + 40)


def _finite(line: Series) -> list[tuple[float, ...]]:
    """(x, y) or (x, y, lowest, highest) of the points that are finite; a range that is not is left out."""
    if not line.ranges:
        return [point for point in line.points if all(map(math.isfinite, point))]
    found = list[tuple[float, ...]]()
    for (x, y), around in zip(line.points, line.ranges, strict=True):
        if math.isfinite(x) and math.isfinite(y):
            found.append((x, y, *(around if all(map(math.isfinite, around)) else (y, y))))
    return found


def _line(line: Series, n: int, places: Sequence[tuple[float, ...]]) -> list[str]:
    """The n-th line of a chart; `places` are (x, y) or (x, y, lowest, highest) in the drawing."""
    kind, dash = line.look or (n, n)
    color, parts = kind % NUM_COLORS, []
    if line.ranges and line.shaded:
        outline = [(x, low) for x, _, low, _ in places] + [(x, high) for x, _, _, high in reversed(places)]
        parts.append(f'<polygon class="spread f{color}" points="{_path(outline)}"/>')
    elif line.ranges:
        for x, _, low, high in places:
            ends = f"M{x - 3:.1f},{low:.1f} h6 M{x - 3:.1f},{high:.1f} h6 M{x:.1f},{low:.1f} V{high:.1f}"
            parts.append(f'<path class="line s{color}" d="{ends}"/>')
    path = _path([(x, y) for x, y, *_ in places])
    parts.append(f'<polyline class="line s{color}" stroke-dasharray="{svg.DASHES[dash % 4]}" points="{path}"/>')
    every = math.ceil(len(places) / 12)
    marked = [place for i, place in enumerate(places) if i % every == n % every or len(places) < 2]
    return [*parts, *(svg.marker(kind, x, y) for x, y, *_ in marked)]


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def bar_chart(
    title: str,
    bars: Sequence[Bar],
    names: Sequence[str],
    *,
    x_label: str,
    levels: Sequence[tuple[float, str]] = (),
) -> Drawing:
    """Horizontal stacks, each below its label.

    Args:
        names: of the parts of a stack.
        levels: values of vertical lines, with their names.
    """
    height = TOP + 2.6 * LINE * len(bars)
    ends = [sum(bar.parts) for bar in bars] + [value for value, _ in levels]
    x_of = Scale([0.0, *ends], 8, WIDTH - 16)
    parts, labels = [], []  # labels on top of all lines
    for place, tick in x_of.ticks:
        parts.append(f'<line class="grid" x1="{place:.1f}" x2="{place:.1f}" y1="{TOP}" y2="{height:.1f}"/>')
        parts.append(svg.text(place, height + 14, tick, "middle"))
    for n, bar in enumerate(bars):
        y, x = TOP + 2.6 * LINE * n, x_of(0)
        labels.append(svg.text(8, y + 11, f"{svg.short(bar.label, 46)}: {bar.text}", "start"))
        for k, value in enumerate(bar.parts):
            width = x_of(value) - x_of(0)
            if width > 0:
                parts.append(svg.patch(k, x, y + 16, width, 17))
            x += width
    for n, (value, _) in enumerate(levels):
        parts.append(svg.level_line(x_of(value), TOP, x_of(value), height, n))
    parts.append(svg.text(WIDTH / 2, height + 30, x_label, "middle"))
    keys = [(name, svg.patch(k, 0, -6, 26, 12)) for k, name in enumerate(names)]
    keys += [(what, svg.level_line(13, -7, 13, 7, n)) for n, (_, what) in enumerate(levels)]
    return svg.with_legend(title, parts + labels, keys, height + 40)


def area_chart(
    title: str,
    names: Sequence[str],
    layers: Sequence[Sequence[float]],
    phases: Sequence[tuple[str, int]],
    *,
    y_label: str,
    level: tuple[float, str],
) -> Drawing:
    """Stacked steps, a step for each point, under the names of the phases that the points belong to.

    Args:
        layers: a value for each point, by name.
        phases: name and number of points of each, in order; every second name is a line lower.
        level: value of a horizontal line, and its name.
    """
    num_points = sum(number for _, number in phases)
    sums = [sum(values) for values in zip(*layers, strict=True)]
    top = TOP + 2 * LINE
    y_of = Scale([0.0, *sums, level[0]], top + PLOT_HEIGHT, top)
    width = (WIDTH - RIGHT - LEFT) / num_points
    parts = [svg.y_grid(y_of, y_label), *_areas(layers, width, y_of), *_phases(phases, width, top + PLOT_HEIGHT)]
    parts.append(svg.level_line(LEFT, y_of(level[0]), WIDTH - RIGHT, y_of(level[0])))
    below = "operators of one step, in order, not to scale"
    parts.append(svg.text((LEFT + WIDTH) / 2, top + PLOT_HEIGHT + 16, below, "middle"))
    keys = [(name, svg.patch(k, 0, -6, 26, 12)) for k, name in enumerate(names)]
    return svg.with_legend(title, parts, [*keys, (level[1], svg.level_line(0, 0, 26, 0))], top + PLOT_HEIGHT + 24)


def _areas(layers: Sequence[Sequence[float]], width: float, y_of: Scale) -> list[str]:
    """Each layer on top of those before it."""
    parts: list[str] = []
    below = [0.0] * len(layers[0])
    for k, values in enumerate(layers):
        above = [a + b for a, b in zip(below, values, strict=True)]
        if any(values):
            outline = " ".join([*_steps(above, width, y_of), *reversed(_steps(below, width, y_of))])
            parts += [f'<polygon class="{kind}" points="{outline}"/>' for kind in (f"f{k % NUM_COLORS}", f"h{k % 5}")]
        below = above
    return parts


def _steps(values: Sequence[float], width: float, y_of: Scale) -> list[str]:
    return [f"{LEFT + width * (n + side):.1f},{y_of(v):.1f}" for n, v in enumerate(values) for side in (0, 1)]


def _phases(phases: Sequence[tuple[str, int]], width: float, bottom: float) -> list[str]:
    """A line where each phase begins, and its name."""
    parts, start = [], 0
    for n, (name, number) in enumerate(phases):
        x, x_end = LEFT + width * start, LEFT + width * (start + number)
        parts.append(f'<line class="phase" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(svg.text((x + x_end) / 2, TOP + 8 + LINE * (n % 2), name, "middle"))
        start += number
    return parts


def band_chart(
    title: str,
    bands: Sequence[tuple[float, float, float]],
    x: Axis,
    y: Axis,
    *,
    level: tuple[float, str],
    key: str,
) -> Drawing:
    """At each place 1, 2, ... a bar from low to high with a dot between.

    Args:
        bands: low, middle and high at each place.
        level: value of a horizontal line, and its name.
        key: name of the bars.
    """
    values = [v for band in bands for v in band] + [level[0]]
    x_of = Scale([0.5, len(bands) + 0.5], LEFT, WIDTH - RIGHT, whole=True)
    y_of = Scale(values, TOP + PLOT_HEIGHT, TOP, log=y.log)
    line = svg.level_line(LEFT, y_of(level[0]), WIDTH - RIGHT, y_of(level[0]))
    parts = [svg.grid(x_of, y_of, x.label, y.label), line]
    parts += [_band(x_of(n), y_of(low), y_of(middle), y_of(high)) for n, (low, middle, high) in enumerate(bands, 1)]
    keys = [(key, _band(13, 6, 0, -6)), (level[1], svg.level_line(0, 0, 26, 0))]
    return svg.with_legend(title, parts, keys, TOP + PLOT_HEIGHT + 40)


def _band(x: float, low: float, middle: float, high: float) -> str:
    return (
        f'<line class="line s0" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
        f'<circle class="f0" cx="{x:.1f}" cy="{middle:.1f}" r="3"/>'
    )
