"""Modules of a network in the place of others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def replace_modules(model: nn.Module, kind: type[nn.Module], convert: Any) -> nn.Module:
    """Replace every module of a kind inside `model` by `convert(module)`, in place; one used in two places stays one."""
    return replace(model, lambda module: isinstance(module, kind), convert)


def replace(model: nn.Module, matches: Callable[[nn.Module], bool], convert: Any) -> nn.Module:
    """Replace every module inside `model` that matches by `convert(module)`, in place; one used in two places stays one."""
    done: dict[nn.Module, nn.Module] = {}

    def visit(module: nn.Module) -> nn.Module:
        if module not in done:
            done[module] = module if not matches(module) else convert(module)
            for name, child in list(module._modules.items()) if done[module] is module else []:
                if child is not None:
                    setattr(module, name, visit(child))
        return done[module]

    return visit(model)
