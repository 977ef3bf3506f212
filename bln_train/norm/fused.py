"""Convolution, batchless norm, residual sum and activation as one layer; the maths is in norm/fused_function.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bln_train.norm.batchless import _BatchlessNorm
from bln_train.norm.functional import std_slope
from bln_train.norm.fused_function import Constants, _FoldedFunction, affine_, autocast_dtype, dense, flat
from bln_train.norm.standardize import RawGradient, StandardizedConv2d, centre_filters, filter_scale, standardize_weight

Activation = Literal["identity", "relu", "leaky_relu"]
FOLDABLE = (nn.Conv1d, nn.Conv2d, nn.Linear)


class FoldedConvNorm(nn.Module):
    """A linear layer, the batchless norm behind it, a residual sum and an activation, as one operation.

        out = act(norm(linear(x)) + residual)

    It owns no parameters: `linear` and `norm` stay where they are in the network, and so does the state dict. Training
    forwards with gradients fold; without gradients the same map is computed in place; in eval mode with gradients the parts
    run one by one.

    Args:
        linear: Conv1d, Conv2d (of any stride, zero padding, dilation, groups) or Linear, standardised or not.
        norm: the layer its output goes to, and nothing else.
        activation, slope: what follows, identity, relu or leaky relu with a slope in (0, 1).
        output_is_kept: something else keeps the output alive until backward, so keeping it here takes no memory.
        residual_is_kept: the same of the residual.
        input_is_free: without gradients the input may be overwritten.

    Shapes: x as `linear` takes it (Linear: (N, features)), residual and the result as it gives them.

    Source: design of In-Place ABN (Rota Bulo et al., arXiv 1712.02616) for what a backward pass can do without.
    """

    def __init__(
        self,
        linear: nn.Module,
        norm: _BatchlessNorm,
        *,
        activation: Activation = "identity",
        slope: float = 0.0,
        output_is_kept: bool = True,
        residual_is_kept: bool = True,
        input_is_free: bool = False,
    ) -> None:
        super().__init__()
        problem = why_not_foldable(linear, norm)
        if problem:
            raise ValueError(problem)
        if activation == "leaky_relu" and not 0 < slope < 1:
            raise ValueError(f"slope is {slope}; a leaky relu that can be undone has one in (0, 1)")
        self._parts: tuple[Any, _BatchlessNorm] = (linear, norm)  # a tuple: not registered, their owner is the network
        self.activation, self.slope = activation, slope
        self.output_is_kept, self.residual_is_kept = output_is_kept, residual_is_kept
        self.input_is_free = input_is_free
        self.constants: Constants | None = None

    @property
    def linear(self) -> Any:
        """The convolution or linear layer."""
        return self._parts[0]

    @property
    def norm(self) -> _BatchlessNorm:
        """The norm."""
        return self._parts[1]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(N, C_in, *spatial), residual (N, C, *spatial') to (N, C, *spatial'); see the class."""
        linear, norm = self._parts
        if not torch.is_grad_enabled():
            return self._infer(x, residual)
        if not self.training or (isinstance(linear, nn.Linear) and x.dim() != 2):
            out = norm(linear(x))
            return self.activate_(out if residual is None else out + residual)
        constants = self.constants or self.measure(self._weight())
        out, nll = _FoldedFunction.apply(
            x, constants.weight, linear.bias, norm.mean, norm.raw_std, norm.weight, norm.bias, residual, self, constants
        )
        norm.account(nll, out.shape[0], out.numel() // (out.shape[0] * out.shape[1]))
        return out

    def apply_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The linear operation with another weight and bias."""
        linear = self._parts[0]
        if isinstance(linear, nn.Linear):
            return F.linear(x, weight, bias)
        return torch.convolution(
            x, weight, bias, linear.stride, linear.padding, linear.dilation, False, linear.output_padding, linear.groups
        )

    def linear_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x, weight and bias, where needed."""
        linear = self._parts[0]
        if isinstance(linear, nn.Linear):
            return (
                grad @ weight if needs[0] else None,
                grad.t() @ x if needs[1] else None,
                grad.sum(0) if needs[2] else None,
            )
        return torch.ops.aten.convolution_backward(
            grad, x, weight, [weight.shape[0]], linear.stride, linear.padding, linear.dilation, False,
            linear.output_padding, linear.groups, needs,
        )  # fmt: skip

    def activate_(self, v: Tensor) -> Tensor:
        """The activation, in place."""
        if self.activation == "relu":
            return F.relu_(v)
        return F.leaky_relu_(v, self.slope) if self.activation == "leaky_relu" else v

    def activation_backward(self, grad: Tensor, z: Tensor) -> Tensor:
        """Gradient of what enters the activation, from that of its output z; a new tensor but for the identity."""
        if self.activation == "relu":
            return torch.ops.aten.threshold_backward(grad, z, 0)
        if self.activation == "leaky_relu":
            return torch.ops.aten.leaky_relu_backward(grad, z, self.slope, True)
        return grad

    @torch.no_grad()
    def _infer(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """The same map without gradients, in the linear operation's own output; part of the probe."""
        norm = self.norm
        centre = norm.mean.detach().clone()  # following moves it
        weight, iw = self.linear.weight, centre.new_ones(norm.num_features)
        if isinstance(self.linear, StandardizedConv2d):  # as in `fold_once`: no copy of the weight
            centre_filters(weight)
            iw = filter_scale(weight).flatten()
        bias = -centre if self.linear.bias is None else self.linear.bias - centre
        out = dense(self._linear_(x, weight, bias / iw))
        rows, axes = flat(out)
        if norm.probe:
            num = out.numel() // out.shape[1]
            # Centred, so that the mean of squares loses nothing; without a temporary of the output's size.
            square = torch.linalg.vector_norm(rows, dim=axes, dtype=centre.dtype).mul_(iw).square_() / num
            norm.see_probe(rows.sum(axes, dtype=centre.dtype).mul_(iw) / num, square)
        scale, shift = norm.affine_map()
        shift = torch.addcmul(shift, centre, scale)
        affine_(rows, scale * iw, shift.expand(norm.num_features))
        out = self.activate_(out if residual is None else out.add_(residual))
        if norm.probe == "observe" and norm.imputation is not None and self.activation == "relu":
            norm.see_relu(out, residual)
        return out

    def _linear_(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The linear operation; into x's own memory where nothing else wants x and the shape stays, a quarter at a time."""
        if self.input_is_free and autocast_dtype(x) is None and _keeps_shape(self.linear):
            for part in x.split(max(1, x.shape[0] // 4)):
                part.copy_(self.apply_linear(part, weight, bias))
            return x
        dtype = autocast_dtype(x) or x.dtype
        return self.apply_linear(x.to(dtype), weight.to(dtype), bias.to(dtype))

    def _weight(self) -> Tensor:
        linear = self.linear
        return standardize_weight(linear.weight) if isinstance(linear, StandardizedConv2d) else linear.weight

    @torch.no_grad()
    def measure(self, weight: Tensor, iw: Tensor | None = None) -> Constants:
        """Work out the constants for a weight of the linear operation whose filters are still to be scaled by iw, (C,)."""
        linear, norm = self._parts
        std, gamma, beta = norm.std, norm.weight, norm.bias
        bias = (-norm.mean if linear.bias is None else linear.bias - norm.mean).expand(norm.num_features)
        inverse = std.reciprocal().expand(norm.num_features)
        if iw is not None:
            bias, inverse = bias / iw, inverse * iw
        scale = inverse if gamma is None else gamma * inverse
        recompute = self._must_recompute()

        correction = gamma_scale = gamma_shift = None
        if gamma is not None and beta is not None:
            gamma_scale = inverse if recompute else gamma.reciprocal()
            gamma_shift = None if recompute else -beta / gamma
        if norm.correction is not None:
            a, b = norm.correction.unbind(0)
            if recompute:  # q is yc
                correction = torch.stack((scale * a, scale * b * inverse))
            else:
                assert beta is not None
                hidden, alive = torch.zeros_like(beta), torch.ones_like(beta)
                if self.activation == "relu" and norm.imputation is not None:
                    hidden, alive = norm.imputation.unbind(0)
                slope = inverse * b / alive
                correction = torch.stack((scale * a - slope * (beta + hidden), slope))

        # As in norm/functional.py, with sums of yc in the place of sums of xhat.
        per_std = norm.nll_scale / std
        to_raw = per_std * std_slope(norm.raw_std, std, norm.parametrization)
        square = inverse * inverse
        return Constants(
            weight, bias, iw, square, scale, beta, None if correction is None else correction.neg_(),
            gamma_scale, gamma_shift, -per_std * inverse, -to_raw * square, to_raw, recompute,
        )  # fmt: skip

    def _must_recompute(self) -> bool:
        """Whether xhat cannot be read off z - r, or only by keeping what nothing else keeps."""
        norm = self.norm
        if norm.weight is None or not self.residual_is_kept or not self.output_is_kept:
            return True
        if self.activation == "relu" and norm.correction is not None and norm.imputation is None:
            return True
        assert norm.bias is not None
        # xhat = (z - r - beta) / gamma: rounding of z grows by |beta / gamma|. One small gamma is enough.
        tiny = torch.finfo(norm.weight.dtype).eps ** 0.5 * norm.bias.abs().clamp(min=1)
        return bool((norm.weight.abs() < tiny).any())

    def extra_repr(self) -> str:
        """Arguments, as torch.nn layers print theirs."""
        return f"{type(self.linear).__name__} + {type(self.norm).__name__} + {self.activation}"


def why_not_foldable(linear: nn.Module, norm: nn.Module) -> str:
    """Why `linear` and `norm` cannot be one operation; "" if they can."""
    if not isinstance(norm, _BatchlessNorm):
        return f"{type(norm).__name__} is not a batchless norm"
    if not isinstance(linear, FOLDABLE):
        return f"its input comes from {type(linear).__name__}, not from a convolution or linear layer"
    if not isinstance(linear, nn.Linear) and (linear.padding_mode != "zeros" or isinstance(linear.padding, str)):
        return f"the convolution pads by '{linear.padding if isinstance(linear.padding, str) else linear.padding_mode}'"
    if linear.weight.shape[0] != norm.num_features:
        return f"the linear layer has {linear.weight.shape[0]} outputs, the norm {norm.num_features} channels"
    return ""


def _keeps_shape(linear: Any) -> bool:
    """Whether the output has the input's shape."""
    if isinstance(linear, nn.Linear):
        return bool(linear.in_features == linear.out_features)
    return linear.in_channels == linear.out_channels and all(
        stride == 1 and 2 * padding == dilation * (kernel - 1)
        for stride, padding, dilation, kernel in zip(
            linear.stride, linear.padding, linear.dilation, linear.kernel_size, strict=True
        )
    )


@contextmanager
def fold_once(layers: Iterable[FoldedConvNorm]) -> Iterator[None]:
    """Work out the layers' constants once for all forwards and backwards inside, in which no parameter may change.

    Of standardised convolutions the filters are centred in place, which changes nothing that they compute; the plain filters
    then enter the convolution, their scale goes into the norm's map, and gradients gather in `weight.grad` as if the scale
    were constant, to be projected together at the end: no copy of a weight or of a gradient is ever made. What `weight.grad`
    held on entry passes through untouched.
    """
    layers = list(layers)
    standardized: dict[Tensor, RawGradient] = {}
    try:
        for layer in layers:
            linear = layer.linear
            if isinstance(linear, StandardizedConv2d):
                if linear.weight not in standardized:
                    standardized[linear.weight] = RawGradient(linear.weight)
                layer.constants = layer.measure(linear.weight, standardized[linear.weight].scale.flatten())
            else:
                layer.constants = layer.measure(linear.weight)
        yield
        for gradient in standardized.values():
            gradient.project()
    finally:
        for layer in layers:
            layer.constants = None
