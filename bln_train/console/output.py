"""What a person sees: results on stdout, talk on stderr. No torch here."""

from __future__ import annotations

import sys
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from bln_train.errors import BlnError
from bln_train.runs.folder import json_text

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
    _flow(out, text)


def say(text: str | Text) -> None:
    """A line of talk, on stderr, as it is."""
    _flow(talk, text)


def _flow(console: Console, text: str | Text) -> None:
    """Print a line: on a terminal broken between words; elsewhere, or where a word (a path) is longer than a line, whole."""
    breaks = console.is_terminal and all(cell_len(word) <= console.width for word in str(text).split())
    console.print(text, soft_wrap=not breaks, markup=False)


def note(text: str) -> None:
    """Something the user should know, on stderr, as it is."""
    say(f"note: {text}")
