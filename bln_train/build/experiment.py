"""The only place where a recipe becomes objects, with `data.py` and `first_statistics.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from bln_train.build import first_statistics, runtime
from bln_train.build.data import build_preprocess, evaluate_on, input_spec, load
from bln_train.data.augment import Preprocess
from bln_train.data.datasets import DataSet
from bln_train.errors import UsageError
from bln_train.models.build import build_model, norm_factory
from bln_train.models.layers import NormFactory
from bln_train.models.names import is_foreign
from bln_train.models.pretrained import build_trained_model
from bln_train.norm.fused.network import fuse
from bln_train.norm.kernels.backend import why_not_triton
from bln_train.norm.kernels.library import why_not_compiled
from bln_train.norm.standardize import StandardizedConv2d, centre_filters
from bln_train.norm.statistics import BatchlessStatistics
from bln_train.recipe.norms import DEFAULT_INIT_IMAGES, BatchlessNormSection, BatchNormSection, GroupNormSection
from bln_train.recipe.paper_norm import PaperNormSection
from bln_train.recipe.recipe import Recipe
from bln_train.recipe.resolve import resolved
from bln_train.recipe.sections import CosineSection, SgdSection, StepSection
from bln_train.records import InputSpec
from bln_train.system import machine
from bln_train.train.cuda_graphs import MOST_PIXELS, GraphedSteps
from bln_train.train.distributed import ALONE, World
from bln_train.train.loss_scale import LossScale
from bln_train.train.optim import Schedule, build_optimizer, parameter_groups
from bln_train.train.step import AccumulationStep, StepSettings
from bln_train.train.trainer import Trainer, TrainerSettings


@dataclass(frozen=True)
class Experiment:
    """A recipe, ready to run."""

    recipe: Recipe
    """With numbers in the place of each `auto` of its model and norm."""
    trainer: Trainer
    """Takes the steps."""
    model: nn.Module
    """On its device, statistics set, norms folded where the recipe says so."""
    data: DataSet
    """Training, test and perhaps validation images."""
    device: torch.device
    """Where it runs."""
    input: InputSpec
    """What the network's images are, for whoever uses it later."""
    notices: tuple[str, ...]
    """What the user should know before it runs."""


def build_experiment(
    recipe: Recipe, *, initialize: bool = True, data: DataSet | None = None, world: World = ALONE
) -> Experiment:
    """Turn a recipe into data, network, optimizer and trainer.

    Args:
        recipe: what to build; see `load_recipe`.
        initialize: take the norms' statistics from data, or all weights from model.init; pass False where a checkpoint brings them.
        data: in place of the recipe's.
        world: the processes that train together.

    Raises:
        UsageError: the recipe asks for what this machine or its data cannot do.
        DataError: the data are missing or damaged.
        CheckpointError: the trained weights of model.init are missing, damaged or of another network.
    """
    device = machine.resolve_device(recipe.runtime.device)
    runtime.set_up(recipe, device)
    machine.autocast(device, recipe.train.precision)  # says at once if the device cannot do the precision
    _correction_parts(recipe, world)  # and if the processes cannot share the parts
    with world.first_rank_first():
        data = load(recipe) if data is None else data
        preprocess = build_preprocess(recipe, data)
        images = input_spec(data, preprocess)
    model, notices = network_on(device, recipe, data, preprocess, images, initialize=initialize, world=world)
    return assemble(
        recipe,
        model,
        data,
        preprocess,
        images,
        device,
        notices=(*machine.memory_notices(device), *_notices(recipe, data, world), *notices),
        world=world,
    )


def network_on(
    device: torch.device,
    recipe: Recipe,
    data: DataSet,
    preprocess: Preprocess,
    images: InputSpec,
    *,
    initialize: bool,
    world: World = ALONE,
) -> tuple[nn.Module, list[str]]:
    """The network on its device, with its statistics; see `build_network`."""
    with world.first_rank_first():
        model, notices = build_network(
            recipe, num_classes=len(images.class_names), image_size=images.image_size, initialize=initialize
        )
    model = model.to(device)
    if recipe.train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if initialize and recipe.model.init is None:  # trained weights bring their statistics
        notices += first_statistics.initialize(recipe, model, data, preprocess, device)
    return model, notices


def assemble(
    recipe: Recipe,
    model: nn.Module,
    data: DataSet,
    preprocess: Preprocess,
    images: InputSpec,
    device: torch.device,
    *,
    notices: Sequence[str] = (),
    world: World = ALONE,
) -> Experiment:
    """What trains a network that is there: folded layers, optimizer, step and trainer."""
    notices = list(notices)
    preprocess.prepare(device, *data.train.images.shape[-2:])  # which is no part of a step
    num_probe = first_statistics.probe_images(recipe, model, images.image_size)  # before norms are folded
    recipe = resolved(recipe, num_processes=world.size, probe_images=num_probe)
    if isinstance(recipe.norm, BatchlessNormSection) and recipe.norm.fold:
        checked_size = images.image_size if is_foreign(recipe.model.name) else None
        notices += _fuse(model, checked_size, recompute=recipe.norm.recompute is not False)
        why = _why_not_compiled(device)
        if why:
            notices.append(f"Folded norms run PyTorch's operators, which is slower than compiled kernels: {why}.")
    statistics = BatchlessStatistics(model)
    optimizer = _optimizer(recipe, model, statistics)
    train = recipe.train
    accumulation = AccumulationStep(
        model,
        optimizer,
        statistics,
        preprocess,
        StepSettings(
            micro_batch_size=recipe.first_micro_batch_size,
            probe_images=num_probe,
            correction_parts=_correction_parts(recipe, world),
            label_smoothing=train.label_smoothing,
            clip_norm=None if recipe.accumulates_into_momentum else recipe.optimizer.clip_norm,
        ),
        device=device,
        autocast=partial(machine.autocast, device, train.precision),
        loss_scale=LossScale(device.type, enabled=train.precision == "fp16"),
        world=world,
    )
    accumulation.graphs = _graphs(recipe, accumulation, images.image_size)
    trainer = Trainer(
        accumulation,
        data,
        _schedule(recipe, len(data.train)),
        partial(evaluate_on, recipe, accumulation),
        TrainerSettings(
            epochs=train.epochs,
            effective_batch_size=train.effective_batch_size,
            seed=train.seed,
            eval_every_epochs=train.eval_every_epochs,
            max_steps=train.max_steps,
            detail_every_steps=recipe.runtime.log_every_steps,
            on_nonfinite=train.on_nonfinite,
        ),
    )
    return Experiment(recipe, trainer, model, data, device, images, tuple(notices))


def _correction_parts(recipe: Recipe, world: World) -> int:
    """Parts of an effective batch whose correction is balanced apart; raises UsageError where the processes cannot share them."""
    parts = recipe.norm.correction_parts if isinstance(recipe.norm, BatchlessNormSection) else "auto"
    if parts == "auto":
        return world.size
    if parts % world.size:
        raise UsageError(
            f"norm.correction_parts is {parts}, which {world.size} processes cannot share equally",
            f"Use --set norm.correction_parts={world.size * -(-parts // world.size)}, or as many processes as divide {parts}.",
        )
    return parts


def _graphs(recipe: Recipe, step: AccumulationStep, image_size: int) -> GraphedSteps | None:
    """What replays steps, where they are to be."""
    wanted = recipe.runtime.graphs
    if wanted is True and step.device.type != "cuda":
        raise UsageError("runtime.graphs: true needs CUDA", "Use --set runtime.graphs=auto.")
    if wanted is False or step.device.type != "cuda":
        return None
    if not step.standardized:
        return GraphedSteps(step, image_size, most_pixels=None if wanted is True else MOST_PIXELS)
    if wanted is True:
        raise UsageError(
            "runtime.graphs: true needs standardised convolutions to be folded with their norms",
            "Use --set runtime.graphs=auto, or the norm batchless with norm.fold.",
        )
    return None


def _fuse(model: nn.Module, checked_size: int | None, *, recompute: bool) -> Iterator[str]:
    """Fold norms into convolutions, checked on a random image of a size where one is given; notes those that stay, by reason."""
    example = None
    if checked_size is not None:  # a network that others wrote
        example = torch.randn(1, 3, checked_size, checked_size, generator=torch.Generator().manual_seed(0))
    report = fuse(model, check=example, recompute=recompute)
    by_reason: dict[str, list[str]] = {}
    for name, reason in report.kept.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        yield (
            f"{len(names)} of {len(report.folded) + len(report.kept)} norms are not folded into a convolution and keep a "
            f"tensor of their own: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''} ({reason})."
        )


def build_network(
    recipe: Recipe, *, num_classes: int, image_size: int, initialize: bool
) -> tuple[nn.Module, list[str]]:
    """The network on the CPU, and what the user should know of its trained weights.

    Args:
        initialize: take all weights from model.init, where the recipe has one.

    Raises:
        UsageError: the network cannot be built so.
        CheckpointError: the trained weights of model.init are missing, damaged or of another network.
    """
    torch.manual_seed(recipe.train.seed)
    dtype, notices = machine.weight_dtype(recipe.train.precision), list[str]()
    common: dict[str, Any] = {"norm": _norm(recipe), "image_size": image_size}
    model_name, init = recipe.model.name, recipe.model.init if initialize else None
    shortcut, standardize = recipe.model.shortcut or "A", recipe.weight_standardization
    try:
        if is_foreign(model_name):
            from bln_train.models.library_models import build_foreign_model  # torchvision.models takes long to import

            model, notices = build_foreign_model(
                model_name, num_classes, init=init, dtype=dtype, weight_standardization=standardize, **common
            )
        elif init is not None:
            model, notices = build_trained_model(
                model_name, num_classes, init=init, dtype=dtype, shortcut=shortcut, **common
            )
        else:
            model = build_model(
                model_name,
                num_classes,
                weight_standardization=standardize,
                shortcut=shortcut,
                zero_init_residual=recipe.model.zero_init_residual,
                **common,
            )
    except ValueError as error:
        raise UsageError(f"model {recipe.model.name} with norm {recipe.norm.name}: {error}") from error
    model = model.to(dtype)
    for module in model.modules():
        if isinstance(module, StandardizedConv2d):
            centre_filters(module.weight)  # as training keeps them, folded or not; in the precision of training
    return model, notices


def _norm(recipe: Recipe) -> NormFactory:
    """The factory of the recipe's norm, with the settings of its layers."""
    section = recipe.norm
    if isinstance(section, BatchlessNormSection):
        of_the_run = {"name", "probe_images", "init_images", "fold", "recompute", "correction_parts"}
        settings = section.model_dump(exclude=of_the_run) | {"channel_groups": recipe.channel_groups}
        return norm_factory("batchless", **settings)  # the presets are one layer
    if isinstance(section, PaperNormSection):
        of_optimizer_and_run = {"name", "statistics_rate", "init_images"}
        return norm_factory("paper", **section.model_dump(exclude=of_optimizer_and_run))
    if isinstance(section, GroupNormSection):
        return norm_factory(section.name, num_groups=section.num_groups)
    if isinstance(section, BatchNormSection):
        return norm_factory(section.name, momentum=section.momentum)
    return norm_factory(section.name)


def _why_not_compiled(device: torch.device) -> str:
    """Why folded norms have no compiled kernels on a device; "" if they have, or none are wanted, or there never are any."""
    if device.type == "cuda":
        return why_not_triton(device)
    return why_not_compiled() if device.type == "cpu" else ""


def _notices(recipe: Recipe, data: DataSet, world: World) -> Iterator[str]:
    effective = min(recipe.train.effective_batch_size, len(data.train))
    micro = min(recipe.first_micro_batch_size, -(-effective // world.size))
    if recipe.norm.name == "batch" and recipe.train.micro_batch_size != "auto" and micro < effective:
        yield (
            f"BatchNorm sees {micro} image{'s' * (micro > 1)} at a time, not the effective batch of {effective}: this trains, "
            "but not to what the whole batch would give. norm.name=batchless gives the same result at any micro-batch size"
            f"{' and, with norm.correction_parts, number of processes' * (world.size > 1)}."
        )
    if recipe.train.effective_batch_size > len(data.train):
        yield f"The effective batch is the whole data set: {len(data.train)} images, not {recipe.train.effective_batch_size}."
    if recipe.model.init is not None:
        yield from _notices_of_trained_weights(recipe)
    if recipe.model.init is not None and getattr(recipe.norm, "init_images", None) == DEFAULT_INIT_IMAGES:
        yield "norm.init_images is not used: with model.init the statistics are the trained ones."
    optimizer = recipe.optimizer
    if recipe.accumulates_into_momentum and isinstance(optimizer, SgdSection) and optimizer.clip_norm is not None:
        yield (
            "The update is clipped, not the gradient: gradients gather in the momentum, whose norm is bounded by "
            f"optimizer.clip_norm / (1 - momentum) = {optimizer.clip_norm:g} / (1 - {optimizer.momentum:g})."
        )


def _notices_of_trained_weights(recipe: Recipe) -> Iterator[str]:
    bound = recipe.optimizer.clip_norm
    text = (
        "no bound on the gradient norm"
        if bound is None
        else f"a gradient norm of at most {bound:g} (optimizer.clip_norm)"
    )
    if isinstance(recipe.norm, BatchlessNormSection):
        text = (
            f"statistics that keep to the trained ones (norm.statistics_rate {recipe.norm.statistics_rate:g}) and follow the "
            f"weights by the probe, {text}"
        )
    yield f"Trained weights of model.init: no standardised weights, {text}."


def _optimizer(recipe: Recipe, model: nn.Module, statistics: BatchlessStatistics) -> torch.optim.Optimizer:
    section = recipe.optimizer
    statistics_lr = recipe.norm.statistics_rate if isinstance(recipe.norm, PaperNormSection) else None
    groups = parameter_groups(model, statistics, weight_decay=section.weight_decay, statistics_lr=statistics_lr)
    if isinstance(section, SgdSection):
        settings: dict[str, Any] = {"momentum": section.momentum, "nesterov": section.nesterov}
    else:
        settings = {"betas": section.betas, "eps": section.eps}
    if recipe.accumulates_into_momentum:
        settings = {"momentum": settings["momentum"], "clip_norm": section.clip_norm}
        return build_optimizer(groups, "sgd-into-momentum", section.lr, **settings)
    return build_optimizer(groups, section.name, section.lr, **settings)


def _schedule(recipe: Recipe, num_train: int) -> Schedule:
    section = recipe.schedule
    own: dict[str, Any] = {}
    if isinstance(section, CosineSection):
        own = {"final_fraction": section.final_fraction}
    elif isinstance(section, StepSection):
        own = {"milestones": section.milestones, "gamma": section.gamma}
    return Schedule(
        section.name,
        steps_per_epoch=-(-num_train // recipe.train.effective_batch_size),
        epochs=recipe.train.epochs,
        warmup_epochs=section.warmup_epochs,
        **own,
    )
