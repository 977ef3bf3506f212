"""Plots of a comparison. matplotlib is imported when one is drawn; no torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_MARKERS = "osD^vPX*<>"


def plot_comparison(folder: Path, rows: list[dict[str, Any]], device: str) -> list[Path]:
    """Draw accuracy and peak memory against the effective batch, one line per norm and micro-batch; returns the files."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    accuracy, memory = folder / "accuracy.png", folder / "peak_memory.png"
    for path, key, spread, scale, label in (
        (accuracy, "test_accuracy_mean", "test_accuracy_std", 100.0, "test accuracy, %"),
        (memory, "peak_bytes", None, 1 / 2**20, "peak memory of training, MiB"),
    ):
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        for n, (name, points) in enumerate(_series(rows).items()):
            points = [p for p in points if p[key] is not None]
            x = [p["effective_batch_size"] for p in points]
            y = [scale * p[key] for p in points]
            error = [scale * (p[spread] or 0.0) for p in points] if spread else None
            # Marker and dash tell the lines apart without colour.
            axes.errorbar(
                x, y, yerr=error, label=name, marker=_MARKERS[n % len(_MARKERS)], ls=("-", "--", ":")[n % 3], capsize=3
            )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        if key == "peak_bytes":
            axes.set_ylim(bottom=0)
        axes.set_xlabel("effective batch, images")
        axes.set_ylabel(label)
        axes.set_title(f"{label.split(',')[0]} ({device})", fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path, dpi=120)
        plt.close(figure)
    return [accuracy, memory]


def _series(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    series: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        full = row["micro_batch_size"] == row["effective_batch_size"]
        series.setdefault(f"{row['norm']}, micro-batch {'full' if full else row['micro_batch_size']}", []).append(row)
    return series
