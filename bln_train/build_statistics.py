"""The part of `build.py` that takes the norms' statistics from images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from bln_train import runtime
from bln_train.augment import Preprocess
from bln_train.build_data import build_preprocess, eval_batch_size, load
from bln_train.data import DataSet, epoch_order
from bln_train.errors import UsageError
from bln_train.norm.calibrate import initialize_statistics
from bln_train.norm.reestimate import reestimate_statistics
from bln_train.recipe import Recipe
from bln_train.recipe_norms import DEFAULT_INIT_IMAGES, BatchlessNormSection


def initialize(
    recipe: Recipe, model: nn.Module, data: DataSet, preprocess: Preprocess, device: torch.device
) -> list[str]:
    """Statistics from the first images of a seeded order, in slices that need no more memory than training."""
    if not recipe.num_init_images:
        return []
    micro_batches = partial(_sample, recipe, data, preprocess, device, recipe.num_init_images)
    cache = isinstance(recipe.norm, BatchlessNormSection) and recipe.norm.init_cache
    try:
        floored = initialize_statistics(model, micro_batches, cache=cache)
    except ValueError as error:
        raise UsageError(
            f"cannot initialise the statistics: {error}", "Set norm.init_cache=false, or see train.eval_batch_size."
        ) from error
    if not floored:
        return []
    number = min(recipe.num_init_images, len(data.train))
    return [
        f"Channels without variance over the first {number} images, standard deviation floored: {', '.join(floored)}."
    ]


def reestimate(
    recipe: Recipe, model: nn.Module, data: DataSet, preprocess: Preprocess, device: torch.device
) -> list[str]:
    """Trained statistics measured anew on the run's images, as norm.reestimate_images has it; the function stays."""
    section = recipe.norm
    if not isinstance(section, BatchlessNormSection) or not section.reestimate_images:
        return []
    micro_batches = partial(_sample, recipe, data, preprocess, device, section.reestimate_images)
    try:
        kept, unreached = reestimate_statistics(model, micro_batches)
    except ValueError as error:
        raise UsageError(f"norm.reestimate_images: {error}", "Leave it out to keep the trained statistics.") from error
    number = min(section.reestimate_images, len(data.train))
    notices = [f"Statistics were measured anew on {number} images; weights and biases of the norms took up the change."]
    if kept:
        notices.append(
            f"Channels that vary by less than norm.eps there keep their standard deviation: {', '.join(kept)}."
        )
    if unreached:
        notices.append(f"Norms that the network does not use keep their statistics: {', '.join(unreached)}.")
    return notices


def calibration_sample(recipe: Recipe) -> tuple[Callable[[], Iterator[Tensor]], int, torch.dtype]:
    """The images, in micro-batches on the CPU, from which the recipe takes statistics; their number and type of weights.

    Raises:
        UsageError, DataError: as `load` does.
    """
    data = load(recipe)
    number = min(recipe.num_init_images or DEFAULT_INIT_IMAGES, len(data.train))
    preprocess = build_preprocess(recipe, data)
    sample = partial(_sample, recipe, data, preprocess, torch.device("cpu"), number)
    return sample, number, runtime.weight_dtype(recipe.train.precision)


def _sample(
    recipe: Recipe, data: DataSet, preprocess: Preprocess, device: torch.device, num_images: int
) -> Iterator[Tensor]:
    """The first training images of a seeded order that no epoch has."""
    index = epoch_order(len(data.train), seed=recipe.train.seed, epoch=recipe.train.epochs)[:num_images]
    for part in index.split(eval_batch_size(recipe, recipe.first_micro_batch_size)):
        yield preprocess.test(data.train.images[part].to(device))
