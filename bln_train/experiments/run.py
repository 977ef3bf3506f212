"""Run a recipe into a run folder: build, train, log, save, and stop without losing anything."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from bln_train.build.experiment import Experiment
from bln_train.errors import DivergedError, InterruptedRunError
from bln_train.experiments.open_run import OpenedRun, open_run
from bln_train.experiments.run_log import RunLog
from bln_train.plan.micro_batch import planned_advice
from bln_train.recipe.recipe import Recipe
from bln_train.records import Record
from bln_train.runs.checkpoint_policy import CheckpointPolicy
from bln_train.runs.folder import RECIPE, RunFolder
from bln_train.runs.tensorboard import require_tensorboard
from bln_train.system import machine
from bln_train.system.lock import locked
from bln_train.system.signals import StopRequested, never, stop_requests, write_now
from bln_train.train.distributed import World, joined
from bln_train.train.recovery import explained_failures

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
        resume: go on from the folder's checkpoint, bit for bit. A run stopped before its first checkpoint begins anew; of a
            finished run the summary is returned as it is.
        listen: is called with every record.
        announce: is called once, when everything is built and before the first step.
        say_stopping: is told of a stop that is under way, while its signal is handled: it may not print.

    Raises:
        BlnError: of the kind that says what is wrong; on InterruptedRunError the state has been saved.
    """
    require_tensorboard(recipe)
    with _processes(recipe, folder, resume=resume) as world:
        if world.rank:  # rank 0 speaks for all
            listen, announce, say_stopping = _ignore, _ignore, write_now
        opened = open_run(recipe, folder, world, name=name, resume=resume)
        if opened.finished is not None:
            return opened.finished
        announce(opened.experiment)
        trainer, log = opened.experiment.trainer, RunLog(opened, listen)
        policy = CheckpointPolicy(opened.recipe.runtime.checkpoint_every_steps)
        with (
            stop_requests(lambda: say_stopping(_STOPPING)) as world.stop_asked,
            planned_advice(opened.recipe, opened.experiment),
            explained_failures(opened.recipe.first_micro_batch_size),
            _kept_state(folder, log),
            log.board(),
        ):
            try:
                for record in trainer.steps(world.stop_asked if world.size == 1 else never):
                    log.add(record)
                    if policy.is_due(record):
                        log.save()
                        policy.saved()
                    if world.should_stop:
                        raise StopRequested
            except StopRequested:
                log.save()
                world.barrier()  # or torchrun, seeing a process end, would end the one that saves
                raise _interrupted(opened) from None
        return log.finish()


def _ignore(news: Record | Experiment) -> None:
    """Tell nobody."""


@contextmanager
def _processes(recipe: Recipe, folder: RunFolder, *, resume: bool) -> Iterator[World]:
    """The processes that share the run, with its folder checked and locked by rank 0."""
    with joined(machine.resolve_device(recipe.runtime.device), recipe.runtime.process_timeout_seconds) as world:
        if world.rank:
            yield world
            return
        folder.check_usable(recipe, resume=resume)
        with locked(folder.path):
            folder.check_usable(recipe, resume=resume)  # another process may have been here in between
            yield world


def _interrupted(opened: OpenedRun) -> InterruptedRunError:
    trainer, path = opened.experiment.trainer, opened.folder.path
    # The folder's recipe, not the name: it holds every override of this run.
    command = ["bln-train", "run", str(path / RECIPE), "--out", str(path), "--resume"]
    return InterruptedRunError(
        f"stopped after step {trainer.num_steps_done} of {trainer.num_steps}; the state is saved",
        f"Go on with: {shlex.join(command)}",
    )


@contextmanager
def _kept_state(folder: RunFolder, log: RunLog) -> Iterator[None]:
    """Say, when training diverges, what is still there: the last checkpoint, which is of a step before."""
    try:
        yield
    except DivergedError as error:
        kept = "No checkpoint had been written yet."
        if log.saved_step is not None:
            recipe, out = (shlex.quote(str(path)) for path in (folder.path / RECIPE, folder.path))
            kept = (
                f"{folder.checkpoint} is of step {log.saved_step}, before that. To go on from there without such steps:\n"
                f"bln-train run {recipe} --out {out} --resume --set train.on_nonfinite=skip"
            )
        raise DivergedError(error.problem, f"{error.hint}\n{kept}") from error
