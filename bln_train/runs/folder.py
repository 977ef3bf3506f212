"""A run folder: what a run leaves on disk, and how to read it back. No torch here.

recipe.yaml       the resolved recipe: every default, and the number that each `auto` stood for
environment.json  versions, device, threads
metrics.jsonl     one record per line (records.py), each with its `kind`
checkpoint.pt     the latest state (checkpoint.py); those before it: checkpoint_files.py
events.out.tfevents.*   the metrics for TensorBoard, where the recipe has logging.tensorboard (tensorboard.py)
summary.json      the end result; there only when the run finished
run.lock          there while a process trains here (system/lock.py)

A synthetic experiment leaves errors.csv, recoveries.csv and drawings in the place of metrics and checkpoint.
"""

from __future__ import annotations

import glob
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bln_train.errors import RunFolderError
from bln_train.recipe.load import dump_recipe, load_any_recipe, load_recipe
from bln_train.recipe.recipe import Recipe
from bln_train.recipe.resolve import as_begun
from bln_train.recipe.synthetic import SyntheticRecipe
from bln_train.records import EpochRecord, MemoryRecord, Record, record_from_dict, record_to_dict
from bln_train.runs.checkpoint_files import CHECKPOINT
from bln_train.system.atomic import TEMPORARY, write_atomically
from bln_train.system.lock import LOCK

RECIPE, ENVIRONMENT, METRICS = "recipe.yaml", "environment.json", "metrics.jsonl"
SUMMARY = "summary.json"
EVENTS = "events.out.tfevents.*"
MEMORY_TABLE = "memory.json"
"""What a memory sweep leaves in a folder of its own."""
BASE_RECIPE = "comparison.yaml"
"""A comparison's recipe. It has another name than a run's, so that no folder passes for one of the other kind."""
CELLS, FAILED = "cells", ".failed"
"""Folder of a comparison's runs; suffix of a file beside a run that says why it failed."""


def json_text(data: Any, *, indent: int | None = None) -> str:
    """`data` as JSON, null for what is not finite: JSON has no NaN, and a diverged test loss must not end a run."""
    return json.dumps(_finite(data), indent=indent, allow_nan=False) + "\n"


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def same_trajectory(old: Recipe | SyntheticRecipe, new: Recipe | SyntheticRecipe) -> bool:
    """Whether `new` goes on with the run of `old`, apart from how it is sliced, logged and how long it may go on."""
    if isinstance(old, SyntheticRecipe) or isinstance(new, SyntheticRecipe):
        return type(old) is type(new) and old.model_dump(exclude={"runtime"}) == new.model_dump(exclude={"runtime"})

    def essence(recipe: Recipe) -> dict[str, Any]:
        data = recipe.model_dump(mode="json", exclude={"runtime", "logging"})
        free = ["memory_budget", "max_steps", "eval_batch_size", "eval_every_epochs", "on_nonfinite"]
        if recipe.norm.name != "batch":  # with BatchNorm the micro-batch changes the result
            free.append("micro_batch_size")
        data["train"] = {key: value for key, value in data["train"].items() if key not in free}
        data["norm"].pop("recompute", None)  # the same result
        if recipe.optimizer.clip_norm is None:  # without clipping the place of the sum changes no result
            data["optimizer"].pop("accumulate_into", None)
        return data

    return essence(old) == essence(as_begun(new, old))


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run folder, and its files."""

    path: Path

    @property
    def checkpoint(self) -> Path:
        """Where the state is saved."""
        return self.path / CHECKPOINT

    @property
    def holds_run(self) -> bool:
        """Whether a run was begun here."""
        return (self.path / RECIPE).exists()

    def recipe(self) -> Recipe:
        """The run's recipe; raises RecipeError if it was damaged."""
        return load_recipe(self.path / RECIPE)

    def check_usable(self, recipe: Recipe | SyntheticRecipe, *, resume: bool) -> None:
        """Refuse, before anything is computed or written, a folder that this run must not touch.

        Raises:
            RunFolderError: it holds another run, or anything foreign, or cannot be written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError(f"{self.path} is a file, not a folder", "Choose another --out.")
        if self.holds_run:
            if not same_trajectory(load_any_recipe(self.path / RECIPE), recipe):
                raise RunFolderError(
                    f"{self.path} holds a run of another recipe",
                    f"Compare it with `diff {self.path / RECIPE} ...`, or choose another --out. Nothing was changed.",
                )
            if not resume:
                go_on = "Choose" if isinstance(recipe, SyntheticRecipe) else "Go on with --resume, or choose"
                raise RunFolderError(
                    f"{self.path} already holds this run", f"{go_on} another --out. Nothing was changed."
                )
        elif self.path.is_dir() and any(p.name != LOCK and p.suffix != TEMPORARY for p in self.path.iterdir()):
            raise RunFolderError(
                f"{self.path} is not empty and holds no run", "Choose another --out. Nothing was changed."
            )
        elif resume:
            raise RunFolderError(f"{self.path} holds no run to resume", "Leave out --resume to begin one.")
        parent = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not os.access(parent, os.W_OK | os.X_OK):
            raise RunFolderError(f"{parent} cannot be written", "Choose another --out.")

    def create(self, recipe: Recipe | SyntheticRecipe, environment: dict[str, Any]) -> None:
        """Begin a run: folder, recipe, environment, no metrics; raises RunFolderError where that is impossible."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"cannot create {self.path}: {error.strerror}", "Choose another --out.") from error
        self.keep_recipe(recipe)  # first: a folder with a recipe alone is a run, which --resume begins anew
        write_atomically(self.path / ENVIRONMENT, json_text(environment, indent=2))
        for path in (self.path / METRICS, *self.event_files()):
            path.unlink(missing_ok=True)

    def event_files(self) -> list[Path]:
        """TensorBoard's files, one for each time that the run went on."""
        return sorted(self.path.glob(EVENTS))

    def keep_recipe(self, recipe: Recipe | SyntheticRecipe) -> None:
        """Write the recipe; a resumed run may be sliced differently, or go on for longer, than the one begun."""
        write_atomically(self.path / RECIPE, dump_recipe(recipe))

    def append(self, record: Record) -> None:
        """Add one record to the metrics."""
        line = json_text(record_to_dict(record))
        try:
            with open(self.path / METRICS, "a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise RunFolderError(
                f"cannot write {self.path / METRICS}: {error.strerror}",
                "Free some space, then go on with --resume; the last checkpoint is intact.",
            ) from error

    def sync(self) -> None:
        """Make the metrics survive a power cut; before a checkpoint is saved, or it might be of steps that they lack."""
        try:
            with open(self.path / METRICS, "ab") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise RunFolderError(f"cannot write {self.path / METRICS}: {error.strerror}") from error

    def records(self) -> Iterator[Record]:
        """The metrics so far, without lines that are torn or damaged (a run that was killed, a power cut)."""
        return (record for record in self._read_metrics() if record is not None)

    def _read_metrics(self) -> Iterator[Record | None]:
        """The records line by line, None for a line that holds none."""
        try:
            lines = (self.path / METRICS).read_bytes().split(b"\n")
        except OSError:
            return
        for line in lines[:-1] if lines[-1] == b"" else lines:
            try:
                yield record_from_dict(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                yield None

    def cut_back(self, step: int, *, epoch_is_open: bool) -> int:
        """Drop the metrics after a checkpoint, which the resumed run will write again.

        Args:
            step: of the checkpoint.
            epoch_is_open: whether the end of the epoch of that step is still to come.

        Returns: the number of damaged lines among the rest, which go too; a torn last line is not counted.
        """
        records, kept, num_damaged = list(self._read_metrics()), list[str](), 0
        for n, record in enumerate(records):
            at = getattr(record, "step", 0)
            if at > step or (epoch_is_open and isinstance(record, EpochRecord) and at == step):
                break
            if record is not None:
                kept.append(json_text(record_to_dict(record)))
            elif n < len(records) - 1:
                num_damaged += 1
        write_atomically(self.path / METRICS, "".join(kept))
        return num_damaged

    def last_memory(self) -> MemoryRecord | None:
        """The last peak that was measured, None before."""
        measured = [r for r in self.records() if isinstance(r, MemoryRecord) and r.peak_bytes is not None]
        return measured[-1] if measured else None

    def reopen(self) -> None:
        """Take back the end result: the run goes on."""
        (self.path / SUMMARY).unlink(missing_ok=True)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the end result."""
        write_atomically(self.path / SUMMARY, json_text(summary, indent=2))

    def summary(self) -> dict[str, Any] | None:
        """The end result, None while the run is not finished."""
        try:
            data = json.loads((self.path / SUMMARY).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return data if isinstance(data, dict) else None


def free_folder(base: Path) -> Path:
    """`base`, or `base-2`, `base-3`, ... : the first that does not exist."""
    candidates = (base if n == 1 else base.with_name(f"{base.name}-{n}") for n in range(1, 10_000))
    return next(path for path in candidates if not path.exists())


def latest_folder(base: Path) -> Path | None:
    """The last of `base`, `base-2`, ... that holds a run."""
    numbered = [base, *sorted(base.parent.glob(f"{glob.escape(base.name)}-*"), key=lambda p: (len(p.name), p.name))]
    runs = [p for p in numbered if RunFolder(p).holds_run and p.name[len(base.name) + 1 :].isdigit() | (p == base)]
    return runs[-1] if runs else None
