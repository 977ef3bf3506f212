"""Drawings of a synthetic experiment's errors, as SVG files. No torch here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bln_train.report.charts import Series, line_chart
from bln_train.report.sheet import sheet
from bln_train.report.svg import Axis, Drawing
from bln_train.system.atomic import write_atomically

_PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("running averages", ("batchnorm", "natural")),
    ("sgd", ("sgd",)),
    ("adam", ("adam",)),
)
_ERRORS = (
    ("mean_error", "error of the mean, in std", 100.0),
    ("std_error", "error of the std, |log ratio|", 10.0),
)  # key, label, largest value shown: a diverging line leaves the panel
_LOOKS = {"exact": 6, "batchnorm": 1, "natural": 5, "log": 0, "abs": 1, "inv": 2, "var": 3}  # colour and marker


def plot_errors(folder: Path, rows: Sequence[dict[str, Any]], jumps: dict[str, int], device: str) -> Iterator[Path]:
    """Draw median errors against samples seen, or samples since a jump, in a file for each stream and batch size.

    Above is the error of the mean, below that of the standard deviation, with a column for each kind of estimator. Colour and
    marker tell the parametrisation, the dash tells the rate. Lines of the largest rate have their quartiles over the repetitions.

    Args:
        rows: those of `synthetic.measure`, with a `label` each.
        jumps: samples before the jump, of the streams that have one.

    Yields: each file once it is written.
    """
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        if row["num_samples"] > jumps.get(row["stream"], 0):
            groups.setdefault((row["stream"], row["batch_size"]), []).append(row)
    for (stream, batch_size), members in groups.items():
        title = f"{stream}, batches of {batch_size}: median errors, quartiles shaded ({device})"
        kinds = [panel for panel in _PANELS if any(row["estimator"] in panel[1] for row in members)] or [("", ())]
        panels = []
        for key, label, top in _ERRORS:
            y = Axis(label, log=10, limits=_limits(members, key, top))  # a row of panels shares its scale
            x = Axis("samples since the jump" if stream in jumps else "samples seen", log=2)
            for heading, names in kinds:
                shown = [row for row in members if row["estimator"] in ("exact", *names)]
                panels.append((heading, _panel(title, shown, key, jumps.get(stream, 0), x, y)))
        path = folder / f"{file_name(stream)}_batch{batch_size}.svg"
        write_atomically(path, sheet(title, panels, columns=len(kinds)))
        yield path


def file_name(stream: str) -> str:
    """A stream's label as part of a file name: letters, digits, `-`, and `_` for the rest."""
    return "".join(c if c.isascii() and (c.isalnum() or c == "-") else "_" for c in stream)


def _limits(rows: Sequence[dict[str, Any]], key: str, top: float) -> tuple[float, float]:
    medians = [m for row in rows if math.isfinite(m := row[f"{key}_median"]) and m > 0]
    return min(medians, default=1e-3) / 1.5, min(top, 1.5 * max(medians, default=top))


def _panel(title: str, rows: Sequence[dict[str, Any]], key: str, begin: int, x: Axis, y: Axis) -> Drawing:
    """The lines of one kind of estimator; the lower panel of a column has the legend of both."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault(row["label"], []).append(row)
    rates = sorted({row["rate"] for row in rows if row["rate"] is not None}, reverse=True)
    series = [_line(label, points, key, begin, rates) for label, points in lines.items()]
    return line_chart(title, series, x, y, legend=key == _ERRORS[-1][0])


def _line(label: str, rows: Sequence[dict[str, Any]], key: str, begin: int, rates: Sequence[float]) -> Series:
    first = rows[0]
    gradient = first["estimator"] in ("sgd", "adam")
    rate = 0 if first["rate"] is None else rates.index(first["rate"])
    shown = [row for row in rows if math.isfinite(row[f"{key}_median"]) and row[f"{key}_median"] > 0]
    return Series(
        f"{label} (not finite)" if any(row["num_diverged"] for row in rows) else label,
        [(row["num_samples"] - begin, row[f"{key}_median"]) for row in shown],
        [(row[f"{key}_q25"], row[f"{key}_q75"]) for row in shown] if rate == 0 else (),
        shaded=True,
        look=(_LOOKS[first["parametrization"] if gradient else first["estimator"]], rate),
    )
