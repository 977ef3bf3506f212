"""The first section of a report: whether runs finished and fit their budget, and how accuracies compare. No torch here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from bln_train.report.blocks import Block, Finding, Section, Table
from bln_train.report.groups import Group, Mean, reference_of
from bln_train.report.source import Sources, Sweep, cell_name
from bln_train.system.units import CUDA_CONTEXT_BYTES, format_bytes, format_number, format_percent

_MAX_GROUPS = 6
"""Groups that get sentences of their own; the table has all."""


def verdict(sources: Sources, groups: Sequence[Group]) -> Section:
    """Findings for the groups, and all of them side by side."""
    blocks: list[Block] = [*_finished(sources, groups), *_budgets(groups)]
    references = [reference_of(group, groups) for group in groups]
    pairs = zip(groups, references, strict=True)
    # The reference needs no sentence of its own.
    compared = [(group, reference) for group, reference in pairs if all(group is not other for other in references)]
    blocks += [_accuracy(group, reference) for group, reference in compared[:_MAX_GROUPS]]
    if len(compared) > _MAX_GROUPS:
        blocks.append(Finding("note", f"In the table below: {len(compared) - _MAX_GROUPS} more."))
    blocks += [_of_sweep(sweep) for sweep in sources.sweeps]
    if groups:
        blocks.append(_side_by_side(groups, references))
    return Section("Verdict", blocks)


def _finished(sources: Sources, groups: Sequence[Group]) -> Iterator[Finding]:
    runs = [run for group in groups for run in group.runs]
    unfinished = [run for run in runs if not run.finished]
    if runs:
        yield Finding("bad" if unfinished else "good", f"{len(runs) - len(unfinished)} of {len(runs)} runs finished.")
    for run in unfinished:
        step = run.steps[-1].step if run.steps else 0
        yield Finding("bad", f"{run.path} is not finished; its metrics end at step {step}.")
    for failure in sources.failures:
        yield Finding("bad", f"Did not finish: {failure}")


def _budgets(groups: Sequence[Group]) -> Iterator[Finding]:
    stated = [group for group in groups if group.budget_bytes is not None]
    yield from (_budget(group) for group in stated[:_MAX_GROUPS])
    if len(stated) > _MAX_GROUPS:
        yield Finding("note", f"In the table below: {len(stated) - _MAX_GROUPS} more with a memory budget.")
    if groups and not stated:
        peaks = [group.peak_bytes for group in groups if group.peak_bytes is not None]
        peak = f"the largest peak is {format_bytes(max(peaks))}" if peaks else "memory was not measured"
        yield Finding("unknown", f"No memory budget was stated (train.memory_budget); {peak}.")


def _budget(group: Group) -> Finding:
    budget, memory, peak = group.budget_bytes, group.first.memory, group.peak_bytes
    assert budget is not None
    if memory is None or peak is None:
        return Finding("unknown", f"{group.name}: memory was not measured.")
    if memory.method == "allocator":
        reserved = max(r.memory.reserved_bytes or 0 for r in group.runs if r.memory) or peak
        taken = reserved + CUDA_CONTEXT_BYTES
        what = f"{format_bytes(reserved)} reserved by the allocator, {format_bytes(CUDA_CONTEXT_BYTES)} assumed for CUDA's context"
    else:
        taken, what = peak, f"a peak of {format_bytes(peak)} in tracked tensors (libraries and data set not included)"
    share = f"{100 * taken / budget:.1f} % of the memory budget of {format_bytes(budget)}: {what}."
    fits = taken <= budget
    return Finding("good" if fits else "bad", f"{'Fits' if fits else 'Does not fit'}: {group.name} takes {share}")


def _of_sweep(sweep: Sweep) -> Finding:
    peaks = {row["peak_bytes"]: cell_name(row) for row in sweep.rows if row.get("peak_bytes") is not None}
    if not peaks:
        return Finding("unknown", f"{sweep.path}: no peak was measured.")
    low, high = min(peaks), max(peaks)
    floor = "" if not sweep.floor_bytes else f", {low / sweep.floor_bytes:.2f} times the floor"
    smallest = f"smallest peak {format_bytes(low)} ({peaks[low]}){floor}"
    return Finding("note", f"{sweep.path}: {smallest}; largest {format_bytes(high)} ({peaks[high]}).")


def _accuracy(group: Group, reference: Group | None) -> Finding:
    last, accuracy = group.first.last, group.accuracy
    if last is None or accuracy is None:
        return Finding("unknown", f"{group.name}: no test accuracy was measured.")
    where = f"on {last.num_test_images} images after epoch {last.epoch}"
    text = f"{group.name}: test accuracy {format_mean(accuracy, 100, 2)} % {where}"
    classes = group.first.recipe.num_classes
    if reference is None or reference.accuracy is None:
        return Finding("note", f"{text}; guessing gives {format_percent(1 / classes)} of {classes} classes.")
    difference = 100 * (accuracy.value - reference.accuracy.value)
    against = f"{difference:+.2f} points against {reference.name}{_weight(accuracy, reference.accuracy)}"
    ratio = _ratio(group, reference)
    memory = "" if ratio is None else f", with {ratio:.2f} times its peak memory"
    return Finding("note", f"{text}, {against}{memory}.")


def _ratio(group: Group, reference: Group | None) -> float | None:
    if reference is None or not reference.peak_bytes or group.peak_bytes is None:
        return None
    return group.peak_bytes / reference.peak_bytes


def _weight(one: Mean, other: Mean) -> str:
    """How far a difference of two means is from chance, as far as their spreads tell."""
    if one.spread is None or other.spread is None:
        return " (not several seeds of both: what another one would change is not known)"
    error = 100 * math.sqrt(one.spread**2 / one.num_runs + other.spread**2 / other.num_runs)
    return f" (standard error of the difference {error:.2f}, {one.num_runs} and {other.num_runs} runs)"


def _side_by_side(groups: Sequence[Group], references: Sequence[Group | None]) -> Table:
    rows = [
        (
            group.name,
            f"{sum(run.finished for run in group.runs)}/{len(group.runs)}",
            format_mean(group.accuracy, 100, 2),
            format_bytes(group.peak_bytes),
            *([format_number(_ratio(group, reference), 2)] if len(groups) > 1 else []),
            format_bytes(group.budget_bytes),
            format_mean(group.images_per_second, 1, 1),
        )
        for group, reference in zip(groups, references, strict=True)
    ]
    ratio = ["/ reference"] if len(groups) > 1 else []
    names = sorted({reference.name for reference in references if reference is not None})
    title = f"Side by side; reference: {'; '.join(names)}" if names else "At a glance"
    return Table(title, ("run", "finished", "test accuracy %", "peak memory", *ratio, "budget", "images/s"), rows)


def format_mean(mean: Mean | None, scale: float, digits: int) -> str:
    """`66.03 ± 0.91`, without spread for one run, `-` for none."""
    if mean is None:
        return "-"
    text = f"{scale * mean.value:.{digits}f}"
    return text if mean.spread is None else f"{text} ± {scale * mean.spread:.{digits}f}"
