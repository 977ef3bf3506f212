"""A report as one HTML page, which has no scripts and loads nothing from a network. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from bln_train.report.blocks import Block, Figure, Finding, Listing, Section, Table, Text
from bln_train.report.palette import DARK, HATCHES, LIGHT, STYLE, variables

GENERATOR = '<meta name="generator" content="bln-train report">'
_LIGHT = LIGHT | {"card": "#f5f7f9", "good": "#116329", "bad": "#b3261e"}
_DARK = DARK | {"card": "#1d2228", "good": "#56d364", "bad": "#ff8a80"}
_STYLE = f"""
:root {{ {variables(_LIGHT)} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {variables(_DARK)} }} }}
{STYLE}"""
_STYLE += """
:root { color-scheme: light dark; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 66rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-bottom: .2rem; border-bottom: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 0 0 .3rem; }
p { margin: .5rem 0; }
.soft, figcaption { color: var(--soft); font-size: .875rem; }
.findings { list-style: none; margin: .5rem 0; padding: 0; }
.findings li { background: var(--card); border-left: 4px solid var(--soft); padding: .45rem .7rem; margin: .4rem 0; }
.findings .good { border-color: var(--good); } .findings .bad { border-color: var(--bad); }
.findings b { margin-right: .4rem; } .good b { color: var(--good); } .bad b { color: var(--bad); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1.4rem; }
figure { margin: 0; max-width: 32rem; break-inside: avoid; }
figure > svg { display: block; width: 100%; height: auto; }
.wide { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .2rem 0; }
th, td { padding: .25rem .7rem .25rem 0; text-align: right; border-bottom: 1px solid var(--rule); vertical-align: top;
  overflow-wrap: normal; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child, .words th, .words td { text-align: left; min-width: 7rem; }
.words th { white-space: normal; }
.words td + td { overflow-wrap: anywhere; white-space: normal; }
summary { cursor: pointer; font-weight: 600; font-size: .875rem; padding: .3rem 0; }
pre { background: var(--card); padding: .7rem; overflow-x: auto; font-size: .8rem; }
#hatches { position: absolute; width: 0; height: 0; }
@media (max-width: 30rem) { td:first-child { white-space: normal; overflow-wrap: anywhere; } }
@media print { body { max-width: none; font-size: 10pt; } h2 { break-after: avoid; }
  .wide { overflow: visible; } table { font-size: 8pt; } th, td, td:first-child { white-space: normal; }
  details > *, details::details-content { content-visibility: visible; } }
"""
_WORDS = {"good": "ok", "bad": "no", "unknown": "-", "note": "note"}


def render_html(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The page; all text of the blocks is escaped here, drawings are taken as they are."""
    # Text that got past the escaping could still neither run a script nor load a file.
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        GENERATOR,
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<link rel="icon" href="data:,">',
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
        f'<svg id="hatches" aria-hidden="true">{HATCHES}</svg>',
        f'<h1>{escape(title)}</h1>\n<p class="soft">{escape(subtitle)}</p>',
    ]
    for section in sections:
        parts.append(f"<section>\n<h2>{escape(section.title)}</h2>")
        parts += [_run_of_blocks(kind, members) for kind, members in _together(section.blocks)]
        parts.append("</section>")
    return "\n".join([*parts, "</body>\n</html>\n"])


def _together(blocks: Sequence[Block]) -> list[tuple[type[Block], list[Block]]]:
    """Neighbours of one kind: findings make a list, figures a grid."""
    found: list[tuple[type[Block], list[Block]]] = []
    for block in blocks:
        if found and found[-1][0] is type(block):
            found[-1][1].append(block)
        else:
            found.append((type(block), [block]))
    return found


def _run_of_blocks(kind: type[Block], blocks: Sequence[Block]) -> str:
    inside = "\n".join(map(_block, blocks))
    if kind is Finding:
        return f'<ul class="findings">\n{inside}\n</ul>'
    return f'<div class="figures">\n{inside}\n</div>' if kind is Figure else inside


def _block(block: Block) -> str:
    if isinstance(block, Finding):
        return f'<li class="{block.status}"><b>{_WORDS[block.status]}</b>{escape(block.text)}</li>'
    if isinstance(block, Text):
        return f"<p>{escape(block.text)}</p>"
    if isinstance(block, Listing):
        return f"<details><summary>{escape(block.title)}</summary><pre>{escape(block.text)}</pre></details>"
    if isinstance(block, Table):
        return _table(block)
    table = _table(block.table) if block.table is not None else ""
    caption = f"<figcaption>{escape(block.caption)}</figcaption>" if block.caption else ""
    return f"<figure><h3>{escape(block.title)}</h3>{block.drawing}{caption}{table}</figure>"


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.headings)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in table.rows)
    caption = "" if table.folded or not table.title else f"<caption>{escape(table.title)}</caption>"
    words = ' class="words"' if table.words else ""
    inside = (
        f'<div class="wide"><table{words}>{caption}<thead><tr>{head}</tr></thead><tbody>\n{rows}</tbody></table></div>'
    )
    return f"<details><summary>{escape(table.title)}</summary>{inside}</details>" if table.folded else inside
