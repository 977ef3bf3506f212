"""Event files for TensorBoard in a run folder, with the records of its metrics.jsonl. torch is imported when one is opened.

train/...            loss, accuracy, nll, learning_rate, grad_norm or update_norm, images_per_second: of each logged step
epoch/...            what training saw of a whole epoch
validation/, test/   loss, accuracy
memory_mib/...       the peak and its parts
layer_nll/...        of each batchless layer, where a step's record has it
layer_mean/..., layer_log_std/...   histograms over channels, at the end of each epoch
notices              notices to the user, as text
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from bln_train.errors import RunFolderError, UsageError
from bln_train.recipe.recipe import Recipe
from bln_train.records import EpochRecord, MemoryRecord, NoticeRecord, Record, StepRecord
from bln_train.runs.folder import RunFolder

_SECONDS_BETWEEN_WRITES = 30


def require_tensorboard(recipe: Recipe) -> None:
    """Raises UsageError where the recipe wants TensorBoard's files and the package is missing; imports nothing."""
    if recipe.logging.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UsageError(
            "logging.tensorboard: the package tensorboard is not installed",
            "Install it: pip install 'bln-train[tensorboard]', or leave it out: --set logging.tensorboard=false",
        )


@contextmanager
def open_board(
    recipe: Recipe, folder: RunFolder, layers: Mapping[str, Any], resumed_at: int | None
) -> Iterator[Board | None]:
    """A board that has what the folder's metrics have, None where the recipe wants none; all is written when it is left.

    Args:
        layers: batchless norms by name.
        resumed_at: step of the checkpoint from which the run goes on, None for one that begins.

    Raises:
        UsageError: TensorBoard is not installed.
        RunFolderError: the files cannot be written.
    """
    if not recipe.logging.tensorboard:
        yield None
        return
    require_tensorboard(recipe)
    # A killed run may have written steps that come again, and an epoch's end has the number of its last step. So records of the
    # checkpoint's step and later ones count as not written, and are written from the metrics. Without a board before, all are.
    from_step = resumed_at if resumed_at is not None and folder.event_files() else None
    board = Board(folder, layers, from_step)
    try:
        board.catch_up(folder.records(), 0 if from_step is None else from_step, resumed_at or 0)
        yield board
    finally:
        board.close()


class Board:
    """Writes records as TensorBoard's scalars, texts and histograms; numbers are rounded to float32, as it keeps them."""

    def __init__(self, folder: RunFolder, layers: Mapping[str, Any], from_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder, self._layers = folder, layers
        with self._explained():
            self._writer = SummaryWriter(
                str(folder.path), purge_step=from_step, max_queue=1000, flush_secs=_SECONDS_BETWEEN_WRITES
            )
        self._step = 0  # of the last record that has a step; a memory record has none
        self._memory: MemoryRecord | None = None

    def catch_up(self, records: Iterable[Record], from_step: int, step: int) -> None:
        """Add what was recorded from a step on; the layers are now as they were at `step`."""
        for record in records:
            self._step = getattr(record, "step", self._step)
            if self._step >= from_step:
                self.add(record, with_layers=self._step == step)

    def add(self, record: Record, *, with_layers: bool = True) -> None:
        """Add a record, at the end of an epoch with histograms of the layers as they are."""
        with self._explained():
            self._add(record, with_layers)

    def _add(self, record: Record, with_layers: bool) -> None:
        self._step = getattr(record, "step", self._step)
        if isinstance(record, StepRecord):
            names = ("loss", "accuracy", "nll", "learning_rate", "grad_norm", "update_norm")
            self._scalars("train", {name: getattr(record, name) for name in names})
            self._scalars("train", {"images_per_second": record.num_images / record.seconds})
            self._scalars("layer_nll", record.nll_by_layer or {})
        elif isinstance(record, EpochRecord):
            self._scalars("epoch", {"loss": record.train_loss, "accuracy": record.train_accuracy})
            self._scalars("epoch", {"images_per_second": record.images_per_second})
            self._scalars("epoch", {"num_skipped_steps": record.num_skipped_steps})
            self._scalars("validation", {"loss": record.validation_loss, "accuracy": record.validation_accuracy})
            self._scalars("test", {"loss": record.test_loss, "accuracy": record.test_accuracy})
            if with_layers:
                self._histograms()
        elif isinstance(record, MemoryRecord):
            if record != self._memory:  # a run may end with the same record again
                sizes = {key.removesuffix("_bytes"): n for key, n in asdict(record).items() if key.endswith("_bytes")}
                self._scalars("memory_mib", {key: None if n is None else n / 2**20 for key, n in sizes.items()})
            self._memory = record
        elif isinstance(record, NoticeRecord):
            self._writer.add_text("notices", record.text, self._step)

    def _scalars(self, group: str, values: Mapping[str, float | None]) -> None:
        for name, value in values.items():
            if value is not None and math.isfinite(value):
                self._writer.add_scalar(f"{group}/{name}", value, self._step)

    def _histograms(self) -> None:
        for name, layer in self._layers.items():
            self._writer.add_histogram(f"layer_mean/{name}", layer.mean.detach(), self._step)
            self._writer.add_histogram(f"layer_log_std/{name}", layer.std.detach().log(), self._step)

    def flush(self) -> None:
        """Bring everything to the files; before a checkpoint is saved, or a resumed run would leave a gap."""
        with self._explained():
            self._writer.flush()

    def close(self) -> None:
        """Flush, and close the files."""
        with self._explained():
            self._writer.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunFolderError(
                f"cannot write TensorBoard's files in {self._folder.path}: {error.strerror or error}",
                "Free some space, then go on with --resume; the last checkpoint is intact.",
            ) from error
