"""A report as Markdown: the same words and tables, without drawings. No torch here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from bln_train.report.blocks import Block, Figure, Finding, Listing, Section, Table, Text

GENERATOR = "<!-- bln-train report -->"
_WORDS = {"good": "**ok**", "bad": "**no**", "unknown": "**-**", "note": "**note**"}
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#~&])")


def render_markdown(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The report; all text of the blocks is escaped here."""
    lines = [GENERATOR, "", f"# {_plain(title)}", "", _plain(subtitle), ""]
    for section in sections:
        lines += [f"## {_plain(section.title)}", ""]
        for n, block in enumerate(section.blocks):
            after = section.blocks[n + 1] if n + 1 < len(section.blocks) else None
            lines += _block(block)
            if not (isinstance(block, Finding) and isinstance(after, Finding)):
                lines.append("")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def _block(block: Block) -> Iterator[str]:
    if isinstance(block, Finding):
        yield f"- {_WORDS[block.status]} {_plain(block.text)}"
    elif isinstance(block, Text):
        yield _plain(block.text)
    elif isinstance(block, Listing):
        yield from (f"{_plain(block.title)}:", "")
        yield from (f"    {line}" for line in block.text.splitlines())
    elif isinstance(block, Table):
        yield from _table(block)
    elif isinstance(block, Figure) and block.table is not None:
        yield from _table(block.table)
        if block.caption:
            yield from ("", _plain(block.caption))


def _table(table: Table) -> Iterator[str]:
    if table.title:
        yield from (f"**{_plain(table.title)}**", "")
    yield _row(table.headings)
    yield _row(["---"] + ["---" if table.words else "---:"] * (len(table.headings) - 1), escape=False)
    yield from (_row(row) for row in table.rows)


def _row(cells: Sequence[str], *, escape: bool = True) -> str:
    return f"| {' | '.join(_plain(cell) if escape else cell for cell in cells)} |"


def _plain(text: str) -> str:
    """One line of text that Markdown takes as it is, tags included."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))
