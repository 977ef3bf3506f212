"""Groups of runs that differ only in their seed: means, spreads and names. No torch here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from bln_train.records import EpochRecord
from bln_train.report.source import Run
from bln_train.system.units import parse_bytes


@dataclass(frozen=True)
class Mean:
    """A mean over runs with its sample standard deviation, None for one run."""

    value: float
    spread: float | None
    num_runs: int


def mean_of(values: Sequence[float | None]) -> Mean | None:
    """Mean of the values that there are and are finite, None where there are none."""
    found = [value for value in values if value is not None and math.isfinite(value)]
    if not found:
        return None
    return Mean(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None, len(found))


@dataclass(frozen=True)
class Group:
    """Runs of one recipe with one or more seeds, in the order they were named."""

    name: str
    runs: list[Run]

    @property
    def first(self) -> Run:
        """The run that stands for all where only one can be shown."""
        return self.runs[0]

    @property
    def norm(self) -> str:
        """Name of its norm."""
        return self.first.recipe.norm.name

    @cached_property
    def peak_bytes(self) -> int | None:
        """Largest peak of its runs."""
        return max(
            (r.memory.peak_bytes for r in self.runs if r.memory and r.memory.peak_bytes is not None), default=None
        )

    @property
    def budget_bytes(self) -> int | None:
        """`train.memory_budget`, None where none is stated."""
        stated = self.first.recipe.train.memory_budget
        return None if stated is None else parse_bytes(stated)

    @cached_property
    def accuracy(self) -> Mean | None:
        """Test accuracy after each run's last epoch; a run that was named twice, or made again, counts once."""
        of_seed = {run.recipe.train.seed: run.last.test_accuracy for run in reversed(self.runs) if run.last}
        return mean_of(list(of_seed.values()))

    @cached_property
    def images_per_second(self) -> Mean | None:
        """Over the runs, of each one's median epoch."""
        speeds = [[e.images_per_second for e in run.epochs if e.images_per_second] for run in self.runs]
        return mean_of([statistics.median(found) if found else None for found in speeds])

    def by_epoch(self, value: Callable[[EpochRecord], float | None]) -> list[tuple[float, float]]:
        """(epoch, mean over the runs that have it) of something that epochs record."""
        found: dict[int, list[float | None]] = {}
        for record in (record for run in self.runs for record in run.epochs):
            found.setdefault(record.epoch, []).append(value(record))
        means = ((epoch, mean_of(values)) for epoch, values in sorted(found.items()))
        return [(float(epoch), mean.value) for epoch, mean in means if mean is not None]


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Runs by recipe, seeds and runtime apart, each group named by what tells it from the others."""
    members: dict[str, list[Run]] = {}
    for run in runs:
        recipe = run.recipe.model_copy(update={"train": run.recipe.train.model_copy(update={"seed": 0})})
        members.setdefault(recipe.model_dump_json(exclude={"runtime"}), []).append(run)
    groups = list(members.values())
    short = [_name(group[0]) for group in groups]
    names = [
        name if short.count(name) == 1 else f"{name} ({group[0].path.name})"
        for name, group in zip(short, groups, strict=True)
    ]
    return [Group(name, group) for name, group in zip(names, groups, strict=True)]


def _name(run: Run) -> str:
    return f"{run.recipe.norm.name}, micro-batch {run.micro_batch_size} of {run.effective_batch_size}"


def reference_of(group: Group, groups: Sequence[Group]) -> Group | None:
    """What a group is compared with, of those with its data, network and epochs; None for the reference itself.

    BatchNorm at the whole batch, of its effective batch if there is one; else the first group.
    """
    peers = [other for other in groups if _task(other) == _task(group)]
    whole = [g for g in peers if g.norm == "batch" and g.first.micro_batch_size == g.first.effective_batch_size]
    same = [g for g in whole if g.first.effective_batch_size == group.first.effective_batch_size]
    chosen = next(iter([*same, *whole, *peers]))
    return None if chosen is group else chosen


def _task(group: Group) -> tuple[object, ...]:
    recipe = group.first.recipe
    model = recipe.model.model_copy(
        update={"weight_standardization": "auto"}
    )  # it comes with the norm, and the report has a line for it
    return recipe.data, model, recipe.train.epochs, recipe.train.max_steps
