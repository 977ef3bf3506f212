"""Run a recipe into a run folder: build, train, log, save, and stop without losing anything."""

from __future__ import annotations

import shlex
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bln_train.build import runtime
from bln_train.build.data import eval_batch_size
from bln_train.build.experiment import Experiment, build_experiment
from bln_train.errors import CheckpointError, DivergedError, InterruptedRunError, RecipeError, UsageError
from bln_train.norm.calibrate.likelihood import layer_likelihoods
from bln_train.norm.fused.network import unfuse
from bln_train.plan.micro_batch import planned_advice, settle_micro_batch
from bln_train.recipe.load import dump_recipe, parse_recipe_of_run
from bln_train.recipe.norms import BatchlessNormSection
from bln_train.recipe.recipe import Recipe
from bln_train.recipe.resolve import as_begun, resolve_batch_sizes
from bln_train.records import EpochRecord, MemoryRecord, NoticeRecord, Record, StepRecord, best_validation
from bln_train.runs.checkpoint import Found, find_checkpoint, keep_checkpoint, load_checkpoint
from bln_train.runs.checkpoint_list import has_checkpoint, settle
from bln_train.runs.folder import METRICS, RECIPE, RunFolder
from bln_train.runs.tensorboard import open_board, require_tensorboard
from bln_train.system import machine
from bln_train.system.lock import locked
from bln_train.system.signals import StopRequested, never, stop_requests, write_now
from bln_train.train.distributed import World, fingerprint, joined
from bln_train.train.evaluate import Evaluation
from bln_train.train.recovery import explained_failures

SECONDS_BETWEEN_CHECKPOINTS = 300.0
_STOPPING = "stopping; the last whole step's state will be saved. Ctrl-C again leaves at once"


def run(
    recipe: Recipe,
    folder: RunFolder,
    *,
    name: str,
    resume: bool = False,
    listen: Callable[[Record], None] = lambda record: None,
    announce: Callable[[Experiment], None] = lambda experiment: None,
    say_stopping: Callable[[str], None] = write_now,
) -> dict[str, Any]:
    """Train `recipe` to its end and return the summary that the folder keeps.

    Args:
        name: what the summary calls the recipe; a resumed run keeps the name it began with.
        resume: go on from the folder's checkpoint, bit for bit; a run stopped before its first one begins anew, and of one
            that is finished the summary is returned as it is.
        listen: is called with every record.
        announce: is called once, when everything is built and before the first step.
        say_stopping: is told of a stop that is under way, while its signal is handled: it may not print.

    Raises:
        BlnError: of the kind that says what is wrong; on InterruptedRunError the state has been saved.
    """
    require_tensorboard(recipe)
    with joined(machine.resolve_device(recipe.runtime.device), recipe.runtime.process_timeout_seconds) as world:
        if world.rank:
            return _run(world, recipe, folder, name, resume, lambda record: None, lambda experiment: None, write_now)
        folder.check_usable(recipe, resume=resume)
        with locked(folder.path):
            folder.check_usable(recipe, resume=resume)  # another process may have been here in between
            return _run(world, recipe, folder, name, resume, listen, announce, say_stopping)


def _run(
    world: World,
    recipe: Recipe,
    folder: RunFolder,
    name: str,
    resume: bool,
    listen: Callable[[Record], None],
    announce: Callable[[Experiment], None],
    say_stopping: Callable[[str], None],
) -> dict[str, Any]:
    """`run` in one of the processes that share it; rank 0 alone writes."""
    writes = world.rank == 0
    world.barrier()  # a folder that rank 0 refuses is not read
    found = find_checkpoint(folder.path) if resume and has_checkpoint(folder.path) else None
    if resume and folder.holds_run:
        recipe = as_begun(recipe, folder.recipe())
    with explained_failures(recipe.first_micro_batch_size):
        experiment = build_experiment(recipe, initialize=found is None, world=world)
    recipe, trainer = experiment.recipe, experiment.trainer
    news: list[str] = []
    if found is not None:
        trainer.load_state_dict(found.state)
        _check_same_batchnorm(recipe, found.state, world)
        name = str(found.state.get("name", name))
        summary = folder.summary()
        if summary is not None and trainer.num_steps_done == trainer.num_steps:
            return summary  # it was finished: nothing to compute, nothing to overwrite
    with explained_failures(recipe.first_micro_batch_size):
        notices = [*experiment.notices, *_settle(recipe, experiment, None if found is None else found.state)]
    micro = trainer.accumulation.micro_batch_size
    recipe = resolve_batch_sizes(recipe, micro_batch_size=micro, eval_batch_size=eval_batch_size(recipe, micro))
    begin_together(world, recipe, experiment)
    if found is None and recipe.model.init is not None:
        with explained_failures(recipe.first_micro_batch_size):
            notices.append(_as_it_begins(experiment))
    if writes and found is not None:
        news = _go_on(recipe, folder, found, epoch_is_open=trainer.epoch_is_open)
    elif writes:
        folder.create(recipe, runtime.environment(experiment.device))
    resumed = found is not None
    del found  # or its tensors would stay beside the network's
    fixed = {
        "recipe": dump_recipe(recipe),
        "name": name,
        "input": asdict(experiment.input),
        "world_size": world.size,
    }

    saved_step = resumed_at = trainer.num_steps_done if resumed else None

    def save() -> None:
        nonlocal saved_step
        if writes:
            folder.sync()
            if board is not None:
                board.flush()
            keep_checkpoint(folder.path, {**fixed, **trainer.state_dict()}, recipe.runtime.keep_checkpoints)
        saved_step = trainer.num_steps_done

    announce(experiment)
    for text in [*notices, *news]:
        listen(NoticeRecord(text))
        if writes and not resumed:
            folder.append(NoticeRecord(text))
    epochs = [r for r in folder.records() if isinstance(r, EpochRecord)]
    memory = folder.last_memory() or trainer.memory_record()
    layers = trainer.accumulation.statistics.layers
    last_saved = began = time.monotonic()
    with (
        stop_requests(lambda: say_stopping(_STOPPING)) as world.stop_asked,
        planned_advice(recipe, experiment),
        explained_failures(recipe.first_micro_batch_size),
        kept_state(folder, lambda: saved_step),
        open_board(recipe, folder, layers, resumed_at) if writes else nullcontext() as board,
    ):
        try:
            for record in trainer.steps(world.stop_asked if world.size == 1 else never):
                if isinstance(record, MemoryRecord):
                    if record.peak_bytes is None and memory.peak_bytes is not None:
                        continue  # resumed after the last step: there was nothing to measure
                    memory = record
                often = isinstance(record, StepRecord) and record.nll_by_layer is None
                if writes and not (often and trainer.num_steps_done % recipe.runtime.log_every_steps):
                    folder.append(record)
                    if board is not None:
                        board.add(record)
                listen(record)
                if isinstance(record, EpochRecord):
                    epochs.append(record)
                every = recipe.runtime.checkpoint_every_steps
                due = isinstance(record, StepRecord) and (
                    (every is not None and record.step % every == 0)
                    or time.monotonic() - last_saved > SECONDS_BETWEEN_CHECKPOINTS
                )
                if due or isinstance(record, EpochRecord):
                    save()
                    last_saved = time.monotonic()
                if world.should_stop:
                    raise StopRequested
        except StopRequested:
            save()
            world.barrier()  # or torchrun, seeing a process end, would end the one that saves
            # The folder's recipe, not `name`: it holds every override of this run.
            command = ["bln-train", "run", str(folder.path / RECIPE), "--out", str(folder.path), "--resume"]
            raise InterruptedRunError(
                f"stopped after step {trainer.num_steps_done} of {trainer.num_steps}; the state is saved",
                f"Go on with: {shlex.join(command)}",
            ) from None
    summary = _summary(recipe, name, experiment, epochs, memory, time.monotonic() - began)
    if writes:
        folder.finish(summary)
    return summary


def _go_on(recipe: Recipe, folder: RunFolder, found: Found, *, epoch_is_open: bool) -> list[str]:
    """Bring the folder back to the checkpoint that was found; returns what has to be said about that."""
    news = list(found.notices)
    step = found.state["step"]
    folder.reopen()
    num_damaged = folder.cut_back(step, epoch_is_open=epoch_is_open)
    if num_damaged:
        news.append(f"{folder.path / METRICS} had {num_damaged} damaged lines before step {step}, which are gone")
    folder.keep_recipe(recipe)
    settle(folder.path, found.file, step)
    return news


def _settle(recipe: Recipe, experiment: Experiment, state: dict[str, Any] | None) -> list[str]:
    """Resolve an automatic micro-batch, for a run that goes on with what it found out before; what has to be said about it."""
    used, asked = (
        (None, None) if state is None else (state.get("micro_batch_size"), state.get("asked_micro_batch_size"))
    )
    is_auto = recipe.train.micro_batch_size == "auto"
    ran_out = used is not None and asked is not None and used < asked
    text = settle_micro_batch(
        recipe, experiment, at_most=int(used) if is_auto and used is not None and ran_out else None
    )
    return [text] if text else []


def _as_it_begins(experiment: Experiment) -> str:
    """What trained weights are worth before the first step: a fine-tuning run has that to keep."""
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


def _check_same_batchnorm(recipe: Recipe, state: dict[str, Any], world: World) -> None:
    """Raises UsageError where a resumed BatchNorm would see other images at once than before."""
    before = state.get("world_size", 1)
    if recipe.norm.name == "batch" and before != world.size:
        raise UsageError(
            f"this run was begun with {before} process{'es' * (before > 1)}, and BatchNorm's result depends on their number",
            f"Go on with torchrun --nproc-per-node {before}." if before > 1 else "Go on without torchrun.",
        )


def _summary(
    recipe: Recipe,
    name: str,
    experiment: Experiment,
    epochs: list[EpochRecord],
    memory: MemoryRecord,
    seconds: float,
) -> dict[str, Any]:
    speeds = [e.images_per_second for e in epochs if e.images_per_second]
    last = epochs[-1] if epochs else None
    return {
        "name": name,
        "model": recipe.model.name,
        "norm": recipe.norm.name,
        "data": experiment.data.source,
        "seed": recipe.train.seed,
        "steps": experiment.trainer.num_steps_done,
        "epochs": last.epoch if last else 0,
        "train_loss": last.train_loss if last else None,
        "train_accuracy": last.train_accuracy if last else None,
        "test_loss": last.test_loss if last else None,
        "test_accuracy": last.test_accuracy if last else None,
        "num_test_images": last.num_test_images if last else 0,
        **best_validation(epochs),
        "images_per_second": median(speeds) if speeds else None,
        "seconds": seconds,
        "memory": asdict(memory),
        "environment": runtime.environment(experiment.device),
    }


@contextmanager
def kept_state(folder: RunFolder, saved_step: Callable[[], int | None]) -> Iterator[None]:
    """Say, when training diverges, what is still there: the checkpoint, which no step after the bad one has touched."""
    try:
        yield
    except DivergedError as error:
        step = saved_step()
        kept = "No checkpoint had been written yet."
        if step is not None:
            recipe, out = (shlex.quote(str(path)) for path in (folder.path / RECIPE, folder.path))
            kept = (
                f"{folder.checkpoint} is of step {step}, before that. To go on from there without such steps:\n"
                f"bln-train run {recipe} --out {out} --resume --set train.on_nonfinite=skip"
            )
        raise DivergedError(error.problem, f"{error.hint}\n{kept}") from error


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
        recipe = parse_recipe_of_run(text, origin=origin)
    except RecipeError as error:
        raise CheckpointError(f"{file} carries a damaged recipe: {error.problem}") from error
    return (
        parse_recipe_of_run(text, origin=origin, overrides=[f"runtime.device={device}"]) if device else recipe
    ), state


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
    if layers and not isinstance(recipe.norm, BatchlessNormSection):
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
