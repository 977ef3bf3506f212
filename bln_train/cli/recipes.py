"""The commands below `bln-train recipes`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from bln_train.cli.complete import complete_recipe
from bln_train.errors import BlnError, UsageError
from bln_train.system.atomic import replacing

recipes_app = typer.Typer(
    help="List, show or copy the recipes that come with bln-train; begin your own.", no_args_is_help=True
)
_ANOTHER_NAME = "Give another file name."

ShippedArgument = Annotated[str, typer.Argument(help="A shipped recipe's name.", autocompletion=complete_recipe)]


@recipes_app.command("list")
def list_recipes() -> None:
    """Names and first lines of the shipped recipes."""
    from bln_train.console import output
    from bln_train.recipe.editor_schema import MODELINE
    from bln_train.recipe.load import shipped_recipes

    for name, path in sorted(shipped_recipes().items()):
        lines = path.read_text(encoding="utf-8").splitlines()
        first = next(line for line in lines if not line.startswith(MODELINE))
        output.print_line(f"{name:24} {first.removeprefix('#').strip()}")


@recipes_app.command("show")
def show_recipe(name: ShippedArgument) -> None:
    """Print a shipped recipe."""
    sys.stdout.write(_shipped(name))


@recipes_app.command("copy")
def copy_recipe(
    name: ShippedArgument,
    to: Annotated[Path | None, typer.Argument(help="File or folder; default ./<name>.yaml. Never overwrites.")] = None,
) -> None:
    """Copy a shipped recipe, to be edited."""
    target = to or Path(f"{name}.yaml")
    target = target / f"{name}.yaml" if target.is_dir() else target
    _write_new(target, _shipped(name, target.parent))


@recipes_app.command("new")
def new_recipe(
    file: Annotated[Path, typer.Argument(help="Never overwritten.")] = Path("my_recipe.yaml"),
    data: Annotated[
        str | None, typer.Option(help="shapes, cifar10, cifar100, or a folder with train/<class>/* and test/<class>/*.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="As model.name: resnet20, torchvision:<name>, timm:<name>, ...")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="What training may take, as 4GiB; sets micro_batch_size: auto. Empty: one image at a time."),
    ] = None,
    init: Annotated[str, typer.Option(help="As model.init: pretrained, or a file of trained weights.")] = "",
) -> None:
    """Write a commented recipe that can be run as it is; asks for what is not given."""
    from bln_train.recipe import new as recipe_new

    _refuse_existing(file)  # before any question
    data = _answer(
        "--data", data, "Data (shapes, cifar10, cifar100, or an image folder)", "shapes", recipe_new.problem_with_data
    )
    usual = recipe_new.usual_model(data)
    model = _answer("--model", model, "Model", usual, recipe_new.problem_with_model)
    question = "Memory that training may take, such as 4GiB (Enter: one image at a time)"
    memory = _answer("--memory", memory, question, "", recipe_new.problem_with_memory)
    _write_new(file, recipe_new.compose_recipe(file, data=data, model=model, memory=memory, init=init))


@recipes_app.command("schema")
def print_schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from bln_train.recipe.editor_schema import editor_schema

    sys.stdout.write(json.dumps(editor_schema(), indent=1) + "\n")


def _answer(option: str, given: str | None, question: str, default: str, problem_with: Callable[[str], str]) -> str:
    """What an option says, or else the person at the terminal, who is asked again where that cannot be."""
    if given is not None:
        problem = problem_with(given)
        if problem:
            raise UsageError(f"{option}: {problem}")
        return given
    while True:
        # Not typer.prompt, which writes a space to stdout.
        typer.echo(f"{question}{f' [{default}]' if default else ''}: ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            raise UsageError(f"{option} is not given, and there is no answer to '{question}'", f"Give {option}.")
        answer = line.strip() or default
        problem = problem_with(answer)
        if not problem:
            return answer
        typer.echo(problem, err=True)


def _shipped(name: str, folder: Path | None = None) -> str:
    """A shipped recipe's text, for an editor in `folder`."""
    from bln_train.recipe.editor_schema import with_modeline
    from bln_train.recipe.load import shipped_recipes

    known = shipped_recipes()
    if name not in known:
        raise UsageError(f"no shipped recipe '{name}'", f"There are: {', '.join(sorted(known))}.")
    return with_modeline(known[name].read_text(encoding="utf-8"), folder)


def _refuse_existing(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise BlnError(f"{target} exists; nothing was written", _ANOTHER_NAME)


def _write_new(target: Path, text: str) -> None:
    """Write a file that is not there yet, whole or not at all, and say where."""
    _refuse_existing(target)
    with replacing(target, hint=_ANOTHER_NAME) as file:
        file.write(text.encode())
    typer.echo(target)
