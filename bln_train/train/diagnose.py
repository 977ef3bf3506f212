"""After a step whose loss or gradient is not finite: which layer was the first, found by running the step's images again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bln_train.norm.base import LikelihoodNorm
from bln_train.norm.dropout import InstanceDropout
from bln_train.norm.fused.network import unfuse
from bln_train.norm.statistics import BatchlessStatistics
from bln_train.train.batches import EffectiveBatch
from bln_train.train.step import AccumulationStep


def find_fault(accumulation: AccumulationStep, batch: EffectiveBatch) -> str:
    """The first layer, in order of execution, with a number that is not finite, and its statistics, in words.

    Looked for in the weights, then in the forward and then in the backward pass of each micro-batch, on a copy of the network
    with its norms unfolded, whose buffers may change; at last in the gradients that `accumulation` has gathered.

    Args:
        accumulation: after a step on `batch` that was not finite, and before `give_up`.
    """
    try:
        model = copy.deepcopy(accumulation.model)
        unfuse(model)
        return (
            _in_weights(model)
            or _in_forward(accumulation, model, batch)
            or _in_backward(accumulation, model, batch)
            or _in_sums(accumulation.model)
        )
    except torch.OutOfMemoryError:
        return "which layer was the first could not be found out: a copy of the network does not fit in memory"


def _replayed(accumulation: AccumulationStep, model: nn.Module, batch: EffectiveBatch) -> Iterator[Tensor]:
    """Run the step's forwards again through `model`, a copy of the network; yields the sum () of each micro-batch's losses."""
    again = copy.copy(accumulation)
    again.model = model.train()
    again.dropouts = [m for m in model.modules() if isinstance(m, InstanceDropout)]
    for micro_batch in again.micro_batches(batch):
        yield again.task_loss(again.forward(micro_batch), micro_batch.labels)


def _in_weights(model: nn.Module) -> str:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            layer, _, what = name.rpartition(".")
            number = int((~tensor.isfinite()).sum())
            kind = type(model.get_submodule(layer)).__name__
            return f"before the step, {what} of layer {layer} ({kind}) is not finite in {number} of {tensor.numel()} entries"
    return ""


def _in_forward(accumulation: AccumulationStep, model: nn.Module, batch: EffectiveBatch) -> str:
    found: list[str] = []
    norm_before = ""

    def see(name: str, module: nn.Module, args: Any, out: Any) -> None:
        nonlocal norm_before
        if found:
            return
        bad = isinstance(out, Tensor) and not bool(out.isfinite().all())
        if isinstance(module, LikelihoodNorm):
            shape = (1, -1, *[1] * (args[0].dim() - 2))
            xhat = (args[0] - module.mean.view(shape)) / module.std.view(shape)
            bad = bad or not bool(xhat.square().mean().isfinite())  # what its statistics learn from
        if bad:
            found.append(f"in the forward pass, {_describe(accumulation.model, name, args)}{norm_before}")
        elif isinstance(module, LikelihoodNorm):
            norm_before = f"; the last norm before it, {_describe(accumulation.model, name, args)}"

    with torch.no_grad(), _watched(model, see):
        for n, losses in enumerate(_replayed(accumulation, model, batch)):
            if found:
                return found[0]
            if not bool(losses.isfinite()):
                return f"in the forward pass, the loss of micro-batch {n + 1} is {float(losses)}, from finite logits"
            norm_before = ""
    return ""


def _in_backward(accumulation: AccumulationStep, model: nn.Module, batch: EffectiveBatch) -> str:
    found: list[str] = []
    described: dict[str, str] = {}

    def check(name: str, gradient: Tensor) -> None:
        if not found and not bool(gradient.isfinite().all()):
            found.append(f"in the backward pass, the gradient of the output of {described[name]}")

    def see(name: str, module: nn.Module, args: Any, out: Any) -> None:
        if isinstance(out, Tensor) and out.requires_grad:
            described[name] = _describe(accumulation.model, name, args)
            out.register_hook(partial(check, name))

    statistics = BatchlessStatistics(model)
    with _watched(model, see):
        for losses in _replayed(accumulation, model, batch):
            ((losses + statistics.nll()) / len(batch)).backward()
            if found:
                return found[0]
            for name, parameter in reversed(list(model.named_parameters())):
                if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
                    layer, _, what = name.rpartition(".")
                    return f"in the backward pass, the gradient of {what} of {_describe(accumulation.model, layer, ())}"
            model.zero_grad(set_to_none=True)
    return ""


def _in_sums(model: nn.Module) -> str:
    """No micro-batch by itself is at fault: their sum, or its norm, overflows."""
    largest = {name: float(p.grad.abs().max()) for name, p in model.named_parameters() if p.grad is not None}
    # NaN is larger than anything; of several the last in the forward pass is the first in the backward pass.
    name = max(reversed(largest), key=lambda n: float("inf") if largest[n] != largest[n] else largest[n])
    layer, _, what = name.rpartition(".")
    return (
        f"no micro-batch by itself: the sum of gradients overflows, most in {what} of {_describe(model, layer, ())}, "
        f"whose largest entry is {largest[name]:.3g}"
    )


@contextmanager
def _watched(model: nn.Module, see: Callable[[str, nn.Module, Any, Any], None]) -> Iterator[None]:
    """Inside, `see(name, module, args, out)` after every forward of a module without parts."""
    handles = [
        module.register_forward_hook(partial(see, name))
        for name, module in model.named_modules()
        if next(module.children(), None) is None
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _describe(model: nn.Module, name: str, args: Any) -> str:
    """A layer with its statistics, what it gets, and the norm of its gradients."""
    module = model.get_submodule(name)
    facts = []
    if isinstance(module, LikelihoodNorm):
        mean, std = module.mean.detach(), module.std.detach()
        facts += [f"mu {_range(mean)}", f"sigma {_range(std)}"]
        if module.second_moment is not None:
            facts.append(f"m2 of the step before {_range(module.second_moment)}")
    elif isinstance(weight := getattr(module, "weight", None), Tensor):
        facts.append(f"weights up to {float(weight.detach().abs().max()):.3g}")
    if args and isinstance(args[0], Tensor):
        x = args[0].detach().double()
        good = x[x.isfinite()]
        bad = (
            f" in {x.numel() - good.numel()} of {x.numel()} places not finite, else" if good.numel() < x.numel() else ""
        )
        if good.numel():
            facts.append(f"input{bad} of mean {float(good.mean()):.3g} and std {float(good.std(correction=0)):.3g}")
    gradients = [p.grad.double() for p in module.parameters(recurse=False) if p.grad is not None]
    if gradients:
        facts.append(f"gradient norm {float(torch.nn.utils.get_total_norm(gradients)):.3g}")
    return f"layer {name} ({type(module).__name__}): {', '.join(facts) or 'no statistics'}"


def _range(values: Tensor) -> str:
    return f"{float(values.min()):.3g} to {float(values.max()):.3g}"
