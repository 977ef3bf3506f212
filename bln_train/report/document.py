"""A report of run, comparison and memory folders: one HTML file that needs nothing else, and its Markdown twin. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from bln_train.errors import RunFolderError, UsageError
from bln_train.report import html, markdown, sections
from bln_train.report.blocks import Section
from bln_train.report.groups import group_runs
from bln_train.report.memory_section import memory_of_runs, memory_of_sweep
from bln_train.report.source import Sources, read_sources
from bln_train.report.verdict import verdict
from bln_train.system.atomic import write_atomically


def write_report(paths: Sequence[Path], out: Path | None = None) -> dict[str, Any]:
    """Write a report of folders and return where it is and what it is about.

    Args:
        out: an .html file, or a folder for report.html; default report.html in the only folder of `paths`, in the working folder
            for several. The Markdown is beside it. Earlier reports are replaced.

    Raises:
        UsageError: a folder holds no run, or `out` is of another kind.
        RunFolderError: `out` cannot be written, or is something else than a report.
    """
    page = _place(paths, out)
    twin = page.with_suffix(".md")
    sources = read_sources(paths)
    for file, mark in ((page, html.GENERATOR), (twin, markdown.GENERATOR)):
        if file.exists() and not _begins_with(file, mark):
            raise RunFolderError(f"{file} is no report of bln-train", "Choose another --out. Nothing was changed.")
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"cannot create {page.parent}: {error.strerror}", "Choose another --out.") from error
    title, subtitle = _titles(paths)
    content = assemble(sources)
    for file, text in (
        (page, html.render_html(title, subtitle, content)),
        (twin, markdown.render_markdown(title, subtitle, content)),
    ):
        write_atomically(file, text.encode(errors="replace"))  # names and logs may have half a surrogate pair
    return {
        "html": str(page),
        "markdown": str(twin),
        "num_runs": len(sources.runs),
        "num_sweeps": len(sources.sweeps),
        "num_failed": len(sources.failures),
    }


def assemble(sources: Sources) -> list[Section]:
    """The report's sections, the verdict first."""
    groups = group_runs(sources.runs)
    found = [verdict(sources, groups)]
    if groups:
        found.append(memory_of_runs(groups))
    found += [memory_of_sweep(sweep) for sweep in sources.sweeps]
    if groups:
        found += [sections.curves(groups), sections.speed(groups), sections.layers(groups), sections.recipes(groups)]
    return [*found, sections.environments(sources, groups)]


def _titles(paths: Sequence[Path]) -> tuple[str, str]:
    names = [path.resolve().name for path in paths]
    title = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    written = datetime.now().astimezone().isoformat(timespec="minutes")
    return (
        f"{title}: bln-train report",
        f"From {', '.join(map(str, paths))}; written {written}. A dash means not measured.",
    )


def _place(paths: Sequence[Path], out: Path | None) -> Path:
    if out is None:
        return (paths[0] if len(paths) == 1 else Path()) / "report.html"
    if out.is_dir():
        return out / "report.html"
    if out.suffix != ".html":
        raise UsageError(f"--out: {out} is neither a folder nor an .html file", "Example: --out report.html")
    return out


def _begins_with(file: Path, mark: str) -> bool:
    with open(file, "rb") as content:
        return mark.encode() in content.read(1000)
