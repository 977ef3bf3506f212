"""Plans: predictions over micro-batches, norms and settings, what fits a budget, and what would help where nothing does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from bln_train.errors import BlnError, UsageError
from bln_train.plan.predict import CONTEXT_BYTES, PlanRow, plan_memory
from bln_train.recipe.load import dump_recipe, parse_recipe
from bln_train.recipe.norms import BatchlessNormSection
from bln_train.recipe.recipe import Recipe
from bln_train.recipe.sections import SgdSection
from bln_train.system import machine
from bln_train.system.units import format_bytes


def largest_fit(rows: Sequence[PlanRow], budget_bytes: int) -> int | None:
    """The largest micro-batch that stays within the budget, None if none does."""
    return max((row.micro_batch_size for row in rows if row.total_bytes <= budget_bytes), default=None)


def plan_sizes(effective_batch_size: int) -> list[int]:
    """1, 2, 4, ... and the effective batch size."""
    sizes = [2**n for n in range(effective_batch_size.bit_length()) if 2**n < effective_batch_size]
    return [*sizes, effective_batch_size]


@dataclass(frozen=True)
class Variant:
    """A recipe of a plan, and its predictions."""

    norm: str
    settings: dict[str, str]
    """What was varied besides the norm, key to value."""
    recipe: Recipe | None
    rows: tuple[PlanRow, ...] = ()
    problem: str = ""
    """Why there are no rows."""

    @property
    def name(self) -> str:
        """How tables call it."""
        return ", ".join([self.norm, *(f"{key}={value}" for key, value in self.settings.items())])


def predict(variant: Variant, micro_batch_sizes: Sequence[int], *, cuda: bool, context_bytes: int) -> Variant:
    """The variant with its rows, or with what is wrong with it; of the sizes those up to its effective batch."""
    if variant.recipe is None:
        return variant
    sizes = [size for size in micro_batch_sizes if size <= variant.recipe.train.effective_batch_size]
    try:
        rows = plan_memory(variant.recipe, sizes, cuda=cuda, context_bytes=context_bytes)
    except BlnError as error:
        return replace(variant, problem=error.problem)
    return replace(variant, rows=tuple(rows))


@dataclass(frozen=True)
class Remedy:
    """A setting that takes less memory, with its prediction."""

    setting: str
    """As --set takes it."""
    note: str
    """What it changes besides memory; "" for nothing."""
    total_bytes: int


def remedies(recipe: Recipe, *, cuda: bool, context_bytes: int) -> list[Remedy]:
    """Settings that would lower the peak at micro-batch 1, each alone and then all together, with what they would make of it."""
    proposals = list(_proposals(recipe))
    found: list[Remedy] = []
    before = plan_memory(recipe, [1], cuda=cuda, context_bytes=context_bytes)[0].total_bytes
    helpful: list[str] = []
    for settings, note in [*(([setting], note) for setting, note in proposals), (helpful, "all of these")]:
        if note == "all of these" and len(helpful) < 2:
            continue
        try:
            changed = parse_recipe(dump_recipe(recipe), origin="recipe", overrides=settings)
            total = plan_memory(changed, [1], cuda=cuda, context_bytes=context_bytes)[0].total_bytes
        except BlnError:  # another setting excludes it
            continue
        if total < before:
            found.append(Remedy(" --set ".join(settings), note, total))
            if note != "all of these":
                helpful += settings
    return found


def _proposals(recipe: Recipe) -> Iterator[tuple[str, str]]:
    norm, optimizer, train = recipe.norm, recipe.optimizer, recipe.train
    if isinstance(norm, BatchlessNormSection):
        if not norm.fold:
            yield "norm.fold=true", ""
        elif norm.recompute is False:
            yield "norm.recompute=true", "each convolution runs once more"
    elif norm.name != "none":
        yield "norm={name: batchless}", "another norm"
    if isinstance(optimizer, SgdSection) and optimizer.accumulate_into == "gradient":
        clipped = "clips the update instead of the gradient" if optimizer.clip_norm is not None else ""
        yield "optimizer.accumulate_into=momentum", clipped
    if train.precision in ("fp32", "tf32"):
        yield "train.precision=bf16", "activations in 16 bits"
    elif train.precision == "fp64":
        yield "train.precision=fp32", "half the digits"
    if recipe.data.name == "folder" and recipe.image_size >= 16:
        yield f"data.image_size={recipe.image_size // 2}", "smaller images"


def make_plan(
    variants: Sequence[Variant],
    micro_batch_sizes: Sequence[int],
    *,
    cuda: bool,
    budget_bytes: int | None,
    context_bytes: int | None,
) -> dict[str, Any]:
    """Predict every variant and return the document that `plan` prints.

    Args:
        micro_batch_sizes: default those of `plan_sizes`.
        budget_bytes: default, for CUDA where there is a device, what is free of it less a headroom; else there is none.
        context_bytes: default assumed; 0 where the budget is what is free beside a context.
    """
    source = "given"
    if budget_bytes is None and cuda and torch.cuda.is_available():
        budget = machine.free_budget(torch.device("cuda"))
        budget_bytes, source = budget.num_bytes, budget.source
        context_bytes = 0 if context_bytes is None else context_bytes
    context = CONTEXT_BYTES if context_bytes is None else context_bytes
    done = _predict_all(variants, micro_batch_sizes, cuda=cuda, context_bytes=context)
    recipe = next((variant.recipe for variant in done if variant.recipe is not None), None)
    assert recipe is not None, "the command has refused a plan of nothing"
    return {
        "model": recipe.model.name,
        "images": f"{recipe.image_size}x{recipe.image_size}, {recipe.num_classes} classes",
        "effective_batch_size": recipe.train.effective_batch_size,
        "precision": recipe.train.precision,
        "optimizer": recipe.optimizer.name,
        "predicted_for": "cuda" if cuda else "cpu",
        "budget_bytes": budget_bytes,
        "budget_source": None if budget_bytes is None else source,
        "torch": torch.__version__,
        "rows": [
            {
                "variant": variant.name,
                "norm": variant.norm,
                "settings": variant.settings,
                **asdict(row),
                "tensor_bytes": row.tensor_bytes,
                "fits": None if budget_bytes is None else row.total_bytes <= budget_bytes,
            }
            for variant in done
            for row in variant.rows
        ],
        "largest_fit": {
            variant.name: largest_fit(variant.rows, budget_bytes) for variant in done if budget_bytes and variant.rows
        },
        "problems": {variant.name: variant.problem for variant in done if variant.problem},
        "remedies": [
            asdict(remedy)
            for remedy in _remedies_of_first(done, budget_bytes=budget_bytes, cuda=cuda, context_bytes=context)
        ],
    }


def _predict_all(
    variants: Sequence[Variant], micro_batch_sizes: Sequence[int], *, cuda: bool, context_bytes: int
) -> list[Variant]:
    """The variants with their rows; raises UsageError where each size is above every effective batch."""
    done = []
    for variant in variants:
        sizes = micro_batch_sizes
        if variant.recipe is not None and not sizes:
            sizes = plan_sizes(variant.recipe.train.effective_batch_size)
        done.append(predict(variant, sizes, cuda=cuda, context_bytes=context_bytes))
    if not any(variant.rows or variant.problem for variant in done):
        raise UsageError(
            f"every micro-batch ({', '.join(map(str, micro_batch_sizes))}) is above the effective batch",
            "Name smaller ones, or set train.effective_batch_size.",
        )
    return done


def _remedies_of_first(
    done: Sequence[Variant], *, budget_bytes: int | None, cuda: bool, context_bytes: int
) -> list[Remedy]:
    """Remedies for the first variant with rows; none without a budget, and none if any variant fits it."""
    predicted = [variant for variant in done if variant.rows]
    if budget_bytes is None or any(largest_fit(variant.rows, budget_bytes) is not None for variant in predicted):
        return []
    recipe = next((variant.recipe for variant in predicted), None)
    return [] if recipe is None else remedies(recipe, cuda=cuda, context_bytes=context_bytes)


def why_nothing_fits(document: dict[str, Any]) -> tuple[str, str]:
    """The problem, with the largest parts of the smallest row, and what to do about it."""
    budget = document["budget_bytes"]
    row = min(document["rows"], key=lambda r: r["total_bytes"])
    names = {
        "parameters": "parameter",
        "gradients": "gradient",
        "optimizer state": "optimizer",
        "activations": "activation",
        "buffers": "other",
        "workspace": "workspace",
        "the allocator's rounding": "rounding",
        "CUDA's context": "context",
    }
    parts = sorted(((row[f"{key}_bytes"] or 0, name) for name, key in names.items()), reverse=True)[:3]
    largest = ", ".join(f"{name} {format_bytes(size)}" for size, name in parts)
    problem = (
        f"{row['variant']} at micro-batch {row['micro_batch_size']} takes {format_bytes(row['total_bytes'])}, and the budget is "
        f"{format_bytes(budget)}; the largest parts: {largest}"
    )
    helping = [r for r in document["remedies"] if r["total_bytes"] <= budget]
    if helping:
        best = helping[0]
        return problem, f"It fits, at {format_bytes(best['total_bytes'])}, with --set {best['setting']}"
    if document["remedies"]:
        return (
            problem,
            "No setting above is enough by itself or with the others: take a smaller model or smaller images.",
        )
    return problem, "Take a smaller model or smaller images."
