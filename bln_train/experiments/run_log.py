"""What a run keeps of its records: metrics, TensorBoard, checkpoints, and the summary."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from statistics import median
from typing import Any

from bln_train.build import runtime
from bln_train.experiments.open_run import OpenedRun
from bln_train.recipe.load import dump_recipe
from bln_train.records import EpochRecord, MemoryRecord, NoticeRecord, Record, StepRecord, best_validation
from bln_train.runs.checkpoint import keep_checkpoint
from bln_train.runs.tensorboard import Board, open_board


class RunLog:
    """Writes a run's records and states, in rank 0 alone, and remembers what the summary needs, in each process.

    Args:
        opened: the run, before its next step.
        listen: is called with every record.

    Attributes:
        saved_step: of the last checkpoint, None before the first.
    """

    def __init__(self, opened: OpenedRun, listen: Callable[[Record], None]) -> None:
        self.opened, self.listen = opened, listen
        self.trainer, self.recipe, self.folder = opened.experiment.trainer, opened.recipe, opened.folder
        self.saved_step = opened.resumed_at
        self._board: Board | None = None
        for text in opened.notices:
            listen(NoticeRecord(text))
            if opened.writes and opened.resumed_at is None:
                self.folder.append(NoticeRecord(text))
        self._epochs = [r for r in self.folder.records() if isinstance(r, EpochRecord)]
        self._memory = self.folder.last_memory() or self.trainer.memory_record()
        self._began = time.monotonic()

    @contextmanager
    def board(self) -> Iterator[None]:
        """Inside, records go to TensorBoard too, where the recipe asks for it."""
        if not self.opened.writes:
            yield
            return
        layers = self.trainer.accumulation.statistics.layers
        with open_board(self.recipe, self.folder, layers, self.opened.resumed_at) as self._board:
            yield

    def add(self, record: Record) -> None:
        """Keep a record; most steps only where `runtime.log_every_steps` says so."""
        if isinstance(record, MemoryRecord):
            if record.peak_bytes is None and self._memory.peak_bytes is not None:
                return  # resumed after the last step: there was nothing to measure
            self._memory = record
        often = isinstance(record, StepRecord) and record.nll_by_layer is None
        if self.opened.writes and not (often and self.trainer.num_steps_done % self.recipe.runtime.log_every_steps):
            self.folder.append(record)
            if self._board is not None:
                self._board.add(record)
        self.listen(record)
        if isinstance(record, EpochRecord):
            self._epochs.append(record)

    def save(self) -> None:
        """Write a checkpoint of the state that training has now."""
        if self.opened.writes:
            self.folder.sync()
            if self._board is not None:
                self._board.flush()
            fixed = {
                "recipe": dump_recipe(self.recipe),
                "name": self.opened.name,
                "input": asdict(self.opened.experiment.input),
                "world_size": self.opened.world.size,
            }
            state = {**fixed, **self.trainer.state_dict()}
            keep_checkpoint(self.folder.path, state, self.recipe.runtime.keep_checkpoints)
        self.saved_step = self.trainer.num_steps_done

    def finish(self) -> dict[str, Any]:
        """Write the end result, and return it."""
        summary = self._summary()
        if self.opened.writes:
            self.folder.finish(summary)
        return summary

    def _summary(self) -> dict[str, Any]:
        recipe, experiment = self.recipe, self.opened.experiment
        speeds = [e.images_per_second for e in self._epochs if e.images_per_second]
        last = self._epochs[-1] if self._epochs else None
        return {
            "name": self.opened.name,
            "model": recipe.model.name,
            "norm": recipe.norm.name,
            "data": experiment.data.source,
            "seed": recipe.train.seed,
            "steps": self.trainer.num_steps_done,
            "epochs": last.epoch if last else 0,
            "train_loss": last.train_loss if last else None,
            "train_accuracy": last.train_accuracy if last else None,
            "test_loss": last.test_loss if last else None,
            "test_accuracy": last.test_accuracy if last else None,
            "num_test_images": last.num_test_images if last else 0,
            **best_validation(self._epochs),
            "images_per_second": median(speeds) if speeds else None,
            "seconds": time.monotonic() - self._began,
            "memory": asdict(self._memory),
            "environment": runtime.environment(experiment.device),
        }
