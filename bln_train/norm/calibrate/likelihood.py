"""The likelihood of given data under a network's statistics, outside training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bln_train.norm.base import LikelihoodNorm
from bln_train.norm.calibrate.moments import on_input
from bln_train.norm.functional import sums_about
from bln_train.norm.fused.network import folded_layers


@contextmanager
def layer_likelihoods(model: nn.Module) -> Iterator[dict[str, float]]:
    """Inside, run the network in eval mode; afterwards the dict yielded holds each batchless norm's nll of what it saw.

        nll = mean over channels of [ log std + E[(x - mean)^2] / std^2 / 2 - gauge ],  E over images and positions

    It is what training logs of an effective batch, see `BatchlessStatistics.update`: gauged it is 0 for inputs that have the
    layer's variance about its mean. Summed in float64, without gradients. A norm that saw nothing is left out.

    Raises:
        ValueError: the model is fused, so its norms see nothing.
    """
    if folded_layers(model):
        raise ValueError("a fused network's norms never see their input: unfuse it first")
    norms = {module: name for name, module in model.named_modules() if isinstance(module, LikelihoodNorm)}
    sums: dict[nn.Module, tuple[Tensor | float, int]] = {}

    @torch.no_grad()
    def see(norm: nn.Module, x: Tensor) -> None:
        assert isinstance(norm, LikelihoodNorm)
        squares, num = sums.get(norm, (0.0, 0))
        sums[norm] = squares + sums_about(x, norm.mean.detach())[1].double(), num + x.numel() // x.shape[1]

    found: dict[str, float] = {}
    with on_input(norms, see):
        yield found
    for norm, name in norms.items():
        if norm in sums:
            squares, num = sums[norm]
            std = norm.std.detach().double()
            nll = squares / num / std.square() / 2 + (-0.5 if norm.gauge else std.log())
            assert isinstance(nll, Tensor)
            found[name] = float(nll.mean())
