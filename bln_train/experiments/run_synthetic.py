"""Run a synthetic experiment into a run folder: nothing is written before everything is computed."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Sequence
from datetime import date
from typing import Any

from bln_train.experiments.synthetic import measure
from bln_train.recipe.synthetic import JumpStream, SyntheticRecipe, cells_of, label_of
from bln_train.report.error_plots import plot_errors
from bln_train.runs.folder import RunFolder
from bln_train.system import machine
from bln_train.system.atomic import write_atomically

ERRORS, RECOVERIES = "errors.csv", "recoveries.csv"


def run_synthetic(
    recipe: SyntheticRecipe,
    folder: RunFolder,
    *,
    name: str,
    progress: Callable[[float, str], None] = lambda share, what: None,
) -> dict[str, Any]:
    """Run `recipe` and return the summary that the folder keeps.

    Errors are in standard deviations of the stream (mean) and the absolute logarithm of a ratio (standard deviation).

    Args:
        progress: is called with the share of the work that is done, from 0 to 1, and what is being done.

    Raises:
        RunFolderError: the folder holds something else, or cannot be written.
        UsageError: the device does not exist.
    """
    folder.check_usable(recipe, resume=False)
    device = machine.resolve_device(recipe.runtime.device)
    machine.set_up(
        device,
        num_threads=recipe.runtime.num_threads,
        deterministic=False,
        cudnn_benchmark=False,
        tf32=False,
    )
    began = time.monotonic()
    batches_of = {size: recipe.num_samples // size for size in recipe.batch_sizes}
    num_batches, sizes = sum(batches_of.values()), list(batches_of)

    def tell(size: int, num_seen: int) -> None:
        done = sum(batches_of[other] for other in sizes[: sizes.index(size)]) + num_seen // size
        progress(done / num_batches, f"batches of {size}")

    errors, recoveries = measure(recipe, device, tell)
    seconds = time.monotonic() - began
    environment = machine.environment(device)
    folder.create(recipe, environment)
    write_atomically(folder.path / ERRORS, _csv(errors))
    if recoveries:
        write_atomically(folder.path / RECOVERIES, _csv(recoveries))
    jumps = {stream.title: stream.at for stream in recipe.streams if isinstance(stream, JumpStream)}
    plots = []
    for path in plot_errors(folder.path, errors, jumps, str(environment["device"])):
        plots.append(path.name)
        progress(1.0, f"drawing {path.name}")
    reported = [row for row in errors if row["num_samples"] in recipe.report_after]
    summary = {
        "name": name,
        "experiment": recipe.experiment,
        "seed": recipe.seed,
        "num_samples": recipe.num_samples,
        "num_repetitions": recipe.num_repetitions,
        "recovered_below": recipe.recovered_below,
        "estimators": [label_of(*cell) for estimator in recipe.estimators for cell in cells_of(estimator)],
        "errors": reported,
        "recoveries": recoveries,
        "plots": plots,
        "seconds": seconds,
        "date": date.today().isoformat(),
        "environment": environment,
    }
    folder.finish(summary)
    return summary


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
