"""The process as a recipe asks for it, and what a run writes down about it: `system.machine` and the norms' kernels."""

from __future__ import annotations

import torch

from bln_train.norm.kernels.backend import why_not_triton
from bln_train.norm.kernels.library import uses_compiled
from bln_train.norm.kernels.table import kernels_are_wanted, use_kernels
from bln_train.recipe.recipe import Recipe
from bln_train.system import machine


def set_up(recipe: Recipe, device: torch.device) -> None:
    """Set the switches of the whole process: threads, determinism, rounding, kernels."""
    runtime = recipe.runtime
    machine.set_up(
        device,
        num_threads=runtime.num_threads,
        deterministic=runtime.deterministic,
        cudnn_benchmark=runtime.cudnn_benchmark,
        tf32=recipe.train.precision == "tf32",
    )
    use_kernels(runtime.compiled)


def environment(device: torch.device) -> dict[str, str | int | bool | None]:
    """Device, threads, versions, and whether norms have kernels of their own there."""
    on_cuda = device.type == "cuda"
    compiled = kernels_are_wanted() and not why_not_triton(device) if on_cuda else uses_compiled()
    return {**machine.environment(device), "compiled": compiled}
