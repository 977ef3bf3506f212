"""Opening a run: its folder, the recipe as it was begun, and the experiment, in the state of its last checkpoint."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import torch

from bln_train.build import runtime
from bln_train.build.experiment import Experiment, build_experiment
from bln_train.errors import UsageError
from bln_train.plan.micro_batch import choose_micro_batch
from bln_train.recipe.recipe import Recipe
from bln_train.recipe.resolve import as_begun, resolved
from bln_train.runs.checkpoint import Found, find_checkpoint
from bln_train.runs.checkpoint_files import go_on_from, has_checkpoint
from bln_train.runs.folder import METRICS, RunFolder
from bln_train.train.distributed import World, fingerprint
from bln_train.train.recovery import explained_failures


@dataclass(frozen=True)
class OpenedRun:
    """A run that is ready for its next step."""

    recipe: Recipe
    """With a number in the place of each `auto`."""
    name: str
    """What the summary calls the recipe; a resumed run keeps the name it began with."""
    folder: RunFolder
    world: World
    experiment: Experiment
    resumed_at: int | None = None
    """The step of the checkpoint from which the run goes on; None for one that begins."""
    notices: tuple[str, ...] = field(default=())
    """Messages to the user before training."""
    finished: dict[str, Any] | None = None
    """The summary of a run that has nothing left to train."""

    @property
    def writes(self) -> bool:
        """Whether this process writes the folder: rank 0 alone does."""
        return self.world.rank == 0


def open_run(recipe: Recipe, folder: RunFolder, world: World, *, name: str, resume: bool) -> OpenedRun:
    """Build what `recipe` says and prepare `folder`, which rank 0 has checked and locked.

    Raises:
        BlnError: of the kind that says what is wrong.
    """
    world.barrier()  # a folder that rank 0 refuses is not read
    found = find_checkpoint(folder.path) if resume and has_checkpoint(folder.path) else None
    if resume and folder.holds_run:
        recipe = as_begun(recipe, folder.recipe())
    with explained_failures(recipe.first_micro_batch_size):
        experiment = build_experiment(recipe, initialize=found is None, world=world)
    recipe, trainer = experiment.recipe, experiment.trainer
    if found is not None:
        trainer.load_state_dict(found.state)
        check_same_batchnorm(recipe, found.state, world)
        name = str(found.state.get("name", name))
        summary = folder.summary()
        if summary is not None and trainer.num_steps_done == trainer.num_steps:
            return OpenedRun(recipe, name, folder, world, experiment, finished=summary)
    with explained_failures(recipe.first_micro_batch_size):
        said = choose_micro_batch(recipe, experiment, at_most=None if found is None else _that_fitted(recipe, found))
    notices = [*experiment.notices, *([said] if said else [])]
    accumulation = trainer.accumulation
    recompute = all(layer.recompute for layer in accumulation.folded)
    recipe = resolved(recipe, micro_batch_size=accumulation.micro_batch_size, recompute=recompute)
    begin_together(world, recipe, experiment)
    if found is None and recipe.model.init is not None:
        with explained_failures(recipe.first_micro_batch_size):
            notices.append(_before_training(experiment))
    resumed_at = None if found is None else trainer.num_steps_done
    if world.rank == 0:
        if found is None:
            folder.create(recipe, runtime.environment(experiment.device))
        else:
            notices += _go_on(recipe, folder, found, epoch_is_open=trainer.epoch_is_open)
    return OpenedRun(recipe, name, folder, world, experiment, resumed_at, tuple(notices))


def _go_on(recipe: Recipe, folder: RunFolder, found: Found, *, epoch_is_open: bool) -> list[str]:
    """Bring the folder back to the checkpoint that was found; returns messages about it."""
    news = list(found.notices)
    step = found.state["step"]
    folder.reopen()
    num_damaged = folder.cut_back(step, epoch_is_open=epoch_is_open)
    if num_damaged:
        news.append(f"{folder.path / METRICS} had {num_damaged} damaged lines before step {step}, which are gone")
    folder.keep_recipe(recipe)
    go_on_from(folder.path, found.file, step)
    return news


def _that_fitted(recipe: Recipe, found: Found) -> int | None:
    """The micro-batch below which an automatic one has to stay, because memory ran out above it before."""
    used, asked = found.state["micro_batch_size"], found.state["asked_micro_batch_size"]
    return int(used) if recipe.train.micro_batch_size == "auto" and used < asked else None


def _before_training(experiment: Experiment) -> str:
    """Loss and accuracy of trained weights, which a fine-tuning run has to improve on."""
    data = experiment.data
    name, images = ("test", data.test) if data.validation is None else ("validation", data.validation)
    found = experiment.trainer.evaluate(images)
    return (
        f"With the weights of model.init, before the first step: {name} loss {found.loss:.4f}, "
        f"accuracy {100 * found.accuracy:.2f} % over {found.num_images} images."
    )


def begin_together(world: World, recipe: Recipe, experiment: Experiment) -> None:
    """Let every process begin from rank 0's tensors.

    Raises:
        UsageError: the processes do not have the same recipe, images or state.
    """
    if world.size == 1:
        return
    step, train = experiment.trainer.accumulation, experiment.data.train
    world.check_equal(
        {
            "recipe": zlib.crc32(recipe.model_dump_json(exclude={"runtime", "logging"}).encode()),
            "training images": fingerprint([train.images, train.labels]),
            "steps in their checkpoint": experiment.trainer.num_steps_done,
            "images in the probe (norm.probe_images)": step.probe_images,
        }
    )
    optimizer = [v for state in step.optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    tensors = [*step.model.parameters(), *step.model.buffers(), *optimizer]
    world.broadcast_(tensor for tensor in tensors if tensor.is_floating_point())


def check_same_batchnorm(recipe: Recipe, state: dict[str, Any], world: World) -> None:
    """Raises UsageError where a resumed BatchNorm would see other images at once than before."""
    before = state.get("world_size", 1)
    if recipe.norm.name == "batch" and before != world.size:
        raise UsageError(
            f"this run was begun with {before} process{'es' * (before > 1)}, and BatchNorm's result depends on their number",
            f"Go on with torchrun --nproc-per-node {before}." if before > 1 else "Go on without torchrun.",
        )
