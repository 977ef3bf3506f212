"""A grid of runs side by side: each cell a run folder of its own, made by a process of its own. No torch here.

With its own process each cell has its own peak memory and its own failures. An interrupted comparison resumes as each
of its runs does.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from bln_train.errors import BlnError, InterruptedRunError, RecipeError, RunFolderError, UsageError
from bln_train.recipe.load import dump_recipe, parse_recipe
from bln_train.recipe.norms import NORM_NAMES
from bln_train.recipe.recipe import Recipe
from bln_train.records import EpochRecord, Record, StepRecord
from bln_train.runs.folder import BASE_RECIPE, CELLS, FAILED, RunFolder, json_text
from bln_train.system.atomic import write_atomically
from bln_train.system.signals import stop_requests, write_now

MicroBatch = int | Literal["full"]
CellListener = Callable[[float, Record], None]  # how far the cell is, from 0 to 1, and what it recorded
_STOPPING = "stopping; the run under way saves its state. Ctrl-C again leaves at once"


@dataclass(frozen=True)
class Cell:
    """One run of a comparison."""

    norm: str
    effective_batch_size: int
    micro_batch_size: int
    seed: int
    folder: RunFolder
    recipe: Recipe | None
    problem: str = ""
    """Why there is no recipe: the combination cannot be."""


def plan_cells(
    recipe: Recipe,
    folder: Path,
    *,
    norms: Sequence[str],
    effective_batches: Sequence[int] = (),
    micro_batches: Sequence[MicroBatch] = (),
    num_seeds: int = 1,
) -> list[Cell]:
    """The cells of a grid, seeds innermost, in the order of the arguments.

    Args:
        effective_batches: default the recipe's.
        micro_batches: sizes, or "full" for the effective batch; default the recipe's, and "full" beside it where that
            is larger, so that a norm that depends on the split shows it; "full" alone where the recipe trains whole batches.

    Raises:
        UsageError: an unknown norm, or an empty grid.
    """
    for norm in norms:
        if norm not in NORM_NAMES:
            raise UsageError(f"unknown norm '{norm}'", f"Norms: {', '.join(NORM_NAMES)}.")
    if num_seeds < 1 or not norms:
        raise UsageError("name at least one norm and one seed")
    train = recipe.train
    effective_batches = effective_batches or (train.effective_batch_size,)
    stated = train.micro_batch_size
    if stated == "auto" and not micro_batches:
        raise UsageError(
            "train.micro_batch_size is auto, and a comparison puts stated sizes side by side",
            "Add --micro-batch 1,full",
        )
    if not micro_batches:
        whole = stated == train.effective_batch_size
        micro_batches = ("full",) if whole else (recipe.first_micro_batch_size, "full")
    seeds = range(train.seed, train.seed + num_seeds)
    cells: dict[Path, Cell] = {}
    for norm, effective, micro, seed in itertools.product(norms, effective_batches, micro_batches, seeds):
        size = effective if micro == "full" else micro
        if size > effective and len(effective_batches) > 1:
            continue  # in a grid over effective batches the larger micro-batches belong to the larger ones
        path = folder / CELLS / f"{norm}-effective{effective}-micro{size}-seed{seed}"
        cells.setdefault(path, _cell(recipe, norm, effective, size, seed, RunFolder(path)))
    if not cells:
        raise UsageError(
            f"every micro-batch ({', '.join(map(str, micro_batches))}) is above every effective batch "
            f"({', '.join(map(str, effective_batches))})",
            "Name smaller ones with --micro-batch, or `full`.",
        )
    return list(cells.values())


def _cell(recipe: Recipe, norm: str, effective: int, micro: int, seed: int, folder: RunFolder) -> Cell:
    try:
        data = recipe.with_norm(norm).model_dump()
        data["train"] |= {"effective_batch_size": effective, "micro_batch_size": micro, "seed": seed}
        return Cell(norm, effective, micro, seed, folder, Recipe.model_validate(data))
    except BlnError as error:
        return Cell(norm, effective, micro, seed, folder, None, error.problem)
    except ValidationError as error:  # a combination that the recipe's rules refuse
        problem = "; ".join(e["msg"].removeprefix("Value error, ") for e in error.errors())
        return Cell(norm, effective, micro, seed, folder, None, problem)


def open_comparison(folder: Path, recipe: Recipe) -> None:
    """Begin a comparison in `folder`, or go on with the one of the same recipe there; another grid of it may follow.

    Raises:
        RunFolderError: the folder holds something else or cannot be written.
    """
    base = folder / BASE_RECIPE
    if base.exists():
        try:
            old = parse_recipe(base.read_text(encoding="utf-8"), origin=str(base))
        except RecipeError as error:
            raise RunFolderError(f"{base} cannot be read: {error.problem}", "Choose another --out.") from error
        if old != recipe:  # in any setting: finished cells are not run again, and the table mixes no two
            raise RunFolderError(
                f"{folder} holds a comparison of another recipe, or of other --set or --device",
                "Choose another --out. Nothing was changed.",
            )
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunFolderError(f"{folder} exists and holds no comparison", "Choose another --out. Nothing was changed.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"cannot create {folder}: {error.strerror}", "Choose another --out.") from error
    write_atomically(base, dump_recipe(recipe))


def run_cells(
    cells: Sequence[Cell],
    show: Callable[[int, str], CellListener],
    say_stopping: Callable[[str], None] = write_now,
) -> None:
    """Run what is not finished of a comparison, one cell after the other.

    Args:
        show: called with a cell's position and name, gives what to call with its progress (0 to 1) and each record.
        say_stopping: is told of a stop that is under way, while its signal is handled: it may not print.

    Raises:
        InterruptedRunError: Ctrl-C or SIGTERM; the state of the cell under way is saved.
    """
    with stop_requests(
        lambda: say_stopping(_STOPPING)
    ) as stop_asked:  # noted, not acted on: a cell being started must not lose its parent
        for n, cell in enumerate(cells):
            _run_cell(cell, show(n, cell.folder.path.name), stop_asked)
            if stop_asked():
                raise InterruptedRunError(
                    f"stopped at {cell.folder.path.name}; its state is saved", "Go on with the same command."
                )


def _run_cell(cell: Cell, listen: CellListener, stop_asked: Callable[[], bool]) -> None:
    """Run a cell to its end in a process of its own, or leave beside its folder why it could not.

    Does nothing for a cell that is finished. What failed before is tried again.
    """
    failure = cell.folder.path.with_suffix(FAILED)
    if cell.folder.summary() is not None:
        return
    cell.folder.path.parent.mkdir(parents=True, exist_ok=True)
    if cell.recipe is None:
        write_atomically(failure, cell.problem)
        return
    recipe_file = cell.folder.path.with_suffix(".yaml")
    write_atomically(recipe_file, dump_recipe(cell.recipe))
    log = cell.folder.path.with_suffix(".log")
    command = [sys.executable, "-m", "bln_train", "run", str(recipe_file), "--out", str(cell.folder.path), "--json"]
    if cell.folder.holds_run:
        command.append("--resume")
    with open(log, "w", encoding="utf-8") as file:
        # A session of its own, so that Ctrl-C reaches the child once, from us.
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=file, start_new_session=os.name == "posix"
        )
        try:
            _follow(process, cell, listen, stop_asked)
        finally:
            if process.poll() is None:  # a failure of ours
                process.kill()
                process.wait()
    if process.returncode == 0:
        failure.unlink(missing_ok=True)
    elif not stop_asked():
        write_atomically(failure, _reason(log.read_text(encoding="utf-8", errors="replace"), process.returncode))


def _follow(process: subprocess.Popen[bytes], cell: Cell, listen: CellListener, stop_asked: Callable[[], bool]) -> None:
    """Wait for a cell, passing on the records it writes; asked to stop, let it save its state and end."""
    seen = sum(1 for _ in cell.folder.records())
    told = False
    while True:
        running = process.poll() is None
        records = list(cell.folder.records())
        for record in records[seen:]:
            listen(_fraction_done(cell, record), record)
        seen = max(seen, len(records))
        if not running:
            return
        if stop_asked() and not told:
            told = True
            process.send_signal(signal.SIGINT if os.name == "posix" else signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.5)


def _reason(log: str, code: int) -> str:
    """The error a run printed last, in one line."""
    lines = [line for line in log.splitlines() if line.strip()]
    errors = [n for n, line in enumerate(lines) if line.startswith("error: ")]
    if errors:
        return " ".join(line.removeprefix("error: ").strip() for line in lines[errors[-1] : errors[-1] + 2])
    return f"ended with code {code}" + (f": {lines[-1]}" if lines else "")


def rows(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """One row per (norm, effective, micro), over its seeds: means, sample standard deviations, what failed and why."""
    table = []
    for (norm, effective, micro), group in itertools.groupby(
        cells, key=lambda c: (c.norm, c.effective_batch_size, c.micro_batch_size)
    ):
        members = list(group)
        summaries = [s for cell in members if (s := cell.folder.summary()) is not None]
        accuracies = [s["test_accuracy"] for s in summaries if s["test_accuracy"] is not None]
        test_losses = [s["test_loss"] for s in summaries if s["test_loss"] is not None]
        train_losses = [s["train_loss"] for s in summaries if s["train_loss"] is not None]
        peaks = [s["memory"]["peak_bytes"] for s in summaries if s["memory"]["peak_bytes"] is not None]
        speeds = [s["images_per_second"] for s in summaries if s["images_per_second"] is not None]
        failures = [
            f"seed {cell.seed}: {path.read_text(encoding='utf-8')}"
            for cell in members
            if (path := cell.folder.path.with_suffix(FAILED)).exists() and cell.folder.summary() is None
        ]
        table.append(
            {
                "norm": norm,
                "effective_batch_size": effective,
                "micro_batch_size": micro,
                "num_seeds": len(members),
                "num_finished": len(summaries),
                "peak_bytes": max(peaks, default=None),
                "images_per_second": statistics.median(speeds) if speeds else None,
                "train_loss_mean": _mean(train_losses),
                "test_loss_mean": _mean(test_losses),
                "test_accuracy_mean": _mean(accuracies),
                "test_accuracy_std": _spread(accuracies),
                "test_accuracies": accuracies,
                **_best_validation(summaries, "loss"),
                **_best_validation(summaries, "accuracy"),
                "failures": failures,
            }
        )
    return table


def _mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _spread(values: list[float]) -> float | None:
    """Sample standard deviation; None where there is only one value."""
    return statistics.stdev(values) if len(values) > 1 else None


def _best_validation(summaries: Sequence[dict[str, Any]], what: str) -> dict[str, Any]:
    """Each run's best epoch on the validation images, and their mean and spread; None and [] where nothing is held out."""
    key = f"best_validation_{what}"
    found = [s for s in summaries if s[key] is not None]
    values = [s[key] for s in found]
    return {
        f"{key}_mean": _mean(values),
        f"{key}_std": _spread(values),
        f"{key}_by_run": values,
        f"{key}_epoch_by_run": [s[f"{key}_epoch"] for s in found],
    }


def write_tables(folder: Path, table: list[dict[str, Any]], environment: dict[str, Any]) -> None:
    """Write comparison.json and comparison.csv."""
    write_atomically(folder / "comparison.json", json_text({"environment": environment, "rows": table}, indent=2))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=[key for key, value in table[0].items() if not isinstance(value, list)])
    writer.writeheader()
    for row in table:
        writer.writerow({key: row[key] for key in writer.fieldnames})
    write_atomically(folder / "comparison.csv", text.getvalue())


def environment_of(cells: Sequence[Cell]) -> dict[str, Any]:
    """Device and versions of the first finished cell; every cell of one call runs on the same machine."""
    found = (s["environment"] for cell in cells if (s := cell.folder.summary()) is not None)
    return dict(next(found, {}))


def _fraction_done(cell: Cell, record: Record) -> float:
    """How far a record is through its cell, from 0 to 1."""
    assert cell.recipe is not None
    epochs = cell.recipe.train.epochs
    if isinstance(record, StepRecord | EpochRecord):
        return min(1.0, record.epoch / epochs)
    return 0.0
