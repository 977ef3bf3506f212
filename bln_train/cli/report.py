"""`bln-train report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bln_train.cli.options import JsonOption


def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN_OR_COMPARE...", help="Folders of `run`, `compare` and `memory`.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            help="An .html file or a folder; default report.html in the folder, here if there are several. A .md comes with it.",
        ),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Put what folders hold into one HTML file and its Markdown twin: verdict, memory, curves, layers, recipes."""
    from bln_train.console import output
    from bln_train.report.document import write_report

    result = write_report(folders, out)
    if json_:
        output.print_json(result)
    else:
        output.print_line(result["html"])
        output.print_line(result["markdown"])
