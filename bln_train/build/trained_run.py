"""A run's checkpoint with its recipe, read back to be evaluated or exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bln_train.build.experiment import build_experiment
from bln_train.errors import CheckpointError, RecipeError, UsageError
from bln_train.norm.calibrate.likelihood import layer_likelihoods
from bln_train.norm.fused.network import unfuse
from bln_train.recipe.load import parse_recipe
from bln_train.recipe.norms import BatchlessNormSection
from bln_train.recipe.paper_norm import PaperNormSection
from bln_train.recipe.recipe import Recipe
from bln_train.runs.checkpoint import Found, find_checkpoint, load_checkpoint
from bln_train.train.evaluate import Evaluation


def read_checkpoint(
    path: Path, device: str | None = None, notify: Callable[[str], None] = lambda text: None
) -> tuple[Recipe, dict[str, Any]]:
    """A run folder's or a file's checkpoint with its recipe, on `device` if one is named; executes nothing from the file.

    Args:
        notify: is told of damaged checkpoints of a folder, and which one is taken in their place.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    found = find_checkpoint(path) if path.is_dir() else Found(path, load_checkpoint(path), [])
    file, state = found.file, found.state
    for notice in found.notices:
        notify(notice)
    text = state.get("recipe")
    if not isinstance(text, str):
        raise CheckpointError(f"{file} carries no recipe")
    origin = f"{file} (recipe)"
    try:
        recipe = parse_recipe(text, origin=origin)
    except RecipeError as error:
        raise CheckpointError(f"{file} carries a damaged recipe: {error.problem}") from error
    return (parse_recipe(text, origin=origin, overrides=[f"runtime.device={device}"]) if device else recipe), state


def evaluate_checkpoint(
    path: Path,
    device: str | None = None,
    *,
    layers: bool = False,
    notify: Callable[[str], None] = lambda text: None,
) -> tuple[Recipe, Evaluation, int]:
    """Evaluate a run folder's or a file's checkpoint on its recipe's test images; executes nothing from the file.

    Args:
        layers: take each batchless layer's likelihood too, in a second evaluation, not folded.
        notify: see `read_checkpoint`.

    Returns: the recipe, the evaluation, and the step of the checkpoint.

    Raises:
        CheckpointError: there is none, or it is damaged.
        UsageError: `layers` of a network whose norms have no likelihood.
    """
    recipe, state = read_checkpoint(path, device, notify)
    if layers and not isinstance(recipe.norm, BatchlessNormSection | PaperNormSection):
        raise UsageError(f"--layers: norm {recipe.norm.name} has no likelihood; batchless norms have", "Leave it out.")
    experiment = build_experiment(recipe, initialize=False)
    experiment.trainer.load_state_dict(state)
    trainer = experiment.trainer
    found = trainer.evaluate(trainer.data.test)
    if layers:
        unfuse(experiment.model)  # a folded norm's input is in no tensor
        with layer_likelihoods(experiment.model) as nll_by_layer:
            trainer.evaluate(trainer.data.test)
        found = found._replace(nll_by_layer=nll_by_layer)
    return recipe, found, trainer.num_steps_done
