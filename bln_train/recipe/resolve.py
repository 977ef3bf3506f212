"""Numbers in the place of a recipe's `auto`: what a run wrote down holds wherever it goes on. No torch here."""

from __future__ import annotations

from typing import Any

from bln_train.recipe.norms import BatchlessNormSection, BatchNormSection
from bln_train.recipe.paper_norm import PaperNormSection
from bln_train.recipe.recipe import Recipe

# By section; in `train` no number changes the result but BatchNorm's micro-batch.
_CHANGE_THE_RESULT = {
    "model": ("weight_standardization",),
    "norm": ("channel_groups", "correction_parts", "probe_images", "init_images"),
}


def resolve(recipe: Recipe, *, probe_images: int, num_processes: int) -> Recipe:
    """The recipe that says what each `auto` of its model and norm stands for, with `probe_images` of `num_processes`."""
    norm: dict[str, Any] = {}
    if isinstance(recipe.norm, BatchlessNormSection):
        norm = {
            "channel_groups": recipe.channel_groups,
            "probe_images": probe_images,
            "init_images": recipe.num_init_images,
        }
        if recipe.norm.correction_rate:
            norm["correction_parts"] = num_processes
    elif isinstance(recipe.norm, PaperNormSection) or (
        isinstance(recipe.norm, BatchNormSection) and recipe.num_init_images
    ):
        norm = {"init_images": recipe.num_init_images}
    return _filled(recipe, {"model": {"weight_standardization": recipe.weight_standardization}, "norm": norm})


def resolve_batch_sizes(recipe: Recipe, *, micro_batch_size: int, eval_batch_size: int) -> Recipe:
    """The recipe that says what each `auto` of its batch sizes stands for."""
    return _filled(recipe, {"train": {"micro_batch_size": micro_batch_size, "eval_batch_size": eval_batch_size}})


def as_begun(recipe: Recipe, begun: Recipe) -> Recipe:
    """The recipe of a run that goes on: `auto` stands for what it stood for when the run began, where that changes the result."""
    if recipe.norm.name != begun.norm.name:
        return recipe
    said = begun.model_dump()
    numbers = {section: {key: said[section][key] for key in keys if key in said[section]}
               for section, keys in _CHANGE_THE_RESULT.items()}  # fmt: skip
    if recipe.norm.name == "batch":
        numbers["train"] = {"micro_batch_size": begun.train.micro_batch_size}
    return _filled(recipe, numbers)


def _filled(recipe: Recipe, numbers: dict[str, dict[str, Any]]) -> Recipe:
    """The recipe with `numbers`, by section and key, where it says `auto`."""
    update = {}
    for name, values in numbers.items():
        section = getattr(recipe, name)
        own = {key: value for key, value in values.items() if getattr(section, key, None) == "auto"}
        update[name] = section.model_copy(update=own)
    return recipe.model_copy(update=update)
