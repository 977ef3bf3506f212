"""Initialise statistics from data: level after level, each normalised before the next is observed."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from bln_train.norm.base import LikelihoodNorm
from bln_train.norm.calibrate.levels import find_levels
from bln_train.norm.calibrate.moments import Moments, Passes, evaluating, observe
from bln_train.norm.fused.network import folded_layers


@torch.no_grad()
def initialize_statistics(
    model: nn.Module,
    micro_batches: Callable[[], Iterable[Tensor]],
    kinds: tuple[type[nn.Module], ...] = (LikelihoodNorm, nn.modules.batchnorm._BatchNorm),
    *,
    passes: Passes = 1,
) -> list[str]:
    """Set each norm's mean and standard deviation to those of its input over a sample, the norms before it being set so.

    Norms whose inputs depend on no norm that is still to be set form a level (see `levels.find_levels`; one image shows which)
    and are observed together, in forwards that end as soon as the last of them has seen its input. Memory is one micro-batch's
    inference. The result does not depend on how the sample is split (moments are float64). A norm used at several places gets
    the moments of all its inputs; one whose output comes back into it, those of its first uses, whose inputs do not depend on it.
    A norm that the forward does not reach keeps its statistics.

    Args:
        model: evaluated in eval mode (no dropout); its mode is restored. Not fused.
        micro_batches: called once for each pass, and once more for the image; yields the sample as (n, C, H, W) inputs, any n.
        kinds: which modules are norms; a batchless layer gets its parameters, a BatchNorm its running statistics.
        passes: 1 merges the moments of images; 2 takes the variance in a second pass about the mean of the first: see `Moments`.

    Returns: names of the norms that saw a channel without variance, whose standard deviation was floored at eps.

    Raises:
        ValueError: the sample is empty, the model is fused, or a BatchNorm keeps no running statistics.
    """
    norms = {module: name for name, module in model.named_modules() if isinstance(module, kinds)}
    if folded_layers(model):
        raise ValueError("a fused network's norms never see their input: initialise before fuse, or unfuse")
    untracked = [name for norm, name in norms.items() if getattr(norm, "running_mean", True) is None]
    if untracked:
        raise ValueError(f"BatchNorm without running statistics has none to set: {', '.join(untracked)}")
    floored: list[nn.Module] = []
    with evaluating(model):
        first = next(iter(micro_batches()), None)
        if first is None:
            raise ValueError("there are no images to initialise statistics from")
        levels = find_levels(model, norms, first[:1])
        del first
        for level in levels:
            for norm, moments in observe(model, micro_batches, level, passes).items():
                if _set_statistics(norm, moments):
                    floored.append(norm)
    return [name for norm, name in norms.items() if norm in floored]


def _set_statistics(norm: nn.Module, moments: Moments) -> bool:
    """Write the observed moments into the norm; True if a channel had no variance."""
    if isinstance(norm, LikelihoodNorm):
        mean, variance = moments.read(shared=norm.is_shared)
        norm.set_statistics(mean.to(norm.mean.dtype), variance.sqrt().to(norm.mean.dtype))
        return bool((variance.sqrt() < norm.eps).any())
    mean, variance = moments.read()
    running_mean, running_var = norm.running_mean, norm.running_var
    assert isinstance(running_mean, Tensor)
    assert isinstance(running_var, Tensor)
    running_mean.copy_(mean)
    running_var.copy_(variance)
    return bool((variance == 0).any())
