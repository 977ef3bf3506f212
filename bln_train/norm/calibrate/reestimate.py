"""Measure a trained network's statistics anew, and let weight and bias take up the change: the function stays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bln_train.norm.batchless import _BatchlessNorm
from bln_train.norm.calibrate.moments import Moments, Passes, evaluating, observe
from bln_train.norm.fused.network import folded_layers


class Reestimate(NamedTuple):
    """What a re-estimation did."""

    kept: list[str]
    """Norms with a channel whose inputs vary by less than eps; such a channel keeps its old standard deviation."""
    unreached: list[str]
    """Norms that the forward did not reach; they stay as they were."""


@torch.no_grad()
def reestimate_statistics(
    model: nn.Module, micro_batches: Callable[[], Iterable[Tensor]], *, passes: Passes = 1
) -> Reestimate:
    """Set each batchless norm's statistics to those of its input over a sample, without changing what the network computes.

        weight' = weight * std' / std
        bias'   = bias + weight * (mean' - mean) / std

    Since no norm's function changes, neither does any norm's input: one evaluation of the sample measures all of them. The
    correction, an average over xhat and the unchanged gradient of the output, is that of the new xhat.

    Args:
        model: evaluated in eval mode; its mode is restored. Not fused.
        micro_batches: called once for each pass; yields the sample as (n, C, H, W) inputs, any n.
        passes: see `Moments`.

    Raises:
        ValueError: a norm has no weight and bias to take up the change, or shares a parameter with another module, the model
            is fused, or the sample is empty or not finite; nothing has changed then.
    """
    layers = {module: name for name, module in model.named_modules() if isinstance(module, _BatchlessNorm)}
    norms: dict[nn.Module, str] = dict(layers.items())
    if folded_layers(model):
        raise ValueError("a fused network's norms never see their input: re-estimate before fuse, or unfuse")
    _check_absorbing(model, layers)
    with evaluating(model):
        found = observe(model, micro_batches, dict.fromkeys(norms), passes)
    if norms and not found:
        raise ValueError("there are no images to re-estimate statistics from")
    broken = [norms[norm] for norm, moments in found.items() if not all(t.isfinite().all() for t in moments.read())]
    if broken:
        raise ValueError(f"the sample drives these norms' inputs beyond all numbers: {', '.join(broken)}")
    kept = [norms[norm] for norm, moments in found.items() if _reestimate(norm, moments)]
    return Reestimate(kept, [name for norm, name in norms.items() if norm not in found])


def _check_absorbing(model: nn.Module, norms: dict[_BatchlessNorm, str]) -> None:
    bare = [name for norm, name in norms.items() if not norm.affine]
    if bare:
        raise ValueError(f"without weight and bias nothing can take up a change of statistics: {', '.join(bare)}")
    owners = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    tied = [name for norm, name in norms.items() if any(owners[id(parameter)] > 1 for parameter in norm.parameters())]
    if tied:
        raise ValueError(f"a parameter belongs to another module too, which would change with it: {', '.join(tied)}")


def _reestimate(norm: nn.Module, moments: Moments) -> bool:
    """Move one norm; True if a channel kept its standard deviation."""
    assert isinstance(norm, _BatchlessNorm)
    assert norm.weight is not None
    assert norm.bias is not None
    old_mean, old_std, old_raw = _copy(norm.mean), _copy(norm.std), norm.raw_std.clone()
    mean, variance = moments.read(shared=norm.share == "layer")
    too_small = variance.sqrt() < norm.eps
    norm.set_statistics(mean.to(norm.mean.dtype), variance.sqrt().to(norm.mean.dtype))
    norm.raw_std.copy_(torch.where(too_small, old_raw, norm.raw_std))
    # From here on with what was stored: rounding and bounds of the parametrisation are taken up too.
    shift, ratio = norm.mean.double() - old_mean, norm.std.double() / old_std
    weight, old_bias = _copy(norm.weight), _copy(norm.bias)
    norm.bias.copy_(old_bias + weight * shift / old_std)
    norm.weight.copy_(weight * ratio)
    if norm.correction is not None:  # A + B * xhat stays what it is, with xhat' = (xhat - shift / old_std) / ratio
        along_one, along_xhat = _copy(norm.correction)
        norm.correction.copy_(torch.stack((along_one + along_xhat * shift / old_std, along_xhat * ratio)))
    return bool(too_small.any())


def _copy(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float64, copy=True)
