"""`train.micro_batch_size: auto` and `train.memory_budget`: what fits is planned, tried, timed, and said."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bln_train.build.experiment import Experiment
from bln_train.errors import DoesNotFitError
from bln_train.norm.fused.network import set_recompute
from bln_train.plan.planner import Variant, make_plan, plan_sizes, remedies, why_nothing_fits
from bln_train.plan.predict import CONTEXT_BYTES, PlanRow, plan_memory
from bln_train.recipe.norms import BatchlessNormSection
from bln_train.recipe.recipe import Recipe
from bln_train.system import machine
from bln_train.system.units import format_bytes, parse_bytes
from bln_train.train.batches import EffectiveBatch
from bln_train.train.recovery import Attempt, Snapshot, free_memory

_KEPT = " with convolutions kept and not computed again (norm.recompute: auto)"
_NUM_TRIED = 3
_LARGEST_ON_CPU = 64  # larger ones take long to try, and a CPU has long enough loops by then


def choose_micro_batch(recipe: Recipe, experiment: Experiment, *, at_most: int | None = None) -> str:
    """Resolve `auto` and enforce the budget; returns a message about it, "" where the recipe asks for neither.

    The plan says what fits; of the largest that do, each half of the one before, the fastest is taken, after whole steps on the
    first images that are undone: weights, buffers, optimizer, random numbers and the place in the data stay what they were. With
    several processes nothing is tried: the largest that fits by rank 0's plan is taken.

    Args:
        at_most: a micro-batch above which memory ran out before.

    Raises:
        DoesNotFitError: nothing fits, or the stated micro-batch does not, with what would help.
    """
    train, accumulation = recipe.train, experiment.trainer.accumulation
    if train.micro_batch_size != "auto" and train.memory_budget is None:
        return ""
    budget, context_bytes = _budget(recipe, experiment.device)
    effective = min(train.effective_batch_size, len(experiment.data.train))
    fitting = _fitting(recipe, experiment, budget, context_bytes, at_most)
    said = f"{format_bytes(budget.num_bytes)} ({budget.source})"
    largest, predicted = fitting[-1].micro_batch_size, format_bytes(fitting[-1].total_bytes)
    if train.micro_batch_size != "auto":
        kept = _keep_outputs(recipe, experiment, largest, budget, context_bytes)
        return f"Predicted {kept or predicted} of {said} at micro-batch {largest}{_KEPT if kept else ''}."
    text = f"largest that fits {said} is {largest}, predicted {predicted}"
    if accumulation.world.size > 1:
        chosen = largest
        text += "; with several processes none is timed"
    else:
        speeds = _try(experiment, [row.micro_batch_size for row in reversed(fitting)][:_NUM_TRIED], effective)
        if not speeds:
            raise DoesNotFitError(
                f"memory ran out at every micro-batch that was tried, {largest} and below, though the plan fits {said}",
                "Other programs may hold memory; state what is really free with --set train.memory_budget=..., or take "
                "--set train.micro_batch_size=1.",
            )
        chosen = max(speeds, key=speeds.__getitem__)
        text += "; " + ", ".join(f"{size}: {speed:.0f} images/s" for size, speed in speeds.items())
    accumulation.micro_batch_size = chosen
    if recipe.norm.name == "batch" and chosen < effective:
        text += "; BatchNorm's result depends on it: state the number to have the same one elsewhere"
    kept = _keep_outputs(recipe, experiment, chosen, budget, context_bytes)
    return f"micro-batch {chosen} of {effective}: the {text}{f', then {kept}{_KEPT}' if kept else ''}."


def _keep_outputs(recipe: Recipe, experiment: Experiment, size: int, budget: machine.Budget, context_bytes: int) -> str:
    """Keep the outputs of folded convolutions where `norm.recompute` is auto and that fits; the bytes predicted then, or ""."""
    norm = recipe.norm
    if (
        not isinstance(norm, BatchlessNormSection)
        or norm.recompute != "auto"
        or not experiment.trainer.accumulation.folded
    ):
        return ""
    keeping = recipe.model_copy(update={"norm": norm.model_copy(update={"recompute": False})})
    of_data = keeping.with_images(experiment.input.image_size, len(experiment.input.class_names))
    rows = plan_memory(of_data, [size], cuda=experiment.device.type == "cuda", context_bytes=context_bytes)
    fitting = [row for row in rows if row.total_bytes <= budget.num_bytes]
    if experiment.trainer.accumulation.world.size > 1:
        fitting = _agree(experiment, rows, fitting)
    if not fitting:
        return ""
    set_recompute(experiment.model, False)
    return format_bytes(fitting[0].total_bytes)


def _budget(recipe: Recipe, device: torch.device) -> tuple[machine.Budget, int]:
    """The memory that training may take, enforced on CUDA, and the bytes of it for a CUDA context."""
    stated = recipe.train.memory_budget
    if stated is None:
        budget, context_bytes = machine.free_budget(device), 0  # a context that is there already is not free
    else:
        budget, context_bytes = machine.Budget(parse_bytes(stated), "train.memory_budget"), CONTEXT_BYTES
    if device.type == "cuda":
        machine.limit_memory(device, budget.num_bytes - context_bytes)
    return budget, context_bytes


def _fitting(
    recipe: Recipe, experiment: Experiment, budget: machine.Budget, context_bytes: int, at_most: int | None
) -> list[PlanRow]:
    """The plan's rows within the budget, of the stated micro-batch or of all that `auto` may take; raises if there is none."""
    train, cuda = recipe.train, experiment.device.type == "cuda"
    effective = min(train.effective_batch_size, len(experiment.data.train))
    if train.micro_batch_size != "auto":
        sizes = [min(train.micro_batch_size, effective)]
    else:
        limits = [size for size in (at_most, None if cuda else _LARGEST_ON_CPU) if size is not None]
        sizes = [size for size in plan_sizes(effective) if size <= min(limits, default=effective)]
    of_data = recipe.with_images(experiment.input.image_size, len(experiment.input.class_names))
    rows = plan_memory(of_data, sizes, cuda=cuda, context_bytes=context_bytes)
    fitting = [row for row in rows if row.total_bytes <= budget.num_bytes]
    if experiment.trainer.accumulation.world.size > 1:
        fitting = _agree(experiment, rows, fitting)
    if not fitting:
        plan = make_plan(
            [Variant(recipe.norm.name, {}, of_data)],
            [sizes[0]],
            cuda=cuda,
            budget_bytes=budget.num_bytes,
            context_bytes=context_bytes if cuda else None,
        )
        raise DoesNotFitError(*why_nothing_fits(plan))
    return fitting


@contextmanager
def planned_advice(recipe: Recipe, experiment: Experiment) -> Iterator[None]:
    """Add to the error of a run that does not fit what the plan says of settings that would help."""
    try:
        yield
    except DoesNotFitError as error:
        of_data = recipe.with_images(experiment.input.image_size, len(experiment.input.class_names))
        cuda = experiment.device.type == "cuda"
        try:
            planned = remedies(of_data, cuda=cuda, context_bytes=CONTEXT_BYTES)
        except Exception as problem:  # advice must not take the place of what happened
            planned, advice = [], [f"(No settings were planned: {problem})"]
        else:
            advice = [f"  {format_bytes(remedy.total_bytes)} with --set {remedy.setting}" for remedy in planned]
        if planned:
            advice.insert(0, f"Predicted at micro-batch 1{', CUDA context included' if cuda else ''}:")
        raise DoesNotFitError(error.problem, "\n".join([error.hint, *advice])) from error


def _try(experiment: Experiment, sizes: list[int], effective: int) -> dict[int, float]:
    """Images per second of forward and backward at each size at which memory does not run out; the state is as before."""
    trainer, speeds = experiment.trainer, dict[int, float]()
    accumulation, device = trainer.accumulation, experiment.device
    asked, snapshot = accumulation.micro_batch_size, Snapshot(accumulation)
    snapshot.take()

    def seconds(size: int) -> float:
        accumulation.micro_batch_size = size
        index, done = torch.arange(min(2 * size, effective)), 0.0

        def gradients_ready() -> None:
            nonlocal done
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            done = time.perf_counter()

        began = time.perf_counter()
        try:
            accumulation(EffectiveBatch(experiment.data.train, index, trainer.seed, 0), gradients_ready)
        finally:
            snapshot.restore()
        return (done - began) / len(index)

    try:
        for size in sizes:
            for timed in (False, True):  # the first one warms up, and has the gradients to make
                found = 0.0
                with Attempt() as attempt:
                    found = seconds(size)
                if attempt.reason is not None:
                    free_memory(device)
                    break
                if timed:
                    speeds[size] = 1 / found
    finally:
        accumulation.micro_batch_size = asked
    return speeds


def _agree(experiment: Experiment, rows: list[PlanRow], fitting: list[PlanRow]) -> list[PlanRow]:
    """What fits by rank 0's plan, in every process."""
    world = experiment.trainer.accumulation.world
    number = torch.tensor([float(len(fitting))], dtype=torch.float64)
    world.broadcast_([number])
    return rows[: int(number)]
