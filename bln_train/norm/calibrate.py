"""Initialise statistics from data: layer after layer in execution order, each normalised before the next is observed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bln_train.norm.batchless import _BatchlessNorm


class _Observed(Exception):  # noqa: N818 - a signal that stops a forward, not an error
    """The layer under observation has seen its input; the rest of the forward is not needed."""


class _Moments:
    """Count, mean and sum of squared deviations of each channel, merged pairwise (Chan et al. 1979) in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.deviations: Tensor | float = 0.0

    def add(self, x: Tensor) -> None:
        """Merge in (N, C, *spatial)."""
        for image in x.detach().split(1):  # float64 copies of one image at a time
            self._add_rows(image.movedim(1, -1).reshape(-1, x.shape[1]).double())

    def _add_rows(self, rows: Tensor) -> None:
        count = rows.shape[0]
        mean = rows.mean(0)
        delta = mean - self.mean
        total = self.count + count
        self.deviations = self.deviations + (rows - mean).square().sum(0) + delta**2 * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total


@torch.no_grad()
def initialize_statistics(
    model: nn.Module,
    micro_batches: Callable[[], Iterable[Tensor]],
    kinds: tuple[type[nn.Module], ...] = (_BatchlessNorm, nn.modules.batchnorm._BatchNorm),
) -> list[str]:
    """Set each norm's mean and standard deviation to those of its input over a sample.

    One pass per norm, in the order of execution, ended as soon as the norm under observation has seen its input; memory is
    one micro-batch's inference. The result does not depend on how the sample is split (float64 merging of moments).

    Args:
        model: evaluated in eval mode (no dropout); its mode is restored.
        micro_batches: called once per pass, yields the sample as (n, C, H, W) inputs, any n.
        kinds: which modules are norms; a batchless layer gets its parameters, a BatchNorm its running statistics.

    Returns: names of the norms that saw a channel without variance, whose standard deviation was floored at eps.
    """
    norms = {module: name for name, module in model.named_modules() if isinstance(module, kinds)}
    modes = {module: module.training for module in model.modules()}
    settled: set[nn.Module] = set()
    floored: list[str] = []
    model.eval()
    try:
        while len(settled) < len(norms):
            target: nn.Module | None = None
            moments = _Moments()

            def observe(module: nn.Module, args: tuple[Any, ...]) -> None:
                nonlocal target
                if target is None and module not in settled:
                    target = module
                if module is target:
                    moments.add(args[0])  # noqa: B023 - used within this pass only
                    raise _Observed

            hooks = [module.register_forward_pre_hook(observe) for module in norms]
            try:
                for x in micro_batches():
                    try:
                        model(x)
                    except _Observed:
                        continue
                    break  # a forward that met no unsettled norm: the rest are never used
            finally:
                for hook in hooks:
                    hook.remove()
            if target is None:
                break
            if _settle(target, moments):
                floored.append(norms[target])
            settled.add(target)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return floored


def _settle(norm: nn.Module, moments: _Moments) -> bool:
    """Write the observed moments into the norm; True if a channel had no variance."""
    mean, deviations = moments.mean, moments.deviations
    assert isinstance(mean, Tensor)
    assert isinstance(deviations, Tensor)
    variance = deviations / moments.count
    if isinstance(norm, _BatchlessNorm):
        if norm.share == "layer":
            shared = mean.mean(0, keepdim=True)
            variance = (variance + (mean - shared) ** 2).mean(0, keepdim=True)
            mean = shared
        norm.set_statistics(mean.to(norm.mean.dtype), variance.sqrt().to(norm.mean.dtype))
        return bool((variance.sqrt() < norm.eps).any())
    running_mean, running_var = norm.running_mean, norm.running_var
    assert isinstance(running_mean, Tensor)
    assert isinstance(running_var, Tensor)
    running_mean.copy_(mean)
    running_var.copy_(variance)
    return bool((variance == 0).any())
