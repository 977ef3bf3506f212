"""Plots of a synthetic experiment. matplotlib is imported when one is drawn; no torch here."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bln_train.system.atomic import write_atomically

_PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("running averages", ("batchnorm", "natural")),
    ("sgd", ("sgd",)),
    ("adam", ("adam",)),
)
_ERRORS = (
    ("mean_error", "error of the mean, standard deviations", 100.0),
    ("std_error", "error of the standard deviation, |log ratio|", 10.0),
)  # key, label, largest shown: what diverges leaves the panel
_LOOKS = {  # colour and marker
    "exact": ("black", ""),
    "batchnorm": ("tab:gray", "x"),
    "natural": ("tab:red", "*"),
    "log": ("tab:blue", "o"),
    "abs": ("tab:orange", "s"),
    "inv": ("tab:green", "^"),
    "var": ("tab:purple", "D"),
}
_DASHES = ("-", "--", ":", "-.")


def plot_errors(folder: Path, rows: Sequence[dict[str, Any]], jumps: dict[str, int], device: str) -> Iterator[Path]:
    """Draw median errors against samples seen (after a jump, since then), a file for each stream and batch size.

    Above the error of the mean, below that of the standard deviation; a column for each kind of estimator. Colour and marker
    tell the parametrisation, the dash the rate. Around the lines of the largest rate, quartiles over the repetitions.

    Args:
        rows: those of `synthetic.measure`, with a `label` each.
        jumps: samples before the jump, of the streams that have one.

    Yields: each file once it is written.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        if row["num_samples"] > jumps.get(row["stream"], 0):
            groups.setdefault((row["stream"], row["batch_size"]), []).append(row)
    for (stream, batch_size), members in groups.items():
        panels = [panel for panel in _PANELS if any(row["estimator"] in panel[1] for row in members)] or [("", ())]
        figure, all_axes = plt.subplots(
            2, len(panels), figsize=(1 + 4 * len(panels), 8), sharex=True, sharey="row", squeeze=False
        )
        # Not constrained_layout: it would take most of the time.
        figure.subplots_adjust(left=0.25 / len(panels), right=0.98, top=0.92, bottom=0.2, wspace=0.05, hspace=0.07)
        for column, (title, names) in enumerate(panels):
            shown = [row for row in members if row["estimator"] in ("exact", *names)]
            for axes, (key, label, _) in zip(all_axes[:, column], _ERRORS, strict=True):
                _draw(axes, shown, key, begin=jumps.get(stream, 0))
                if column == 0:
                    axes.set_ylabel(label)
            all_axes[0, column].set_title(title, fontsize=10)
            all_axes[1, column].set_xlabel("samples since the jump" if stream in jumps else "samples seen")
            all_axes[1, column].legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.18))
        for axes, (key, _, top) in zip(all_axes[:, 0], _ERRORS, strict=True):  # the row shares its scale
            medians = [m for row in members if math.isfinite(m := row[f"{key}_median"]) and m > 0]
            axes.set_ylim(min(medians, default=1e-3) / 1.5, min(top, 1.5 * max(medians, default=top)))
        figure.suptitle(f"{stream}, batches of {batch_size}: median errors, quartiles shaded ({device})", fontsize=10)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=100)
        plt.close(figure)
        path = folder / f"{file_name(stream)}_batch{batch_size}.png"
        write_atomically(path, picture.getvalue())
        yield path


def file_name(stream: str) -> str:
    """A stream's label as part of a file name: letters, digits, `-`, and `_` for the rest."""
    return "".join(c if c.isascii() and (c.isalnum() or c == "-") else "_" for c in stream)


def _draw(axes: Any, rows: Sequence[dict[str, Any]], key: str, begin: int) -> None:
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault(row["label"], []).append(row)
    rates = sorted({row["rate"] for row in rows if row["rate"] is not None}, reverse=True)
    for n, (label, points) in enumerate(lines.items()):
        first = points[0]
        gradient = first["estimator"] in ("sgd", "adam")
        color, marker = _LOOKS[first["parametrization"] if gradient else first["estimator"]]
        rate = 0 if first["rate"] is None else rates.index(first["rate"])
        shown = [p for p in points if math.isfinite(p[f"{key}_median"]) and p[f"{key}_median"] > 0]
        x = [p["num_samples"] - begin for p in shown]
        axes.plot(
            x,
            [p[f"{key}_median"] for p in shown],
            color=color,
            ls=_DASHES[rate % len(_DASHES)],
            marker=marker,
            ms=4,
            lw=1.2,
            # Markers of lines on top of each other fall on different points.
            markevery=(n % 4, 4),
            label=f"{label} (not finite)" if any(p["num_diverged"] for p in points) else label,
        )
        if rate == 0:
            spread = [[p[f"{key}_{end}"] for p in shown] for end in ("q25", "q75")]
            axes.fill_between(x, *spread, color=color, alpha=0.12, lw=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
