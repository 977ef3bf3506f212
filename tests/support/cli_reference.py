"""The README's list of commands, from the program itself: `python tests/support/cli_reference.py` writes it."""

import re
from collections import Counter
from pathlib import Path

import typer

from bln_train.cli.app import app

README = Path(__file__).parents[2] / "README.md"
BEGIN = "<!-- commands: written by `python tests/support/cli_reference.py` -->\n"
END = "<!-- end of commands -->\n"
_SHARED_FROM = 3  # commands
_PLACEHOLDERS = {"Path": "PATH", "int": "N", "float": "X", "str": "TEXT"}


def reference() -> str:
    """Every command with its arguments, options, their defaults and help texts, as Markdown."""
    found = list(commands(typer.main.get_command(app), "bln-train"))
    uses = Counter(_line(parameter) for _, command in found for parameter in command.params)
    shared = [line for line, times in uses.items() if times >= _SHARED_FROM]
    parts = ["What several commands take:\n", *shared, ""]
    for name, command in found:
        usage = " ".join((name, *map(_in_usage, command.params)))
        own = [line for parameter in command.params if (line := _line(parameter)) not in shared]
        parts += [f"```\n{usage}\n```\n", f"{_escaped(command.help)}\n", *own, *([""] if own else [])]
    return "\n".join(parts).strip()


def commands(group, path):
    """(name, command) for each command that does something, in the program's order."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def _line(parameter):
    needed = " Required." if parameter.required and parameter.param_type_name == "option" else ""
    default = "" if parameter.default in (None, False, "") else f" Default: `{parameter.default}`."
    return f"* `{_name(parameter)}`: {_escaped(parameter.help)}{needed}{default}"


def _name(parameter):
    if parameter.param_type_name == "argument":
        return (parameter.metavar or parameter.name.upper()).strip("[]")
    kind = re.search(r"Path|int|float|str", str(parameter.type_descriptor.annotation))
    value = "" if parameter.is_flag else f" {parameter.metavar or _PLACEHOLDERS[kind[0]]}"
    return f"{', '.join(parameter.opts)}{value}"


def _in_usage(parameter):
    name = _name(parameter).removeprefix("-o, ")
    return name if parameter.required else f"[{name}]"


def _escaped(text):
    """Help text as Markdown, in which what is quoted is quoted already."""
    parts = text.split("`")
    return "`".join(part if n % 2 else re.sub(r"([<*])", r"\\\1", part) for n, part in enumerate(parts))


def split(readme: str) -> tuple[str, str, str]:
    """What is before, between and after the markers."""
    before, _, rest = readme.partition(BEGIN)
    between, _, after = rest.partition(END)
    return before + BEGIN, between, END + after


if __name__ == "__main__":
    before, _, after = split(README.read_text(encoding="utf-8"))
    README.write_text(f"{before}\n{reference()}\n{after}", encoding="utf-8")
