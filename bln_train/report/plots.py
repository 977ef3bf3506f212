"""Drawings of a comparison and of a memory sweep, as SVG files. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bln_train.records import TimelineRecord
from bln_train.report.charts import Series, line_chart
from bln_train.report.memory_section import cell_bars, timeline_figure
from bln_train.report.sheet import sheet
from bln_train.report.svg import Axis
from bln_train.system.atomic import write_atomically

_FIGURES: tuple[tuple[str, str, str | None, float, str], ...] = (  # file, figure, its spread, scale, label
    ("accuracy", "test_accuracy_mean", "test_accuracy_std", 100.0, "test accuracy, %"),
    ("peak_memory", "peak_bytes", None, 1 / 2**20, "peak memory of training, MiB"),
    ("validation_loss", "best_validation_loss_mean", "best_validation_loss_std", 1.0, "best validation loss, nats"),
    (
        "validation_accuracy",
        "best_validation_accuracy_mean",
        "best_validation_accuracy_std",
        100.0,
        "best validation accuracy, %",
    ),
)  # the last two only where images are held out


def plot_comparison(folder: Path, rows: list[dict[str, Any]], device: str) -> list[Path]:
    """Draw test accuracy and peak memory against the effective batch, a line for each norm and micro-batch.

    Best validation loss and accuracy follow where images are held out. Vertical bars are standard deviations over seeds.

    Returns: the files.
    """
    held_out = any(row["best_validation_loss_mean"] is not None for row in rows)
    whole = all(row["micro_batch_size"] == row["effective_batch_size"] for row in rows)
    x = Axis(f"effective batch{' = micro-batch' if whole else ''}, images", log=2)
    paths = []
    for stem, key, spread, scale, label in _FIGURES[: None if held_out else 2]:
        series = [_line(name, points, key, spread, scale) for name, points in _by_line(rows, whole).items()]
        title = label.partition(",")[0]
        drawing = line_chart(title, series, x, Axis(label, from_zero=key == "peak_bytes"))
        paths.append(folder / f"{stem}.svg")
        write_atomically(paths[-1], sheet(f"{title} ({device})", [("", drawing)]))
    return paths


def _line(name: str, rows: list[dict[str, Any]], key: str, spread: str | None, scale: float) -> Series:
    """A figure of the rows, with its spread where there are several seeds."""
    rows = [row for row in rows if row[key] is not None]
    points = [(row["effective_batch_size"], scale * row[key]) for row in rows]
    spreads = [row[spread] for row in rows] if spread else []
    if all(value is None for value in spreads):
        return Series(name, points)
    around = [scale * (value or 0.0) for value in spreads]
    return Series(name, points, [(y - d, y + d) for (_, y), d in zip(points, around, strict=True)])


def _by_line(rows: list[dict[str, Any]], whole: bool) -> dict[str, list[dict[str, Any]]]:
    """Rows by the name of their line: the norm, and its micro-batch unless every one is `whole`."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        full = row["micro_batch_size"] == row["effective_batch_size"]
        micro = "" if whole else f", micro-batch {'full' if full else row['micro_batch_size']}"
        lines.setdefault(row["norm"] + micro, []).append(row)
    return lines


def plot_memory(folder: Path, document: dict[str, Any]) -> Path:
    """Draw the peak of each cell of a memory sweep, split by what it is for; returns memory.svg.

    Each micro-batch has a panel with its own scale: a bar for one image would vanish beside one for 64.
    """
    panels: dict[int, list[dict[str, Any]]] = {}
    for row in document["rows"]:
        panels.setdefault(row["micro_batch_size"], []).append(row)
    floor = None if document["floor"] is None else document["floor"]["floor_bytes"]
    environment = document["environment"]
    title = (
        f"Peak memory of training {document['model']}, {document['precision']}, {document['method']}; "
        f"{environment['device']}, torch {environment['torch']}, {document['date']}"
    )
    drawings = [(f"micro-batch {micro}", cell_bars(title, rows, floor)) for micro, rows in panels.items()]
    path = folder / "memory.svg"
    write_atomically(path, sheet(title, drawings))
    return path


def plot_timelines(path: Path, timelines: Sequence[tuple[str, TimelineRecord]], about: str) -> None:
    """Draw a panel for each named timeline: live tensors, stacked by what they are for, under the names of phases.

    Raises:
        RunFolderError: `path` cannot be written.
    """
    figures = [timeline_figure(name, timeline) for name, timeline in timelines]
    write_atomically(path, sheet(about, [(figure.title, figure.drawing) for figure in figures]))
