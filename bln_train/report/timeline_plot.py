"""Live bytes through one step as a picture. matplotlib is imported when one is drawn; no torch here."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from bln_train.records import TimelineRecord
from bln_train.report.memory_section import PARTS, widened
from bln_train.system.atomic import write_atomically

_HATCHES = ("", "//", "xx", "..", "\\\\")


def plot_timelines(path: Path, timelines: Sequence[tuple[str, TimelineRecord]], about: str) -> None:
    """Draw a panel for each named timeline: live tensors in MiB, stacked by what they are for, phases named on top.

    Raises:
        RunFolderError: `path` cannot be written.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, all_axes = plt.subplots(
        len(timelines), figsize=(9, 1.2 + 2.9 * len(timelines)), layout="constrained", squeeze=False
    )
    for axes, (name, timeline) in zip(all_axes[:, 0], timelines, strict=True):
        _draw(axes, name, timeline)
    all_axes[-1, 0].set_xlabel("operators of one optimizer step, in order (phases not to scale)")
    handles, labels = all_axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
    figure.suptitle(about, fontsize=10)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    plt.close(figure)
    write_atomically(path, picture.getvalue())


def _draw(axes: Any, name: str, timeline: TimelineRecord) -> None:
    kinds = ("parameter", "gradient", "optimizer", "activation", "other")
    phases, layers = widened(timeline, [getattr(timeline, f"{kind}_bytes") for kind in kinds])
    below = [0.0] * len(layers[0])
    for part, hatch, values in zip(PARTS, _HATCHES, layers, strict=True):
        above = [a + value / 2**20 for a, value in zip(below, values, strict=True)]
        axes.fill_between(
            range(len(above) + 1),
            [*below, below[-1]],
            [*above, above[-1]],
            step="post",
            label=part,
            hatch=hatch,
            ec="white",
            lw=0,
        )
        below = above
    axes.axhline(max(below), color="black", ls="--", lw=1, label="peak")
    starts = accumulate((number for _, number in phases), initial=0)
    for n, ((phase, number), start) in enumerate(zip(phases, starts, strict=False)):
        axes.axvline(start, color="black", lw=0.5)
        place = (start + number / 2, 0.98 - 0.08 * (n % 2))
        axes.annotate(phase, place, xycoords=("data", "axes fraction"), ha="center", va="top", fontsize=8)
    axes.set_xlim(0, len(below))
    axes.set_ylim(0, 1.3 * max(below))
    axes.set_xticks([])
    axes.set_ylabel("live tensors, MiB", fontsize=8)
    axes.set_title(f"{name}: peak {max(below):.4g} MiB, micro-steps {timeline.num_micro_steps}", fontsize=9, loc="left")
