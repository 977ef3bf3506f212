"""`bln-train doctor`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from bln_train.errors import EXIT_FAILED


def doctor(
    json_: Annotated[bool, typer.Option("--json", help="Print the findings as JSON on stdout.")] = False,
) -> None:
    """Look at versions, devices, data and folders, and test law 1 here; exit code 1 if there is a problem."""
    from bln_train.console import output, tables
    from bln_train.experiments.doctor import examine  # torch, from here on

    output.say("looking at this machine ...")
    findings = [asdict(finding) for finding in examine()]
    if json_:
        output.print_json({"findings": findings})
    else:
        tables.print_findings(findings)
    if any(finding["status"] == "problem" for finding in findings):
        raise typer.Exit(EXIT_FAILED)
