"""The part of `experiment.py` that takes the norms' statistics from images, and says how many they follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from bln_train.build.data import build_preprocess, load
from bln_train.data.augment import Preprocess
from bln_train.data.datasets import DataSet, epoch_order
from bln_train.errors import UsageError
from bln_train.norm.calibrate.initialize import initialize_statistics
from bln_train.norm.calibrate.moments import evaluating, on_input
from bln_train.norm.statistics import BatchlessStatistics
from bln_train.recipe.norms import DEFAULT_INIT_IMAGES, BatchlessNormSection
from bln_train.recipe.recipe import Recipe
from bln_train.recipe.resolve import eval_batch_size
from bln_train.system import machine

_LEAST_PROBE = 4  # with fewer images deep networks drift
_ENOUGH_PROBE = (
    8  # more gain nothing (recipes/RESULTS.md), up to 32 norms; ResNet-56 diverges with 8 where it trains with 16
)


def initialize(
    recipe: Recipe, model: nn.Module, data: DataSet, preprocess: Preprocess, device: torch.device
) -> list[str]:
    """Statistics from the first images of a seeded order, in slices that need no more memory than training."""
    if not recipe.num_init_images:
        return []
    micro_batches = partial(_sample, recipe, data, preprocess, device, recipe.num_init_images)
    try:
        floored = initialize_statistics(model, micro_batches)
    except ValueError as error:
        raise UsageError(f"cannot initialise the statistics: {error}") from error
    if not floored:
        return []
    number = min(recipe.num_init_images, len(data.train))
    return [
        f"Channels without variance over the first {number} images, standard deviation floored: {', '.join(floored)}."
    ]


def probe_images(recipe: Recipe, model: nn.Module, image_size: int) -> int:
    """Images of the probe, at most an effective batch; 0 for norms without one. The model is not fused.

    `auto` is a rule of shapes, the same on every device and code path. With s the number of elements that enter each of L
    batchless norms for one image:

        images = sum of s / (2 * largest s), rounded down, from max(4, L // 8) to max(8, L // 4)

    One image's forward and backward keep what enters each norm once; a forward without gradients holds a layer's input and output.
    So the probe takes about the memory of one image's training. A deep network needs more, whatever its shapes: what a layer
    misjudges is passed on to all those above it.
    """
    norm = recipe.norm
    if not isinstance(norm, BatchlessNormSection):
        return 0
    effective = recipe.train.effective_batch_size
    if norm.probe_images != "auto":
        return min(norm.probe_images, effective)
    sizes = _sizes_of_inputs(model, image_size)
    least, most = max(_LEAST_PROBE, len(sizes) // 8), max(_ENOUGH_PROBE, len(sizes) // 4)
    return min(max(least, sum(sizes) // (2 * max(sizes, default=1))), most, effective)


@torch.no_grad()
def _sizes_of_inputs(model: nn.Module, image_size: int) -> list[int]:
    """The number of elements that enter each batchless norm for one image, in order of execution."""
    weight, sizes = next(model.parameters()), list[int]()
    norms = BatchlessStatistics(model).layers.values()
    image = torch.zeros(1, 3, image_size, image_size, dtype=weight.dtype, device=weight.device)
    with evaluating(model), on_input(norms, lambda norm, x: sizes.append(x.numel())):
        model(image)
    return sizes


def calibration_sample(recipe: Recipe) -> tuple[Callable[[], Iterator[Tensor]], int, torch.dtype]:
    """The images, in micro-batches on the CPU, from which the recipe takes statistics; their number and type of weights.

    Raises:
        UsageError, DataError: as `load` does.
    """
    data = load(recipe)
    number = min(recipe.num_init_images or DEFAULT_INIT_IMAGES, len(data.train))
    preprocess = build_preprocess(recipe, data)
    sample = partial(_sample, recipe, data, preprocess, torch.device("cpu"), number)
    return sample, number, machine.weight_dtype(recipe.train.precision)


def _sample(
    recipe: Recipe, data: DataSet, preprocess: Preprocess, device: torch.device, num_images: int
) -> Iterator[Tensor]:
    """The first training images of a seeded order that no epoch has."""
    index = epoch_order(len(data.train), seed=recipe.train.seed, epoch=recipe.train.epochs)[:num_images]
    for part in index.split(eval_batch_size(recipe, recipe.first_micro_batch_size)):
        yield preprocess.test(data.train.images[part].to(device))
