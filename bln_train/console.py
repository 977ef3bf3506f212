"""What a person sees: progress on stderr, results on stdout. No torch here."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from bln_train.errors import BlnError
from bln_train.records import EpochRecord, MemoryRecord, NoticeRecord, Record, StepRecord
from bln_train.report.runlog import json_text
from bln_train.units import format_bytes, format_number, format_percent, format_seconds

_PLAIN_LINE_SECONDS = 15.0
# Names of files and devices are shown as they are: no emoji, no colours of ours inside them.
out = Console(highlight=False, emoji=False)
talk = Console(stderr=True, highlight=False, emoji=False)


def print_json(data: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json_text(data, indent=2))


def print_error(error: BlnError) -> None:
    """An error and its way out, on stderr, unwrapped so that places and commands can be copied."""
    for n, line in enumerate(error.problem.splitlines()):
        talk.print(f"{'[bold red]error:[/] ' if n == 0 else '       '}{escape(line)}", soft_wrap=True)
    if error.hint:
        talk.print(escape(error.hint), soft_wrap=True)


def print_line(text: str) -> None:
    """A line of the result, on stdout, as it is."""
    out.print(text, soft_wrap=True, markup=False)


def say(text: str) -> None:
    """A line of talk, on stderr, as it is."""
    talk.print(text, soft_wrap=True, markup=False)


def note(text: str) -> None:
    """Something the user should know, on stderr, as it is."""
    say(f"note: {text}")


Listener = Callable[[Record], None]
CellListener = Callable[[float, Record], None]
CellDisplay = Callable[[int, str], CellListener]


@contextmanager
def show_progress(num_steps: int, first_step: int = 0) -> Iterator[Listener]:
    """A live bar on a terminal, plain lines elsewhere."""
    if not talk.is_terminal:
        yield _PlainProgress(num_steps, first_step)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=talk, expand=True) as progress:
        task = progress.add_task("training", total=num_steps, completed=first_step, figures="")
        smooth = _Smooth()

        def listen(record: Record) -> None:
            if isinstance(record, StepRecord):
                figures = f"{smooth.add(record)}"
                progress.update(task, completed=record.step, description=f"epoch {record.epoch:.2f}", figures=figures)
            else:
                smooth.note(record)
                for line in _lines(record):
                    progress.console.print(line, soft_wrap=True)

        yield listen


class _Smooth:
    """Running means of what the bar shows."""

    def __init__(self) -> None:
        self.loss = self.accuracy = self.speed = 0.0
        self.peak: int | None = None
        self._weight = 0.0

    def add(self, record: StepRecord) -> str:
        self._weight = 0.95 * self._weight + 1
        rate = 1 / self._weight
        self.loss += rate * (record.loss - self.loss)
        self.accuracy += rate * (record.accuracy - self.accuracy)
        self.speed += rate * (record.num_images / record.seconds - self.speed)
        # Short enough for 80 columns; the bar takes what is left.
        figures = f"loss {self.loss:.3f}  {100 * self.accuracy:.1f} %  {self.speed:.0f} images/s"
        return f"{figures}  {format_bytes(self.peak)}"

    def note(self, record: Record) -> None:
        if isinstance(record, MemoryRecord):
            self.peak = record.peak_bytes


class _PlainProgress:
    """A line at each epoch, and one every quarter of a minute, for pipes and log files."""

    def __init__(self, num_steps: int, first_step: int) -> None:
        self.num_steps, self.first_step = num_steps, first_step
        self._smooth = _Smooth()
        self._began = self._last = time.monotonic()

    def __call__(self, record: Record) -> None:
        if not isinstance(record, StepRecord):
            self._smooth.note(record)
            for line in _lines(record):
                talk.print(line, soft_wrap=True)
            return
        figures = self._smooth.add(record)
        now = time.monotonic()
        if now - self._last >= _PLAIN_LINE_SECONDS:
            self._last = now
            per_step = (now - self._began) / (record.step - self.first_step)
            left = format_seconds(per_step * (self.num_steps - record.step))
            say(f"step {record.step}/{self.num_steps}  {figures}  {left} left")


def _lines(record: Record) -> Iterator[str]:
    if isinstance(record, NoticeRecord):
        yield f"[yellow]note:[/] {escape(record.text)}"
    elif isinstance(record, EpochRecord):
        yield (
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
def show_cells(num_cells: int) -> Iterator[CellDisplay]:
    """Progress of a comparison: a bar on a terminal, a line per cell and epoch elsewhere."""
    if not talk.is_terminal:

        def plain(n: int, name: str) -> CellListener:
            say(f"[{n + 1}/{num_cells}] {name}")

            def listen(done: float, record: Record) -> None:
                for line in _lines(record):
                    talk.print(f"    {line}", soft_wrap=True)

            return listen

        yield plain
        return
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=talk, expand=True) as progress:
        task = progress.add_task("comparing", total=float(num_cells))

        def live(n: int, name: str) -> CellListener:
            progress.update(task, completed=float(n), description=f"{n + 1}/{num_cells} {name}")

            def listen(done: float, record: Record) -> None:
                if done:
                    progress.update(task, completed=n + done)

            return listen

        yield live


@contextmanager
def show_share() -> Iterator[Callable[[float, str], None]]:
    """Progress as a share of the work, from 0 to 1: a bar on a terminal, a line for each new thing elsewhere."""
    if not talk.is_terminal:
        last = ""

        def plain(done: float, what: str) -> None:
            nonlocal last
            if what != last:
                say(what)
            last = what

        yield plain
        return
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=talk, expand=True) as progress:
        task = progress.add_task("", total=1.0)
        yield lambda done, what: progress.update(task, completed=done, description=what)
