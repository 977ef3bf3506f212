"""The parts of a report before it is HTML or Markdown. Their text is plain; the renderer escapes it. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from bln_train.report.svg import Drawing

Status = Literal["good", "bad", "unknown", "note"]


@dataclass(frozen=True)
class Finding:
    """One sentence of the verdict."""

    status: Status
    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Listing:
    """Text as it is, line by line, folded away under its title."""

    title: str
    text: str


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first column is words, the others are numbers unless `words`."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: bool = False
    folded: bool = False
    """Whether HTML shows its title alone until it is opened."""


@dataclass(frozen=True)
class Figure:
    """A drawing, whose numbers are in a table as well: its own, or one beside it."""

    title: str
    drawing: Drawing
    """Its text is escaped."""
    caption: str = ""
    table: Table | None = None


Block = Finding | Text | Listing | Table | Figure


@dataclass(frozen=True)
class Section:
    """A heading and what is below it."""

    title: str
    blocks: Sequence[Block]
