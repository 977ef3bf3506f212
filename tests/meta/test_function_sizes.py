"""How large a function may be: one screen, and no more parameters than a reader holds in mind."""

import ast
from pathlib import Path

import bln_train

PACKAGE = Path(bln_train.__file__).parent
MOST_LINES = 60  # from `def` to the end, less the docstring
MOST_PARAMETERS = 9  # keyword-only ones too; neither self nor cls
KERNEL = "a Triton kernel: one launch takes every pointer and size that it needs"
# A name comes off when its function holds.
EXCEPTIONS = {
    "cli.memory.memory": "a command: its parameters are its command line",
    "norm.kernels.triton_kernels._add_likelihood": KERNEL,
    "norm.kernels.triton_kernels.forward": KERNEL,
    "norm.kernels.triton_kernels.finish_forward": KERNEL,
    "norm.kernels.triton_kernels.finish_groups": KERNEL,
    "norm.kernels.triton_kernels.backward": KERNEL,
    "norm.kernels.triton_kernels.finish_backward": KERNEL,
    "paper.layer.PaperNorm.__init__": "a torch.nn layer: a keyword for each variant of the published method",
}


def functions(node, name, *, in_class=False):
    """(name, definition, whether it is a method) of each function below a node, functions in functions too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{name}.{child.name}", child, in_class
            yield from functions(child, f"{name}.{child.name}")
        elif isinstance(child, ast.ClassDef):
            yield from functions(child, f"{name}.{child.name}", in_class=True)
        else:
            yield from functions(child, name, in_class=in_class)


def num_lines(function):
    first = function.body[0]
    docstring = 0 if ast.get_docstring(function) is None else first.end_lineno - first.lineno + 1
    return function.end_lineno - function.lineno + 1 - docstring


def num_parameters(function, is_method):
    of = function.args
    names = [
        parameter.arg for parameter in (*of.posonlyargs, *of.args, *of.kwonlyargs, of.vararg, of.kwarg) if parameter
    ]
    return len(names) - (is_method and names[:1] in (["self"], ["cls"]))


def too_large(source, module):
    """Name to (lines, parameters) of the functions above a bound."""
    sizes = [
        (name, (num_lines(function), num_parameters(function, is_method)))
        for name, function, is_method in functions(ast.parse(source), module)
    ]  # a list: a property's getter and setter share a name
    return {name: size for name, size in sizes if size[0] > MOST_LINES or size[1] > MOST_PARAMETERS}


def test_a_large_function_is_found():
    body = "\n".join(["        pass"] * 59)
    nine = "a, b, /, c, *d, e, f, g, h, **i"
    method = f'class A:\n    def method(self, {{}}):\n        """Two\n        lines."""\n{body}'
    assert too_large(method.format(nine), "m") == {}
    assert too_large(f"{method.format(nine)}\n        pass", "m") == {"m.A.method": (61, 9)}
    assert too_large(method.format("z, " + nine), "m") == {"m.A.method": (60, 10)}
    inner = f"def outer():\n    if True:\n        async def inner(self, {nine}): pass"
    assert too_large(inner, "m") == {"m.outer.inner": (1, 10)}


def test_functions_are_small():
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found |= too_large(path.read_text(encoding="utf-8"), module)
    assert {name: size for name, size in found.items() if name not in EXCEPTIONS} == {}
    assert EXCEPTIONS.keys() - found.keys() == set(), "these hold: take them off"
