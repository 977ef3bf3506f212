"""What the README says of the program is true of it: commands, options, quoted messages, links."""

import ast
import re
import shlex
from pathlib import Path

import cli_reference
import pytest
import typer

import bln_train
from bln_train.cli.app import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = dict(cli_reference.commands(typer.main.get_command(app), "bln-train"))


def test_the_list_of_commands_is_current():
    _, written, _ = cli_reference.split(README)
    assert written.strip() == cli_reference.reference(), "renew it: python tests/support/cli_reference.py"


def command_lines():
    """Every call of the program in the README's blocks and quotes, without what is behind a # or a pipe."""
    text = README.partition(cli_reference.BEGIN)[0] + README.partition(cli_reference.END)[2]
    blocks = "\n".join(re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    quotes = re.findall(r"`(bln-train [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [line for line in (*blocks.splitlines(), *quotes) if line.startswith("bln-train ")]


@pytest.mark.parametrize("line", command_lines())
def test_commands_and_options_exist(line):
    words = shlex.split(line, comments=True)
    name = next((" ".join(words[:n]) for n in (3, 2) if " ".join(words[:n]) in COMMANDS), None)
    if name is None and words[1].startswith("-"):  # options of the program itself
        known = {option for parameter in typer.main.get_command(app).params for option in parameter.opts}
        assert set(words[1:]) <= known, line
        return
    assert name, line
    known = {option for parameter in COMMANDS[name].params for option in parameter.opts}
    assert {word for word in words if word.startswith("-")} <= known, line


def messages():
    """The errors in the table of troubleshooting: what stands in the first column, in backticks."""
    section = README.partition("## When something goes wrong\n")[2].partition("\n## ")[0]
    return re.findall(r"^\| `(.+?)` \|", section, re.MULTILINE)


def templates():
    """Every string of the program; where it puts a value in, a NUL."""
    for path in Path(bln_train.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


TEMPLATES = list(templates())


def test_there_are_messages():
    assert len(messages()) >= 12


@pytest.mark.parametrize("message", messages())
def test_quoted_messages_are_the_programs(message):
    """Each `...` is a value, or a part left out."""
    pattern = ".*".join(map(re.escape, message.split("...")))
    assert len(message.replace("...", "").strip()) >= 8
    assert any(re.search(pattern, template, re.DOTALL) for template in TEMPLATES), message


def test_links_lead_somewhere():
    anchors = {
        re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", README, re.M)
    }
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif "://" not in target:
            assert (ROOT / target).exists(), target
