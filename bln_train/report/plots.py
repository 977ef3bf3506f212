"""Plots of a comparison and of a memory sweep. matplotlib is imported when one is drawn; no torch here."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from bln_train.system.atomic import write_atomically

_MARKERS = "osD^vPX*<>"
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
    """Draw test accuracy, peak memory and, where images are held out, the best validation loss and accuracy against the
    effective batch, one line per norm and micro-batch; returns the files."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    held_out = any(row["best_validation_loss_mean"] is not None for row in rows)
    whole = all(row["micro_batch_size"] == row["effective_batch_size"] for row in rows)
    paths = []
    for stem, key, spread, scale, label in _FIGURES[: None if held_out else 2]:
        figure, axes = plt.subplots(figsize=(7, 4.8), layout="constrained")
        for n, (name, points) in enumerate(_series(rows, whole).items()):
            points = [p for p in points if p[key] is not None]
            x = [p["effective_batch_size"] for p in points]
            y = [scale * p[key] for p in points]
            spreads = [p[spread] for p in points] if spread else []
            error = [scale * (s or 0.0) for s in spreads] if any(s is not None for s in spreads) else None
            # Marker and dash tell the lines apart without colour.
            axes.errorbar(
                x, y, yerr=error, label=name, marker=_MARKERS[n % len(_MARKERS)], ls=("-", "--", ":")[n % 3], capsize=3
            )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        if key == "peak_bytes":
            axes.set_ylim(bottom=0)
        axes.set_xlabel(f"effective batch{' = micro-batch' if whole else ''}, images")
        axes.set_ylabel(label)
        axes.set_title(f"{label.split(',')[0]} ({device})", fontsize=10)
        axes.grid(alpha=0.3)
        figure.legend(loc="outside lower center", ncols=3, fontsize=9)  # inside it would hide points
        paths.append(folder / f"{stem}.png")
        figure.savefig(paths[-1], dpi=120)
        plt.close(figure)
    return paths


def _series(rows: list[dict[str, Any]], whole: bool) -> dict[str, list[dict[str, Any]]]:
    """Rows by the name of their line: the norm, and its micro-batch unless every one is `whole`."""
    series: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        full = row["micro_batch_size"] == row["effective_batch_size"]
        micro = "" if whole else f", micro-batch {'full' if full else row['micro_batch_size']}"
        series.setdefault(row["norm"] + micro, []).append(row)
    return series


_PARTS = (
    ("parameters", "parameter_bytes", ""),
    ("gradients", "gradient_bytes", "//"),
    ("optimizer", "optimizer_bytes", "xx"),
    ("activations", "activation_bytes", ".."),
    ("other", "other_bytes", "\\\\"),
)


def plot_memory(folder: Path, document: dict[str, Any]) -> Path:
    """Draw the peak of each cell of a memory sweep, split by what it is for, in MiB; returns memory.png.

    A panel for each micro-batch, with its own scale: a bar for one image would vanish beside one for 64.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = document["rows"]
    panels: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        panels.setdefault(row["micro_batch_size"], []).append(row)
    figure, all_axes = plt.subplots(
        len(panels),
        figsize=(8, 1.6 + 0.9 * len(panels) + 0.24 * len(rows)),
        height_ratios=[1.5 + len(members) for members in panels.values()],
        layout="constrained",
        squeeze=False,
    )
    for axes, (micro, members) in zip(all_axes[:, 0], panels.items(), strict=True):
        left = [0.0] * len(members)
        for part, key, hatch in _PARTS:
            widths = [(row[key] or 0) / 2**20 for row in members]
            axes.barh(range(len(members)), widths, left=left, label=part, hatch=hatch, edgecolor="black", linewidth=0.5)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for n, row in enumerate(members):
            text = "- (not measured)" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.4g}"
            axes.annotate(text, (left[n], n), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
        if document["floor"] is not None:
            axes.axvline(document["floor"]["floor_bytes"] / 2**20, color="black", ls="--", lw=1, label="floor")
        axes.set_yticks(
            range(len(members)), [f"{row['norm']}, {row['effective_batch_size']}" for row in members], fontsize=8
        )
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlim(left=0)
        axes.set_title(f"micro-batch {micro}", fontsize=9, loc="left")
        axes.set_ylabel("norm, effective batch", fontsize=8)
    all_axes[-1, 0].set_xlabel("peak memory of training, MiB (scales differ)")
    handles, labels = all_axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
    environment = document["environment"]
    figure.suptitle(
        f"Peak memory of training {document['model']}, {document['precision']}, {document['method']}\n"
        f"{environment['device']}, torch {environment['torch']}, {document['date']}",
        fontsize=10,
    )
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    plt.close(figure)
    path = folder / "memory.png"
    write_atomically(path, picture.getvalue())
    return path
