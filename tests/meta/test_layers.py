"""Law 8: the house's rooms."""

import ast
import graphlib
from pathlib import Path

import pytest

import bln_train

ROOT = Path(bln_train.__file__).parent
ROOMS = [
    "errors",
    "records",
    "system",
    "norm.kernels",
    "norm",
    "norm.fused",
    "norm.convert",
    "norm.calibrate",
    "paper",
    "models",
    "data",
    "memory",
    "recipe",
    "train",
    "runs",
    "build",
    "console",
    "report",
    "plan",
    "export",
    "experiments",
    "cli",
    "__main__",
]
"""Lower ones first: a module imports from its own room and from those before it. docs/architecture.md says what lives there."""
DOORS = {"bln_train", "bln_train.norm"}
"""Packages that give names of higher rooms to others; nothing that they give may import them."""


def modules(root):
    """Every module of a package by its dotted name."""
    found = {}
    for path in root.rglob("*.py"):
        name = ".".join((root.name, *path.relative_to(root).with_suffix("").parts))
        found[name.removesuffix(".__init__")] = path
    return found


def imports(path, known):
    """The modules of the package that a file imports anywhere, for types alone or in a function too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (name for name in names if name in known)


def room_of(module):
    """The innermost room that a module is in."""
    inside = module.removeprefix("bln_train.")
    return max((room for room in ROOMS if f"{inside}.".startswith(f"{room}.")), key=len, default=None)


def problems(root):
    """Modules without a room, imports of higher rooms, and a circle."""
    known = modules(root)
    graph = {}
    for name, path in known.items():
        packages = {other for other in known if known[other].name == "__init__.py"}
        found = {other for other in imports(path, known) if other != name and (other not in packages or other in DOORS)}
        graph[name] = found - {"bln_train"}
        if name == root.name:
            continue
        if room_of(name) is None:
            yield f"{name} has no room"
            continue
        if name in DOORS:
            continue
        for other in sorted(graph[name]):
            if other not in DOORS and ROOMS.index(room_of(other)) > ROOMS.index(room_of(name)):
                yield f"{name} imports {other} of a higher room"
            if other in DOORS and ROOMS.index(room_of(name)) <= ROOMS.index("norm.calibrate"):
                yield f"{name} imports {other}, which imports it"
    try:
        graphlib.TopologicalSorter({name: graph[name] - DOORS for name in graph if name not in DOORS}).prepare()
    except graphlib.CycleError as error:
        yield f"a circle: {' -> '.join(error.args[1])}"


def test_law_8_layering():
    """Law 8: every module has its room, imports no higher one, and there is no circle."""
    assert list(problems(ROOT)) == []


def test_at_most_twenty_rooms_lie_at_the_top():
    assert len({path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}) <= 20


@pytest.mark.parametrize(
    ("file", "line", "problem"),
    [
        ("train/step.py", "from bln_train.cli import app", "of a higher room"),
        ("norm/functional.py", "from bln_train.norm import batchless", "a circle"),
        ("norm/update.py", "from bln_train.norm import fuse", "which imports it"),
        ("elsewhere.py", "", "has no room"),
    ],
)
def test_law_8_fails_on_what_it_forbids(file, line, problem, tmp_path):
    """An import upwards, also in a function; a circle, also for types alone; a door from inside; a module in no room."""
    for path in ROOT.rglob("*.py"):
        copy = tmp_path / "bln_train" / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    changed = tmp_path / "bln_train" / file
    text = changed.read_text(encoding="utf-8") if changed.exists() else ""
    changed.write_text(f"{text}\n\ndef inside():\n    {line or 'pass'}\n", encoding="utf-8")
    assert any(problem in found for found in problems(tmp_path / "bln_train"))
