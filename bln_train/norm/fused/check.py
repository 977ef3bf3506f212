"""Whether a fused network does what the unfused one does: one example goes forward and backward through both."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bln_train.norm.batchless import _BatchlessNorm
from bln_train.norm.fused.forward import FusedForward
from bln_train.norm.fused.layer import fold_once
from bln_train.norm.statistics import BatchlessStatistics

TOLERANCE = 1e-6
"""Of an output's or gradient's norm, in float64: far above rounding, far below any other operation."""
_ROUNDING = 1e-12  # of the largest gradient's norm: a gradient as small as that may be nothing but rounding
_MOST_RUNS = 24  # of the network; one norm of a hundred takes some 14 to find

Found = dict[str, Tensor]
"""Outputs, and gradients by the parameters' names."""


def why_different(model: nn.Module, example: Tensor) -> dict[str, str]:
    """Norms of a network, not fused, with which the fused one would do something else on an example, and what.

    Works on a copy in float64 on the CPU, in training mode, with a drawn correction. The network, its modes and the random state
    stay as they are. If the difference cannot be told apart by norms, all of them are named.
    """
    twin = _twin(model)
    x = example.detach().to("cpu", torch.float64)
    norms = FusedForward(twin).folded
    with torch.random.fork_rng(devices=()):
        try:
            wanted = _run(twin, None, x)
        except Exception as error:
            return dict.fromkeys(norms, f"the network could not be run on the example: {_words(error)}")
        return _Search(twin, x, wanted, norms).differing()


def largest_difference(wanted: Found, found: Found) -> tuple[float, str]:
    """The largest difference of an output or gradient, in units of its own norm, and what differs."""
    floor = _ROUNDING * max((float(value.norm()) for value in wanted.values()), default=0.0)
    worst = 0.0, ""
    for name in {**wanted, **found}:
        if name not in wanted or name not in found or wanted[name].shape != found[name].shape:
            return float("inf"), name
        size = max(float(wanted[name].norm()), floor)
        difference = float((found[name] - wanted[name]).norm())
        relative = difference / size if size else difference
        if relative != relative:  # NaN
            return relative, name
        worst = max(worst, (relative, name))
    return worst


class _Search:
    """Finds, by halves, the norms that make the difference."""

    def __init__(self, twin: nn.Module, x: Tensor, wanted: Found, norms: Sequence[str]) -> None:
        self.twin, self.x, self.wanted, self.norms = twin, x, wanted, norms
        self.num_runs = 0

    def differing(self) -> dict[str, str]:
        whole = self._why(set(self.norms))
        if not whole:
            return {}
        found = self._among(self.norms, whole)
        if not found or self.num_runs > _MOST_RUNS or self._why(set(self.norms) - set(found)):
            return dict.fromkeys(self.norms, f"{whole}, and which norm does it was not found")
        return found

    def _among(self, norms: Sequence[str], why: str) -> dict[str, str]:
        """Those of some norms that make a difference by themselves; `why` is that of all of them."""
        if not why or self.num_runs > _MOST_RUNS:
            return {}
        if len(norms) == 1:
            return {norms[0]: why}
        half = len(norms) // 2
        return {
            name: reason
            for some in (norms[:half], norms[half:])
            for name, reason in self._among(some, self._why(set(some))).items()
        }

    def _why(self, norms: set[str]) -> str:
        """What is different where these norms alone are folded."""
        self.num_runs += 1
        fused = FusedForward(self.twin, skipped=dict.fromkeys(set(self.norms) - norms, "not now"))
        try:
            found = _run(self.twin, fused, self.x)
        except Exception as error:
            return f"folded, the network does not run: {_words(error)}"
        difference, what = largest_difference(self.wanted, found)
        if difference <= TOLERANCE:
            return ""
        return f"folded, {what} differs by {difference:.1e} of its norm"


def _twin(model: nn.Module) -> nn.Module:
    """A copy in float64 on the CPU; no copy is made where the network is."""
    tensors: dict[int, Any] = {}
    for parameter in model.parameters():
        own = nn.Parameter(_wide(parameter), requires_grad=parameter.requires_grad)
        tensors[id(parameter)] = own
    for buffer in model.buffers():
        tensors.setdefault(id(buffer), _wide(buffer))
    twin = copy.deepcopy(model, tensors)
    twin.train()
    generator = torch.Generator().manual_seed(0)
    for norm in twin.modules():
        if isinstance(norm, _BatchlessNorm) and norm.correction is not None:
            norm.correction.copy_(torch.randn(norm.correction.shape, generator=generator) * 0.1)
    return twin


def _wide(tensor: Tensor) -> Tensor:
    dtype = torch.float64 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", dtype, copy=True)


def _run(twin: nn.Module, fused: FusedForward | None, x: Tensor) -> Found:
    """Outputs and gradients of one training forward and backward; fused as in a training step."""
    torch.manual_seed(0)  # of dropout, whose masks may be drawn by begin or by the forward
    statistics = BatchlessStatistics(twin)
    statistics.begin(len(x))
    buffers = {name: buffer.clone() for name, buffer in twin.named_buffers()}
    try:
        with fold_once(() if fused is None else fused.layers):
            leaves = tree_leaves(twin(x) if fused is None else fused(x))
            outputs = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
            (_drawn_sum(outputs) + statistics.nll()).backward()
        found = {f"output {n}": out.detach() for n, out in enumerate(outputs)}
        grads = {f"the gradient of {name}": p.grad for name, p in twin.named_parameters()}
        return found | {name: grad for name, grad in grads.items() if grad is not None}
    finally:
        statistics.discard()
        twin.zero_grad()
        with torch.no_grad():
            for name, buffer in twin.named_buffers():
                buffer.copy_(buffers[name])


def _drawn_sum(outputs: Sequence[Tensor]) -> Tensor:
    """A loss whose gradient is another one at each entry."""
    generator = torch.Generator().manual_seed(1)
    draws = [torch.randn(out.shape, generator=generator, dtype=out.dtype) for out in outputs]
    return torch.stack([(out * draw).sum() for out, draw in zip(outputs, draws, strict=True)]).sum()


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
