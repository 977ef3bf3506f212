"""The part of `experiment.py` that turns a recipe into images, and into what is done to them."""

from __future__ import annotations

import torch

from bln_train.data.augment import Preprocess
from bln_train.data.datasets import DataSet, ImageSet, channel_moments, hold_out, load_dataset
from bln_train.errors import UsageError
from bln_train.recipe.recipe import Recipe
from bln_train.recipe.resolve import eval_batch_size
from bln_train.records import InputSpec
from bln_train.system import machine
from bln_train.train.evaluate import Evaluation, evaluate
from bln_train.train.step import AccumulationStep


def load(recipe: Recipe) -> DataSet:
    """The recipe's images; raises DataError, and UsageError where the classes are not those the recipe states."""
    section = recipe.data
    data = load_dataset(
        section.name,
        root=section.root,
        download=section.download,
        num_train=section.num_train,
        num_test=section.num_test,
        image_size=section.image_size,
    )
    stated, found = recipe.model.num_classes, len(data.class_names)
    if stated not in (None, found):
        raise UsageError(
            f"model.num_classes is {stated}, but {data.source} has {found} classes",
            "Leave model.num_classes out to take the number from the data.",
        )
    return hold_out(data, section.validation_fraction) if section.validation_fraction else data


def build_preprocess(recipe: Recipe, data: DataSet) -> Preprocess:
    """Augmentation and normalisation; raises UsageError for a crop that the images are too small for."""
    if recipe.data.normalize == "symmetric":
        mean = std = torch.full((data.train.images.shape[1],), 0.5, dtype=torch.float64)
    else:
        mean, std = channel_moments(data.train.images)
    augment, side = recipe.data.augment, min(data.train.images.shape[-2:])
    if augment.crop_padding >= side:
        raise UsageError(
            f"data.augment.crop_padding is {augment.crop_padding}, but the images have {side} pixels a side"
        )
    return Preprocess(
        mean,
        std,
        flip=augment.flip,
        crop_padding=augment.crop_padding,
        cutout=augment.cutout,
        dtype=machine.weight_dtype(recipe.train.precision),
        channels_last=recipe.train.channels_last,
    )


def input_spec(data: DataSet, preprocess: Preprocess) -> InputSpec:
    """What a network trained on these images takes."""
    mean, std = preprocess.mean.tolist(), preprocess.std.tolist()
    return InputSpec(data.train.images.shape[-1], tuple(mean), tuple(std), data.class_names)


def evaluate_on(recipe: Recipe, accumulation: AccumulationStep, images: ImageSet) -> Evaluation:
    """Loss and accuracy of the network that is trained on images as the recipe evaluates them."""
    return evaluate(
        accumulation.model,
        images,
        accumulation.preprocess,
        device=accumulation.device,
        batch_size=eval_batch_size(recipe, accumulation.micro_batch_size),
        autocast=accumulation.autocast,
        world=accumulation.world,
        stop_asked=accumulation.stop_asked,
    )
