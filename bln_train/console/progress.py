"""Progress on stderr: a live view on a terminal, plain lines in a pipe or a log. No torch here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.text import Text

from bln_train.console.live import Figures, Pace, RunView, ShareView, can_draw, drawn
from bln_train.console.output import say, talk
from bln_train.records import EpochRecord, MemoryRecord, NoticeRecord, Record, StepRecord
from bln_train.system.signals import write_now
from bln_train.system.units import format_bytes, format_number, format_percent, format_seconds

_PLAIN_LINE_SECONDS = 15.0

CellListener = Callable[[float, Record], None]


class Progress(Protocol):
    """Shows a run's records as they come."""

    def __call__(self, record: Record) -> None:
        """Take a record in; waits for nothing but the printing of a line."""

    def stopping(self, text: str) -> None:
        """Say that a stop is under way; may be called while a signal is handled."""


class CellProgress(Protocol):
    """Shows the cells of a grid one after the other."""

    def __call__(self, n: int, name: str) -> CellListener:
        """Begin with cell `n`, counted from 0; gives what takes its records, each with the share of it that is done."""

    def stopping(self, text: str) -> None:
        """Say that a stop is under way; may be called while a signal is handled."""


@contextmanager
def show_progress(num_steps: int, first_step: int = 0, limit_bytes: int | None = None) -> Iterator[Progress]:
    """A live view on a terminal; elsewhere a line at each epoch, and one every quarter of a minute.

    Args:
        first_step: what a resumed run has done already.
        limit_bytes: what the peak is held against.
    """
    if not can_draw(talk):
        yield _PlainRun(num_steps, first_step)
        return
    run = _LiveRun(num_steps, first_step, limit_bytes)
    with drawn(run.view, talk):
        yield run


class _Run:
    """Figures and pace of a run, from its records."""

    def __init__(self, num_steps: int, first_step: int) -> None:
        self.num_steps = num_steps
        self.figures, self.pace = Figures(), Pace()
        self.figures.step = first_step
        self.pace.reach(first_step / num_steps)

    def __call__(self, record: Record) -> None:
        if isinstance(record, StepRecord):
            self.figures.add(record)
            self.pace.reach(record.step / self.num_steps)
            self.after_step()
            return
        if isinstance(record, MemoryRecord):
            self.figures.memory = record
            self.pace.restart()  # the steps before were slowed by memory tracking
        for line in _lines(record):
            say(line)

    def after_step(self) -> None:
        """Nothing, where a thread draws."""


class _LiveRun(_Run):
    def __init__(self, num_steps: int, first_step: int, limit_bytes: int | None) -> None:
        super().__init__(num_steps, first_step)
        self.view = RunView(self.figures, self.pace, num_steps, limit_bytes)
        self.stopping = self.view.stopping


class _PlainRun(_Run):
    def __init__(self, num_steps: int, first_step: int) -> None:
        super().__init__(num_steps, first_step)
        self._last = time.monotonic()

    def after_step(self) -> None:
        now, figures = time.monotonic(), self.figures
        if now - self._last >= _PLAIN_LINE_SECONDS:
            self._last = now
            say(
                f"step {figures.step}/{self.num_steps}  loss {figures.loss:.3f}  {100 * figures.accuracy:.1f} %  "
                f"{figures.speed:.0f} images/s  {format_bytes(figures.peak_bytes)}  "
                f"{format_seconds(self.pace.seconds_left())} left"
            )

    def stopping(self, text: str) -> None:
        write_now(text)


def _lines(record: Record) -> Iterator[Text]:
    if isinstance(record, NoticeRecord):
        yield Text.assemble(("note:", "yellow"), f" {record.text}")
    elif isinstance(record, EpochRecord):
        yield Text(
            f"epoch {record.epoch}: loss {record.train_loss:.3f}, {format_percent(record.train_accuracy)}; "
            f"{_evaluated(record)}{format_number(record.images_per_second, 0)} images/s"
        )


def _evaluated(record: EpochRecord) -> str:
    """The validation figures where there are any, and the test figures where there are any, or no others could be."""
    loss, accuracy = format_number(record.validation_loss), format_percent(record.validation_accuracy)
    validation = f"validation loss {loss}, {accuracy}; " if record.num_validation_images else ""
    if validation and record.test_loss is None:
        return validation
    return f"{validation}test loss {format_number(record.test_loss)}, {format_percent(record.test_accuracy)}; "


@contextmanager
def show_cells(num_cells: int, limit_bytes: int | None = None) -> Iterator[CellProgress]:
    """Progress of a grid: a live view on a terminal, a line per cell and epoch elsewhere."""
    if not can_draw(talk):
        yield _PlainCells(num_cells)
        return
    cells = _LiveCells(num_cells, limit_bytes)
    with drawn(cells.view, talk):
        yield cells
        cells.conclude()


class _PlainCells:
    def __init__(self, num_cells: int) -> None:
        self.num_cells = num_cells

    def __call__(self, n: int, name: str) -> CellListener:
        say(f"[{n + 1}/{self.num_cells}] {name}")

        def listen(done: float, record: Record) -> None:
            for line in _lines(record):
                say(Text.assemble("    ", line))

        return listen

    def stopping(self, text: str) -> None:
        write_now(text)


class _LiveCells:
    """The cell under way in the view, and above it what has to be said of each cell, and its last epoch."""

    def __init__(self, num_cells: int, limit_bytes: int | None) -> None:
        self.num_cells, self.view = num_cells, ShareView()
        self.view.limit_bytes = limit_bytes
        self.stopping = self.view.stopping
        self._name = ""
        self._epoch: Text | None = None

    def __call__(self, n: int, name: str) -> CellListener:
        self.conclude()
        figures = Figures()
        self._name = f"[{n + 1}/{self.num_cells}] {name}"
        self.view.what, self.view.done, self.view.figures = (
            f"{n + 1}/{self.num_cells} {name}",
            n / self.num_cells,
            figures,
        )

        def listen(done: float, record: Record) -> None:
            if isinstance(record, StepRecord):
                figures.add(record)
            elif isinstance(record, MemoryRecord):
                figures.memory = record
            elif isinstance(record, NoticeRecord):
                for line in _lines(record):
                    say(Text.assemble(f"{self._name} ", line))
            elif isinstance(record, EpochRecord):
                self._epoch = next(_lines(record))
            if done:
                self.view.done = (n + done) / self.num_cells
                self.view.pace.reach(self.view.done)

        return listen

    def conclude(self) -> None:
        """Print the last epoch of the cell that was under way."""
        if self._epoch:
            say(Text.assemble(f"{self._name} ", self._epoch))
        self._epoch = None


@contextmanager
def show_share() -> Iterator[Callable[[float, str], None]]:
    """Progress as a share of the work, from 0 to 1: a bar on a terminal, a line for each new thing elsewhere."""
    if not can_draw(talk):
        last = ""

        def plain(done: float, what: str) -> None:
            nonlocal last
            if what != last:
                say(what)
            last = what

        yield plain
        return
    view = ShareView()

    def live(done: float, what: str) -> None:
        view.what, view.done = what, done
        view.pace.reach(done)

    with drawn(view, talk):
        yield live
