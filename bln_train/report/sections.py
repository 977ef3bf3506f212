"""The report's sections on curves, speed, layers, recipes and environments. No torch here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bln_train.recipe.load import dump_recipe
from bln_train.records import EpochRecord, StepRecord
from bln_train.report.blocks import Block, Figure, Listing, Section, Table, Text
from bln_train.report.charts import Series, band_chart, line_chart
from bln_train.report.groups import Group
from bln_train.report.palette import NUM_COLORS
from bln_train.report.source import Run, Sources
from bln_train.report.svg import Axis
from bln_train.system.units import format_number, format_percent

_IN_ORDER = "layer, in order of the table below"
_MAX_STEPS_DRAWN = 200
_NamedPoints = Sequence[tuple[str, Sequence[tuple[int, float | None]]]]


def curves(groups: Sequence[Group]) -> Section:
    """Loss and accuracy by epoch, and the numbers of each run."""
    blocks: list[Block] = []
    wanted: tuple[tuple[str, str, Callable[[EpochRecord], float | None], float], ...] = (
        ("Training loss", "mean loss of the epoch's steps, nats", lambda r: r.train_loss, 1),
        ("Test loss", "loss on the test images, nats", lambda r: r.test_loss, 1),
        ("Test accuracy", "accuracy on the test images, %", lambda r: r.test_accuracy, 100),
        ("Validation loss", "loss on the validation images, nats", lambda r: r.validation_loss, 1),
        ("Validation accuracy", "accuracy on the validation images, %", lambda r: r.validation_accuracy, 100),
    )
    for title, label, value, scale in wanted:
        figure = _by_epoch(groups, title, label, value, scale)
        if figure is not None:
            blocks.append(figure)
    blocks += [_epoch_table(run, folded=len(groups) > 1) for group in groups for run in group.runs if run.epochs]
    return Section("Loss and accuracy", blocks or [Text("No epoch has ended: -")])


def _by_epoch(
    groups: Sequence[Group], title: str, label: str, value: Callable[[EpochRecord], float | None], scale: float
) -> Figure | None:
    series = [Series(g.name, [(e, scale * v) for e, v in g.by_epoch(value)]) for g in groups]
    series = [line for line in series if line.points]
    if not series:
        return None
    notes = []
    if any(len(group.runs) > 1 for group in groups):
        notes.append("Means over seeds.")
    if len(series) > NUM_COLORS:
        notes.append(f"The first {NUM_COLORS} of {len(series)} lines.")
    drawing = line_chart(title, series[:NUM_COLORS], Axis("epoch"), Axis(label))
    return Figure(title, drawing, " ".join(notes))


def _epoch_table(run: Run, *, folded: bool) -> Table:
    held_out = any(record.num_validation_images for record in run.epochs)
    headings = ["epoch", "step", "train loss", "train accuracy", "test loss", "test accuracy", "images/s"]
    rows = [
        [
            str(r.epoch),
            str(r.step),
            format_number(r.train_loss, 4),
            format_percent(r.train_accuracy),
            format_number(r.test_loss, 4),
            format_percent(r.test_accuracy),
            format_number(r.images_per_second, 1),
            *([format_number(r.validation_loss, 4), format_percent(r.validation_accuracy)] if held_out else []),
        ]
        for r in run.epochs
    ]
    headings += ["validation loss", "validation accuracy"] if held_out else []
    return Table(f"Epochs of {run.path}", headings, rows, folded=folded)


def speed(groups: Sequence[Group]) -> Section:
    """Images per second by epoch."""
    title = "Images per second"
    figure = _by_epoch(groups, title, "training speed, images/s", lambda record: record.images_per_second, 1)
    if figure is None:
        return Section("Speed", [Text("No speed was measured: -")])
    return Section(
        "Speed", [figure, Text("Training steps alone; evaluation and steps under memory tracking are left out.")]
    )


def layers(groups: Sequence[Group]) -> Section:
    """Learned statistics of each batchless layer against what the last effective batch of an epoch showed."""
    shown = [(group, record) for group in groups if (record := _last_with_layers(group.first)) is not None]
    blocks: list[Block] = [*_layer_figures(shown[:NUM_COLORS])] if shown else []
    blocks += [_layer_table(group.first, record, folded=len(shown) > 1) for group, record in shown]
    absent = sorted({group.norm for group in groups} - {group.norm for group, _ in shown})
    if absent:
        blocks.append(Text(f"None of {', '.join(absent)}: no learned statistics, or no epoch has ended."))
    return Section("Statistics of each layer", blocks)


def _last_with_layers(run: Run) -> StepRecord | None:
    return next((record for record in reversed(run.steps) if record.layers), None)


def _layer_figures(shown: Sequence[tuple[Group, StepRecord]]) -> Iterator[Figure]:
    """Of one run bands over the channels, of several a line each."""
    places = [(group.name, list(enumerate((record.layers or {}).items(), start=1))) for group, record in shown]
    title, seen = "Observed / learned standard deviation", "As the forward of the last step saw them."
    bands = [(r.ratio_low, r.ratio_mean, r.ratio_high) for _, (_, r) in places[0][1]]
    if len(shown) == 1 and all(value and value > 0 for band in bands for value in band):
        drawing = band_chart(
            title, bands, Axis(_IN_ORDER), Axis("ratio", log=2 if _is_wide(bands) else 0), level=(1.0, "they agree"),
            key="channels: smallest to largest, geometric mean",
        )  # fmt: skip
        yield Figure(title, drawing, seen)
    else:
        means = [(name, [(n, r.ratio_mean) for n, (_, r) in found]) for name, found in places]
        yield _lines(title, means, _IN_ORDER, "ratio, geometric mean of channels", (1.0, "they agree"), seen)
    lines: _NamedPoints = [(name, [(n, r.offset_rms) for n, (_, r) in found]) for name, found in places]
    yield _lines(
        "Distance of observed and learned mean", lines, _IN_ORDER, "rms of channels, in learned std", None, seen
    )
    lines = [
        (group.name, [(n, (record.nll_by_layer or {}).get(key)) for n, key in enumerate(record.layers or {}, start=1)])
        for group, record in shown
    ]
    fits = "inputs have the learned variance about the learned mean"
    yield _lines("Likelihood of each layer", lines, _IN_ORDER, "nll, nats", (0.0, fits), seen)
    lines = [
        (group.name, _thinned([(r.step, r.nll) for r in group.first.steps if r.nll is not None])) for group, _ in shown
    ]
    yield _lines("Likelihood through training", lines, "optimizer step", "nll, mean of layers, nats", (0.0, fits), "")


def _is_wide(bands: Sequence[tuple[float, float, float]]) -> bool:
    return max(high for _, _, high in bands) > 8 * min(low for low, _, _ in bands)


def _thinned(points: list[tuple[int, float | None]]) -> list[tuple[int, float | None]]:
    return points[:: max(1, -(-len(points) // _MAX_STEPS_DRAWN))]


def _lines(
    title: str,
    lines: _NamedPoints,
    x_label: str,
    y_label: str,
    level: tuple[float, str] | None,
    caption: str,
) -> Figure:
    series = [Series(name, [(float(x), y) for x, y in points if y is not None]) for name, points in lines]
    drawing = line_chart(title, series, Axis(x_label), Axis(y_label, from_zero=level is None), level=level)
    return Figure(title, drawing, caption)


def _layer_table(run: Run, record: StepRecord, *, folded: bool) -> Table:
    nll = record.nll_by_layer or {}
    headings = (
        "layer", "#", "channels", "learned mean", "learned std", "mean off by (std)", "std observed/learned", "nll", "dead",
        "at floor",
    )  # fmt: skip
    rows = [
        (
            key,
            str(n),
            str(r.num_channels),
            _span(r.mean_low, r.mean_high),
            _span(r.std_low, r.std_high),
            format_number(r.offset_rms, 3),
            f"{format_number(r.ratio_mean, 3)} ({_span(r.ratio_low, r.ratio_high)})",
            format_number(nll.get(key), 4),
            str(r.num_dead),
            str(r.num_at_floor),
        )
        for n, (key, r) in enumerate((record.layers or {}).items(), start=1)
    ]
    return Table(f"Layers of {run.path} after step {record.step}", headings, rows, folded=folded)


def _span(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{low:.3g} to {high:.3g}"


def recipes(groups: Sequence[Group]) -> Section:
    """Settings that differ between the groups, and each whole recipe."""
    blocks: list[Block] = []
    settings = [_flat(group.first.recipe.model_dump(mode="json")) for group in groups]
    if len(groups) > 1:
        keys = list(dict.fromkeys(key for found in settings for key in found if not key.endswith("train.seed")))
        differing = [key for key in keys if len({found.get(key) for found in settings}) > 1]
        rows = [(key, *(found.get(key, "-") for found in settings)) for key in differing]
        if rows:
            blocks.append(Table("Settings that differ", ("setting", *(g.name for g in groups)), rows, words=True))
        else:
            blocks.append(Text("No setting differs but the seed."))
    blocks += [Listing(f"Recipe of {group.first.path}", dump_recipe(group.first.recipe)) for group in groups]
    return Section("Recipes", blocks)


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value if isinstance(value, str) else json.dumps(value)
    return found


def environments(sources: Sources, groups: Sequence[Group]) -> Section:
    """Devices and versions, each only once, with the folders that have them; and what the runs had to say."""
    folders: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for run in (run for group in groups for run in group.runs):
        about = run.environment | ({"data": run.data} if run.data else {})
        folders.setdefault(tuple(about.items()), []).append(str(run.path))
    for sweep in sources.sweeps:
        folders.setdefault(tuple(sweep.environment.items()), []).append(str(sweep.path))
    blocks: list[Block] = []
    for items, paths in folders.items():
        title = paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
        blocks.append(
            Table(f"Environment of {title}", ("what", "value"), [*items] or [("environment.json", "-")], words=True)
        )
    for group in groups:
        for run in group.runs:
            if run.notices:
                blocks.append(Listing(f"Notices of {run.path}", "\n".join(run.notices)))
    return Section("Environment", blocks)
