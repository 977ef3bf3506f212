"""The commands below `bln-train recipes`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from bln_train.cli_complete import complete_recipe
from bln_train.errors import BlnError, UsageError

recipes_app = typer.Typer(help="List, show or copy the recipes that come with bln-train.", no_args_is_help=True)

ShippedArgument = Annotated[str, typer.Argument(help="A shipped recipe's name.", autocompletion=complete_recipe)]


@recipes_app.command("list")
def list_recipes() -> None:
    """Names and first lines of the shipped recipes."""
    from bln_train import console
    from bln_train.recipe_file import shipped_recipes

    for name, path in sorted(shipped_recipes().items()):
        first = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("#").strip()
        console.print_line(f"{name:24} {first}")


@recipes_app.command("show")
def show_recipe(name: ShippedArgument) -> None:
    """Print a shipped recipe."""
    sys.stdout.write(_shipped(name).read_text(encoding="utf-8"))


@recipes_app.command("copy")
def copy_recipe(
    name: ShippedArgument,
    to: Annotated[Path | None, typer.Argument(help="File or folder; default ./<name>.yaml. Never overwrites.")] = None,
) -> None:
    """Copy a shipped recipe, to be edited."""
    source = _shipped(name)
    target = to or Path(f"{name}.yaml")
    target = target / f"{name}.yaml" if target.is_dir() else target
    if target.exists():
        raise BlnError(f"{target} exists; nothing was written", "Give another file name.")
    try:
        with source.open("rb") as old, open(target, "xb") as new:
            shutil.copyfileobj(old, new)
    except OSError as error:
        raise BlnError(f"cannot write {target}: {error.strerror}") from error
    typer.echo(f"{target}", err=False)


def _shipped(name: str) -> Path:
    from bln_train.recipe_file import shipped_recipes

    known = shipped_recipes()
    if name not in known:
        raise UsageError(f"no shipped recipe '{name}'", f"There are: {', '.join(sorted(known))}.")
    return known[name]
