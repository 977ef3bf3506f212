"""Numbers in the place of a recipe's `auto`: what a run wrote down holds wherever it goes on. No torch here.

`weight_standardization`, `channel_groups` and `init_images` follow from the recipe; recipe.py has their rules.
`correction_parts` is known with the processes, `probe_images` with the network. The batch sizes and `recompute` are
known with the device's memory.
"""

from __future__ import annotations

from typing import Any

from bln_train.recipe.norms import BatchlessNormSection, BatchNormSection
from bln_train.recipe.paper_norm import PaperNormSection
from bln_train.recipe.recipe import Recipe

_LARGEST_AUTO_EVAL_BATCH = 256
# By section; in `train` no number changes the result but BatchNorm's micro-batch.
_CHANGE_THE_RESULT = {
    "model": ("weight_standardization",),
    "norm": ("channel_groups", "correction_parts", "probe_images", "init_images"),
}


def resolved(
    recipe: Recipe,
    *,
    num_processes: int | None = None,
    probe_images: int | None = None,
    micro_batch_size: int | None = None,
    recompute: bool | None = None,
) -> Recipe:
    """The recipe with a number in the place of each `auto`, of those that are known: None is not known yet."""
    norm: dict[str, Any] = {}
    if isinstance(recipe.norm, BatchlessNormSection):
        norm = {"channel_groups": recipe.channel_groups, "init_images": recipe.num_init_images}
        norm |= {"probe_images": probe_images, "recompute": recompute}
        norm["correction_parts"] = num_processes if recipe.norm.correction_rate else None
    elif isinstance(recipe.norm, PaperNormSection) or (
        isinstance(recipe.norm, BatchNormSection) and recipe.num_init_images
    ):
        norm = {"init_images": recipe.num_init_images}
    train: dict[str, Any] = {}
    if micro_batch_size is not None:
        train = {"micro_batch_size": micro_batch_size, "eval_batch_size": eval_batch_size(recipe, micro_batch_size)}
    model = {"weight_standardization": recipe.weight_standardization}
    return _filled(recipe, {"model": model, "norm": norm, "train": train})


def eval_batch_size(recipe: Recipe, micro_batch_size: int) -> int:
    """Images evaluated at once. Auto: four images without gradients need less than one in training does."""
    stated = recipe.train.eval_batch_size
    return min(4 * micro_batch_size, _LARGEST_AUTO_EVAL_BATCH) if stated == "auto" else stated


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
    """The recipe with `numbers`, by section and key, where it says `auto`; None leaves it."""
    update = {}
    for name, values in numbers.items():
        section = getattr(recipe, name)
        own = {k: value for k, value in values.items() if value is not None and getattr(section, k, None) == "auto"}
        update[name] = section.model_copy(update=own)
    return recipe.model_copy(update=update)
