"""The live view on a terminal: a few lines below the talk, drawn again a few times a second. No torch here.

A thread of its own draws it from numbers on the host, so training waits neither for the terminal nor for the device.
"""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.text import Text

from bln_train.records import MemoryRecord, StepRecord
from bln_train.system.units import format_bytes, format_seconds

_DRAWN_PER_SECOND = 4
_ROOM_FOR_CTRL_C = 2  # the terminal echoes ^C where the cursor is; on a new line it would be left behind
_LEVELS = "▁▂▃▄▅▆▇█"
_LEAST_BAR, _MOST_BAR = 4, 60
_WIDTH_FOR_WORDS = 60  # a narrower terminal leaves the room to the curve of the loss


class Pace:
    """The time left, from the mean pace since the first report."""

    def __init__(self) -> None:
        self._first: tuple[float, float] | None = None
        self._last = (0.0, 0.0)

    def reach(self, done: float) -> None:
        """So much of the work is done, from 0 to 1."""
        self._last = (time.monotonic(), done)
        self._first = self._first or self._last

    def restart(self) -> None:
        """What was done so far says nothing about the rest."""
        self._first = self._last

    def seconds_left(self) -> float | None:
        """None while there is no pace yet."""
        if self._first is None or self._last[1] <= self._first[1]:
            return None
        (began, before), (now, done) = self._first, self._last
        left = (now - began) / (done - before) * (1 - done)
        return max(0.0, left - (time.monotonic() - now))


class History:
    """A series of any length as means over at most `capacity` equal stretches: when they are full, two become one."""

    def __init__(self, capacity: int = 256) -> None:
        self.capacity = capacity
        self._means: list[float] = []
        self._per_stretch, self._open = 1, list[float]()

    def add(self, value: float) -> None:
        """Append a number."""
        self._open.append(value)
        if len(self._open) < self._per_stretch:
            return
        self._means.append(sum(self._open) / len(self._open))
        self._open = []
        if len(self._means) == self.capacity:
            self._means = [(a + b) / 2 for a, b in zip(self._means[::2], self._means[1::2], strict=True)]
            self._per_stretch *= 2

    def means(self, at_most: int) -> list[float]:
        """The series in so many numbers at most."""
        size = -(-len(self._means) // max(1, at_most))
        chunks = [self._means[n : n + size] for n in range(0, len(self._means), size or 1)]
        return [sum(chunk) / len(chunk) for chunk in chunks]


class Figures:
    """What progress shows of a run: running means of its steps, its last peak, and the time left."""

    def __init__(self) -> None:
        self.loss = self.accuracy = self.speed = self.epoch = 0.0
        self.step = 0
        self.memory: MemoryRecord | None = None
        self.losses = History()
        self._weight = 0.0

    def add(self, record: StepRecord) -> None:
        """Take a step in."""
        self._weight = 0.95 * self._weight + 1
        rate = 1 / self._weight
        self.loss += rate * (record.loss - self.loss)
        self.accuracy += rate * (record.accuracy - self.accuracy)
        self.speed += rate * (record.num_images / record.seconds - self.speed)
        self.step, self.epoch = record.step, record.epoch
        self.losses.add(record.loss)

    @property
    def has_steps(self) -> bool:
        """Whether there is anything to show: a resumed run begins at a step of which it knows nothing."""
        return self._weight > 0

    @property
    def peak_bytes(self) -> int | None:
        """The last peak that was measured."""
        return None if self.memory is None else self.memory.peak_bytes


def sparkline(values: Sequence[float]) -> str:
    """A character for each number, higher for a larger one."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    scale = (len(_LEVELS) - 1) / (high - low) if high > low else 0.0
    return "".join(_LEVELS[round(scale * (value - low))] for value in values)


def bar(done: float, width: int, *, ascii_only: bool, style: str = "green") -> Text:
    """A bar of so many characters that is filled to `done`, from 0 to 1; full and empty differ without colours too."""
    full, empty = "#-" if ascii_only else "━─"
    filled = round(width * min(1.0, max(0.0, done)))
    return Text.assemble((full * filled, style), (empty * (width - filled), "dim"))


Part = str | Text | Callable[[int], Text]


def fit(parts: Iterable[tuple[int, Part]], width: int) -> Text:
    """As many parts side by side as the width has room for.

    Args:
        parts: (rank, part) from left to right; the highest rank goes first where room is short. A function takes the room that
            the others leave, if that is enough for a bar.
    """
    ranked = list(parts)
    while len(ranked) > 1 and _least_width(ranked) > width:
        ranked.remove(max(ranked, key=lambda each: each[0]))
    room = width - _least_width(ranked)
    texts = [
        part(min(_LEAST_BAR + room, _MOST_BAR)) if callable(part) else Text.assemble(part)  # at most one is a function
        for _, part in ranked
    ]
    line = Text("  ").join(texts)
    line.truncate(width, overflow="ellipsis")
    return line


def _least_width(ranked: Sequence[tuple[int, Part]]) -> int:
    widths = [
        _LEAST_BAR if callable(part) else Text(part).cell_len if isinstance(part, str) else part.cell_len
        for _, part in ranked
    ]
    return sum(widths) + 2 * (len(widths) - 1)


def format_left(seconds: float | None) -> str:
    """A time left in whole seconds."""
    return f"{'-' if seconds is None else f'{seconds:.0f} s' if seconds < 59.5 else format_seconds(seconds)} left"


class View(ABC):
    """Lines of text that depend on the width; `stopping` adds one, and may be called while a signal is handled."""

    def __init__(self) -> None:
        self._stopping = ""

    def stopping(self, text: str) -> None:
        """Say, from the next drawing on, that a stop is under way."""
        self._stopping = text

    @abstractmethod
    def lines(self, width: int, *, ascii_only: bool) -> Iterator[Text]:
        """What is shown, each at most `width` wide."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        width = max(1, options.max_width - _ROOM_FOR_CTRL_C)
        yield from self.lines(width, ascii_only=options.ascii_only)
        if self._stopping:
            yield from Text(self._stopping, style="yellow").wrap(console, width)


def figure_lines(figures: Figures, width: int, *, limit_bytes: int | None, ascii_only: bool) -> Iterator[Text]:
    """Loss and speed, and below them memory, against its limit where there is one."""

    def losses(room: int) -> Text:
        return Text(("" if ascii_only else sparkline(figures.losses.means(room))).ljust(room), style="cyan")

    started, label = figures.has_steps, "accuracy " if width >= _WIDTH_FOR_WORDS else ""
    yield fit(
        [
            (0, f"loss {figures.loss:.3f}" if started else "loss -"),
            (3, losses),
            (2, f"{label}{100 * figures.accuracy:.1f} %" if started else f"{label}-"),
            (1, f"{figures.speed:.{0 if figures.speed >= 10 else 1}f} images/s" if started else "- images/s"),
        ],
        width,
    )
    memory = figures.memory
    peak: list[tuple[int, Part]] = [(0, f"peak {format_bytes(figures.peak_bytes)}")]
    if memory is not None and figures.peak_bytes is not None:
        taken, reserved = figures.peak_bytes, memory.reserved_bytes
        if reserved is not None:
            taken = reserved
            peak.append((2, f"reserved {format_bytes(reserved)}"))
        if limit_bytes is not None:
            share = taken / limit_bytes
            style = "red" if share > 0.95 else "yellow" if share > 0.8 else "green"
            peak.append((1, f"of {format_bytes(limit_bytes)}"))
            peak.append((4, lambda room: bar(share, room, ascii_only=ascii_only, style=style)))
            peak.append((3, f"{100 * share:.0f} %"))
        else:
            peak.append((3, f"micro-batch {memory.micro_batch_size} of {memory.effective_batch_size}"))
    yield fit(peak, width)


class RunView(View):
    """A run: how far it is, its loss and speed, its memory."""

    def __init__(self, figures: Figures, pace: Pace, num_steps: int, limit_bytes: int | None) -> None:
        super().__init__()
        self.figures, self.pace, self.num_steps, self.limit_bytes = figures, pace, num_steps, limit_bytes

    def lines(self, width: int, *, ascii_only: bool) -> Iterator[Text]:
        """Three of them."""
        step, num_steps = self.figures.step, self.num_steps
        yield fit(
            [
                (0, f"step {step}/{num_steps}"),
                (3, f"epoch {self.figures.epoch:.2f}"),
                (2, lambda room: bar(step / num_steps, room, ascii_only=ascii_only)),
                (1, format_left(self.pace.seconds_left())),
            ],
            width,
        )
        yield from figure_lines(self.figures, width, limit_bytes=self.limit_bytes, ascii_only=ascii_only)


class ShareView(View):
    """Work of which a share is done, and what is being done; figures below where that is a run."""

    def __init__(self) -> None:
        super().__init__()
        self.what, self.done = "", 0.0
        self.pace = Pace()
        self.figures: Figures | None = None
        self.limit_bytes: int | None = None

    def lines(self, width: int, *, ascii_only: bool) -> Iterator[Text]:
        """One for what is done, one for how far, two for figures."""
        if self.what:
            yield fit([(0, Text(self.what, style="bold"))], width)
        yield fit(
            [
                (2, lambda room: bar(self.done, room, ascii_only=ascii_only)),
                (1, f"{100 * self.done:.0f} %"),
                (0, format_left(self.pace.seconds_left())),
            ],
            width,
        )
        if self.figures is not None and self.figures.has_steps:
            yield from figure_lines(self.figures, width, limit_bytes=self.limit_bytes, ascii_only=ascii_only)


def can_draw(console: Console) -> bool:
    """Whether the console is a terminal that moves its cursor; a colour that is forced into a pipe makes none of that."""
    return console.is_interactive and console.file.isatty()


@contextmanager
def drawn(view: View, console: Console) -> Iterator[None]:
    """Draw the view below what the console prints, and clear it away at the end, whatever that is."""
    with Live(
        view,
        console=console,
        refresh_per_second=_DRAWN_PER_SECOND,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # a redirected stdout is data
    ):
        yield
