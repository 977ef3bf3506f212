"""Stopping on request: Ctrl-C and SIGTERM as a question that the work answers when it can. No torch here."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Note the first SIGINT or SIGTERM and yield a function that tells of it; the second acts at once, as usual.

    Outside the main thread, where Python delivers no signals, the answer is always no.
    """
    asked = False
    previous: dict[int, Any] = {}

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        for each, handler in previous.items():
            signal.signal(each, handler)

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
