"""Stopping on request: Ctrl-C and SIGTERM as a question that the work answers when it can. No torch here."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class StopRequested(Exception):  # noqa: N818  # no error: it was asked for
    """Raised between two micro-steps, or while evaluating, by work that was asked to stop; the last whole step's state stands."""


def never() -> bool:
    """Nobody asks to stop."""
    return False


def write_now(text: str) -> None:
    """Write a line to stderr by one call of the system: no print, as what a signal interrupted may be one."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())


@contextmanager
def stop_requests(answer: Callable[[], None] = lambda: None) -> Iterator[Callable[[], bool]]:
    """Note the first SIGINT or SIGTERM and yield a function that tells of it; at the second of either, KeyboardInterrupt.

    Outside the main thread, where Python delivers no signals, the answer is always no.

    Args:
        answer: is called when the first one comes, while it is handled: it may not print, see `write_now`.
    """
    asked = False
    previous: dict[int, Any] = {}

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        answer()

    try:
        for wanted in (signal.SIGINT, signal.SIGTERM):
            previous[wanted] = signal.signal(wanted, ask) or signal.SIG_DFL
    except ValueError:
        pass
    try:
        yield lambda: asked
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
