"""What a public name's docstring has to say: its parameters, shapes of tensors, what it raises, where a norm comes from."""

import ast
import inspect
import re
import textwrap

import pytest
import torch
import typer
from pydantic import BaseModel

import bln_train
from bln_train import norm
from bln_train.cli import app as cli

PUBLIC = {name: getattr(home, name) for home in (norm, bln_train) for name in home.__all__ if not name.startswith("__")}
# (N, C, *spatial), (C,), (1,), (2, C), () ...
SHAPE = re.compile(r"\((?:[A-Z]\w*|n|\d|\.{3})?(?:,(?: ?[\w*/. ']+)?)*\)")
FROM_A_PAPER = ("BatchlessNorm", "BatchlessNorm1d", "BatchlessNorm2d", "BatchlessNorm3d", "batchless_norm", "StandardizedConv2d",
                "standardize_weight", "FoldedConvNorm")  # fmt: skip


def ours(kind):
    """A class and those of its bases that are written here."""
    return [base for base in kind.__mro__ if base.__module__.startswith("bln_train")]


def tree(thing):
    return ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]


def raised_in(node):
    """Names of what is raised below a node, but for what a `try` around it catches by that name."""
    if isinstance(node, ast.Raise) and node.exc is not None:
        yield ast.unparse(node.exc.func if isinstance(node.exc, ast.Call) else node.exc)
    for child in ast.iter_child_nodes(node):
        caught = ""
        if isinstance(node, ast.Try) and child in node.body:
            caught = " ".join(ast.unparse(handler.type) for handler in node.handlers if handler.type)
        yield from (name for name in raised_in(child) if name not in caught)


def documents():
    """(name, function, its words) for each public function, method and constructor; a method's class speaks for it too."""
    for name, thing in PUBLIC.items():
        if not inspect.isclass(thing):
            yield name, thing, inspect.getdoc(thing) or ""
            continue
        words = "\n".join(inspect.getdoc(base) or "" for base in ours(thing))
        for base in ours(thing):
            for key, member in vars(base).items():
                method = getattr(member, "fget", None) or getattr(member, "__func__", member)
                if inspect.isfunction(method) and method.__module__.startswith("bln_train"):
                    if key == "__init__":
                        yield f"{name}.__init__", method, words
                    elif not key.startswith("_"):
                        yield f"{name}.{key}", method, f"{inspect.getdoc(method) or ''}\n{words}"


def written(function):
    """Whether a function has a source of its own, which a dataclass's constructor has not."""
    return "<string>" not in inspect.unwrap(function).__code__.co_filename


DOCUMENTS = [found for found in documents() if written(found[1])]
NAMES = [name for name, _, _ in DOCUMENTS]


def test_there_is_something_to_check():
    assert {"fuse", "BatchlessNorm2d.__init__", "BatchlessStatistics.update", "Trainer.steps"} <= set(NAMES)


@pytest.mark.parametrize(("name", "function", "words"), DOCUMENTS, ids=NAMES)
def test_it_says_what_goes_in_and_what_it_raises(name, function, words):
    function = inspect.unwrap(function)
    own = inspect.getdoc(function) or words
    assert len(own.split()) >= 2
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    silent = [p.name for p in parameters if not re.search(rf"\b{p.name}\b", words)]
    assert not silent, f"{name} does not mention {', '.join(silent)}"
    annotations = [str(p.annotation) for p in parameters] + [str(inspect.signature(function).return_annotation)]
    if any(re.search(r"\bTensor\b", text) for text in annotations):
        assert SHAPE.search(words), f"{name} takes or gives a tensor, and no shape is named"
    raised = set(raised_in(tree(function)))
    unsaid = sorted(error for error in raised if error not in words)
    assert not unsaid, f"{name} raises {', '.join(unsaid)} and does not say so"


@pytest.mark.parametrize("name", [name for name, thing in PUBLIC.items() if inspect.isclass(thing)])
def test_every_field_of_a_class_is_described(name):
    """Fields of dataclasses and NamedTuples have a sentence behind them, or are named by the class; a recipe's, see its schema."""
    for kind in ours(PUBLIC[name]):
        words, body = inspect.getdoc(kind) or "", tree(kind).body
        assert words
        if issubclass(kind, BaseModel) or issubclass(kind, torch.nn.Module):
            continue
        for field, after in zip(body, [*body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert documented or re.search(rf"\b{field.target.id}\b", words), f"{name}.{field.target.id}"


@pytest.mark.parametrize("name", FROM_A_PAPER)
def test_a_norm_names_its_source(name):
    thing = PUBLIC[name]
    words = "\n".join(inspect.getdoc(kind) or "" for kind in ours(thing)) if inspect.isclass(thing) else thing.__doc__
    assert "arXiv" in words


def commands(group, path=("bln-train",)):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield " ".join((*path, name)), command
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


COMMANDS = dict(commands(typer.main.get_command(cli.app)))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_has_a_help_text(name):
    command = COMMANDS[name]
    assert command.help
    silent = [parameter.name for parameter in command.params if not getattr(parameter, "help", None)]
    assert not silent, f"{name} does not say what {', '.join(silent)} is"
