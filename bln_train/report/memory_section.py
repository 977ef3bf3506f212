"""The report's sections on memory: the split of peaks, peaks against batch sizes, a step's timeline. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bln_train.records import MemoryRecord, TimelineRecord
from bln_train.report.blocks import Block, Figure, Section, Table, Text
from bln_train.report.charts import Bar, Series, area_chart, bar_chart, line_chart
from bln_train.report.groups import Group
from bln_train.report.palette import NUM_COLORS
from bln_train.report.source import Sweep, cell_name
from bln_train.report.svg import Axis, Drawing
from bln_train.system.units import format_bytes, format_number

PARTS = ("parameters", "gradients", "optimizer", "activations", "other")
_KEYS = ("parameter_bytes", "gradient_bytes", "optimizer_bytes", "activation_bytes", "other_bytes")
_MAX_TIMELINES = 4
_SPLIT_CAPTION = (
    "Parts are those alive at the moment of the peak. Activations are all that a step creates and frees again; other are buffers "
    "and what was alive before."
)


def memory_of_runs(groups: Sequence[Group]) -> Section:
    """Of each group the run with the largest peak."""
    largest = [(group, memory) for group in groups if (memory := _largest(group)) is not None]
    if not largest:
        return Section("Memory", [Text("Memory was not measured: -")])
    budgets = sorted({budget for group, _ in largest if (budget := group.budget_bytes) is not None})
    title = "Peak memory of training by what it is for"
    unit, name = _unit([*(memory.peak_bytes for _, memory in largest), *budgets])
    drawing = bar_chart(
        title,
        [Bar(g.name, [_part(m, key) / unit for key in _KEYS], format_bytes(m.peak_bytes)) for g, m in largest],
        PARTS,
        x_label=f"peak memory of training, {name}",
        levels=[(budget / unit, f"memory budget, {format_bytes(budget)}") for budget in budgets],
    )
    blocks: list[Block] = [Figure(title, drawing, f"{_SPLIT_CAPTION} {_method(largest[0][1])}")]
    series = _against_effective(
        [(g.norm, m.micro_batch_size, m.effective_batch_size, m.peak_bytes) for g, m in largest]
    )
    blocks += _peaks_against_batch(series)
    blocks += _timelines([(group.name, run.timeline) for group in groups for run in group.runs[:1]])
    blocks.append(
        Table(
            "Peak memory of training",
            ("run", "peak", *PARTS, "reserved", "whole card", "process peak"),
            [
                (
                    g.name,
                    *(format_bytes(getattr(m, key)) for key in ("peak_bytes", *_KEYS)),
                    *map(format_bytes, _beside(m)),
                )
                for g, m in largest
            ],
        )
    )
    return Section("Memory", blocks)


def memory_of_sweep(sweep: Sweep) -> Section:
    """What `bln-train memory` measured, a bar a cell."""
    measured = [row for row in sweep.rows if row.get("peak_bytes") is not None]
    blocks: list[Block] = [
        Text(f"{sweep.title}; {sweep.environment.get('device', '-')}. Random images; nothing is learned.")
    ]
    if measured:
        title = "Peak memory of training by what it is for"
        blocks.append(Figure(title, cell_bars(title, measured, sweep.floor_bytes), _SPLIT_CAPTION))
        sizes = [(r["norm"], r["micro_batch_size"], r["effective_batch_size"], r["peak_bytes"]) for r in measured]
        blocks += _peaks_against_batch(_against_effective(sizes))
    blocks += _timelines(
        [(f"{norm}, micro-batch {t.micro_batch_size} of {t.effective_batch_size}", t) for norm, t in sweep.timelines]
    )
    blocks.append(_cell_table(sweep))
    return Section(f"Memory sweep {sweep.path}", blocks)


def cell_bars(title: str, rows: Sequence[dict[str, Any]], floor_bytes: int | None) -> Drawing:
    """The peaks of a sweep's cells, each split by what it is for."""
    unit, name = _unit([row.get("peak_bytes") for row in rows])
    bars = [
        Bar(
            cell_name(row),
            [(row.get(key) or 0) / unit for key in _KEYS],
            "not measured" if row.get("peak_bytes") is None else format_bytes(row["peak_bytes"]),
        )
        for row in rows
    ]
    levels = (
        [] if floor_bytes is None else [(floor_bytes / unit, f"floor: one image, no norm, {format_bytes(floor_bytes)}")]
    )
    return bar_chart(title, bars, PARTS, x_label=f"peak memory of training, {name}", levels=levels)


def _cell_table(sweep: Sweep) -> Table:
    headings = (
        "norm, batches", "peak", *PARTS, "saved/image", "peak/floor", "ms/image", "x none", "not measured because",
    )  # fmt: skip
    rows = [
        (
            cell_name(row),
            *(format_bytes(row.get(key)) for key in ("peak_bytes", *_KEYS, "saved_bytes_per_image")),
            *(format_number(row.get(key), 2) for key in ("peak_over_floor", "ms_per_image", "ms_over_none")),
            row["problem"] or "-",
        )
        for row in sweep.rows
    ]
    return Table("Memory and time of training", headings, rows)


def _largest(group: Group) -> MemoryRecord | None:
    memories = [run.memory for run in group.runs if run.memory is not None]
    return max(memories, key=lambda memory: memory.peak_bytes or 0, default=None)


def _part(memory: MemoryRecord, key: str) -> float:
    return float(getattr(memory, key) or 0)


def _beside(memory: MemoryRecord) -> tuple[int | None, int | None, int | None]:
    return memory.reserved_bytes, memory.device_bytes, memory.process_bytes


def _method(memory: MemoryRecord) -> str:
    if memory.method == "allocator":
        return f"Counted by CUDA's allocator on {memory.device}."
    return f"Tensors alive during the first steps on {memory.device}; kernels' scratch, libraries and data set not included."


def _unit(values: Iterable[int | None]) -> tuple[float, str]:
    """A binary unit in which the largest of the values reads well, and its name."""
    largest = max((value for value in values if value is not None), default=0)
    power = next((n for n, bound in enumerate((2**11, 2**21, 2**31)) if largest < bound), 3)
    return float(1024**power), ("B", "KiB", "MiB", "GiB")[power]


def _against_effective(cells: Iterable[tuple[str, int, int, int | None]]) -> dict[str, list[tuple[float, float]]]:
    """(effective batch, peak in bytes) by norm and micro-batch, where a line has more than one."""
    lines: dict[str, dict[int, int]] = {}
    for norm, micro, effective, peak in cells:
        if peak is not None:
            of_size = lines.setdefault(f"{norm}, micro-batch {'full' if micro == effective > 1 else micro}", {})
            of_size[effective] = max(peak, of_size.get(effective, 0))
    return {
        name: [(float(e), float(p)) for e, p in sorted(line.items())] for name, line in lines.items() if len(line) > 1
    }


def _peaks_against_batch(lines: dict[str, list[tuple[float, float]]]) -> list[Block]:
    if not lines:
        return []
    unit, name = _unit(int(peak) for line in lines.values() for _, peak in line)
    title = "Peak memory against the effective batch"
    series = [Series(label, [(e, peak / unit) for e, peak in line]) for label, line in list(lines.items())[:NUM_COLORS]]
    x, y = Axis("effective batch, images", log=2), Axis(f"peak memory, {name}", from_zero=True)
    drawing = line_chart(title, series, x, y)
    return [Figure(title, drawing, _left_out(len(lines), "lines"))]


def _timelines(timelines: Sequence[tuple[str, TimelineRecord | None]]) -> list[Block]:
    found = [(name, timeline) for name, timeline in timelines if timeline is not None]
    return [timeline_figure(name, timeline) for name, timeline in found[:_MAX_TIMELINES]]


def timeline_figure(name: str, timeline: TimelineRecord) -> Figure:
    """Live bytes through a step, stacked by what they are for."""
    layers = [getattr(timeline, key) for key in _KEYS]
    sums = [sum(values) for values in zip(*layers, strict=True)]
    unit, unit_name = _unit(sums)
    title = f"One optimizer step: {name}"
    phases, layers = widened(timeline, layers)
    drawing = area_chart(
        title,
        PARTS,
        [[value / unit for value in values] for values in layers],
        phases,
        y_label=f"live tensors, {unit_name}",
        level=(max(sums) / unit, f"peak, {format_bytes(max(sums))}"),
    )
    rows, start = [], 0
    for phase, number in zip(timeline.phases, timeline.num_points, strict=True):
        at = max(range(start, start + number), key=sums.__getitem__, default=start)
        rows.append(
            (phase, *(format_bytes(values[at]) for values in [sums, *(getattr(timeline, key) for key in _KEYS)]))
        )
        start += number
    caption = (
        f"Micro-steps in the step: {timeline.num_micro_steps}. The first and the last are drawn whole; of those between, "
        "the largest moment of any."
        if "between" in timeline.phases
        else f"Micro-steps in the step: {timeline.num_micro_steps}."
    )
    table = Table(f"{title}: largest moment of each phase", ("phase", "live", *PARTS), rows, folded=True)
    return Figure(title, drawing, caption, table)


def widened(
    timeline: TimelineRecord, layers: Sequence[Sequence[float]]
) -> tuple[list[tuple[str, int]], list[list[float]]]:
    """Phases with their number of points, and the layers, short phases repeated to a width at which they can be seen."""
    smallest = max(timeline.num_points) // 3 + 1
    phases, out, start = [], [list[float]() for _ in layers], 0
    for name, number in zip(timeline.phases, timeline.num_points, strict=True):
        times = -(-smallest // number) if number else 0
        for k, values in enumerate(layers):
            out[k] += [value for value in values[start : start + number] for _ in range(times)]
        phases.append((name, number * times))
        start += number
    return phases, out


def _left_out(number: int, what: str) -> str:
    return f"The first {NUM_COLORS} of {number} {what}." if number > NUM_COLORS else ""
