"""What the commands share: options, and how their values are read."""

from __future__ import annotations

from typing import Annotated

import typer

from bln_train.cli.complete import complete_device, complete_norms, complete_recipe, complete_setting
from bln_train.cli.sizes import expand_dots, parse_size
from bln_train.errors import UsageError

RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A recipe file, or the name of a shipped recipe.", autocompletion=complete_recipe
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a setting, e.g. train.epochs=3; repeatable.",
        autocompletion=complete_setting,
    ),
]
OptionalRecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="[RECIPE]", help="A recipe file or a shipped recipe's name.", autocompletion=complete_recipe
    ),
]
NormsOption = Annotated[str, typer.Option(help="Norms, comma-separated.", autocompletion=complete_norms)]
DeviceOption = Annotated[
    str | None,
    typer.Option(help="auto, cpu, cuda or cuda:<index>; overrides the recipe.", autocompletion=complete_device),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


def overrides(set_: list[str] | None, device: str | None) -> list[str]:
    """What --set and --device change in a recipe."""
    return [*(set_ or ()), *([f"runtime.device={device}"] if device else [])]


def split(text: str) -> list[str]:
    """The parts of a comma-separated list."""
    return [part.strip() for part in text.split(",") if part.strip()]


def sizes(text: str, option: str) -> list[int]:
    """A list of batch sizes; raises UsageError on anything else."""
    found = [parse_size(part, option) for part in expand_dots(split(text), option)]
    if not found:
        raise UsageError(f"{option}: name at least one batch size", f"Example: {option} 1,8,64")
    return found
