"""Convolution, batchless norm, residual sum and activation as one layer; the maths is in fused/function.py."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bln_train.norm.batchless import _BatchlessNorm
from bln_train.norm.fused.constants import measure, measure_once
from bln_train.norm.fused.foldable import fits_residual, keeps_shape, shape_after, why_not_foldable
from bln_train.norm.fused.function import Plan, Step, add_gradient, autocast_dtype, run_chain
from bln_train.norm.fused.parts import Constants, Parts
from bln_train.norm.kernels.backend import backend_for
from bln_train.norm.kernels.convolution import DirectConvolution, direct_convolution
from bln_train.norm.kernels.layout import dense
from bln_train.norm.kernels.library import TYPES, library
from bln_train.norm.kernels.table import Epilogue
from bln_train.norm.replay import Run, addresses, at_once
from bln_train.norm.standardize import RawGradient, StandardizedConv2d, centre_filters, filter_scale, standardize_weight

_LAST = torch.channels_last


class FoldedConvNorm:
    """A linear layer, the batchless norm behind it, a residual sum and a relu, as one operation.

        out = relu(groups(norm(linear(x))) + shortcut(residual))

    It owns no parameters and is no module: `linear`, `norm` and `groups` stay where they are in the network, and so does the
    state dict. Where the norm is in training mode, forwards with gradients fold, and without gradients the same map is computed in
    place. Where it is in eval mode, or the layer does not take inputs of such shapes, the parts run one by one.

    Args:
        linear: Conv1d, Conv2d (of any stride, zero padding, dilation, groups) or Linear, standardised or not; no subclass.
        norm: the layer its output goes to, and nothing else.
        groups: a GroupNorm with scale and shift that follows a norm without them, None for none.
        relu: whether a relu follows.
        shortcut: a linear module without parameters and with an `adjoint` (see models/layers.py), which backward runs again so
            that its result is not kept; None for the identity.
        recompute: backward runs the convolution again, so that training keeps what a network without norms keeps; else its output
            is kept, as with BatchNorm.

    Attributes:
        input_is_free: without gradients the input may be overwritten.
        in_parts: whether to overwrite it then, some images at a time; saves memory, takes time.

    Shapes: x as `linear` takes it (Linear: (N, features)), residual and the result as it gives them.

    Raises:
        ValueError: linear, norm and groups cannot be one operation.

    Source: design of In-Place ABN (Rota Bulo et al., arXiv 1712.02616) for what a backward pass can do without.
    """

    def __init__(
        self,
        linear: nn.Module,
        norm: _BatchlessNorm,
        *,
        groups: nn.GroupNorm | None = None,
        relu: bool = False,
        shortcut: nn.Module | None = None,
        recompute: bool = True,
    ) -> None:
        problem = why_not_foldable(linear, norm)
        if problem:
            raise ValueError(problem)
        if groups is not None and (norm.affine or not groups.affine or groups.num_channels != norm.num_features):
            raise ValueError(
                "groups of channels are folded behind a norm without scale and shift, and have them themselves"
            )
        self.parts = Parts(linear, norm, groups, shortcut, relu)
        self.recompute, self.input_is_free, self.in_parts = recompute, False, True
        self.constants: Constants | None = None
        self._direct: dict[object, DirectConvolution | None] = {}
        self._alone = tuple(
            FoldedChain(Plan((Step(self, 0, residual),), num, (num,))) for num, residual in ((1, None), (2, 1))
        )

    @property
    def linear(self) -> Any:
        """The convolution or linear layer."""
        return self.parts.linear

    @property
    def norm(self) -> _BatchlessNorm:
        """The norm."""
        return self.parts.norm

    @property
    def shortcut(self) -> Any:
        """What the residual passes through, None for nothing."""
        return self.parts.shortcut

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(N, C_in, *spatial), residual (N, C, *spatial') to (N, C, *spatial'); see the class."""
        out = self._alone[0](x) if residual is None else self._alone[1](x, residual)
        assert isinstance(out, Tensor)
        return out

    def run_parts(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """The parts one by one, as the network has them."""
        linear, norm, groups, shortcut, relu = self.parts
        out = norm(linear(x))
        out = out if groups is None else groups(out)
        if residual is not None:
            out = out + (residual if shortcut is None else shortcut(residual))
        return F.relu_(out) if relu else out

    def apply_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The linear operation with another weight and bias."""
        linear = self.parts.linear
        if isinstance(linear, nn.Linear):
            return F.linear(x, weight, bias)
        direct = self._direct_for(x, weight)
        if direct is not None and bias is not None and bias.is_contiguous():
            return direct[0].forward(direct[1], x, weight, bias)
        return torch.convolution(
            x, weight, bias, linear.stride, linear.padding, linear.dilation, False, linear.output_padding, linear.groups
        )

    def linear_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool], gathered: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x, weight and bias from that of the output, `grad`, None for those that `needs` says no to, and for the
        weight's if it was added to `gathered`.
        """
        linear = self.parts.linear
        if isinstance(linear, nn.Linear):
            return (
                grad @ weight if needs[0] else None,
                grad.t() @ x if needs[1] else None,
                grad.sum(0) if needs[2] else None,
            )
        direct = self._direct_for(x, weight)
        if direct is not None and grad.is_contiguous(memory_format=_LAST):
            grad_weight = None
            if needs[1] and (gathered is None or gathered.stride() != weight.stride()):
                grad_weight = gathered = torch.zeros_like(weight)
            grad_x = direct[0].backward(direct[1], grad, x, weight, gathered if needs[1] else None, needs_x=needs[0])
            return grad_x, grad_weight, grad.sum((0, 2, 3)) if needs[2] else None
        return torch.ops.aten.convolution_backward(
            grad, x, weight, [weight.shape[0]], linear.stride, linear.padding, linear.dilation, False,
            linear.output_padding, linear.groups, needs,
        )  # fmt: skip

    def _direct_for(self, x: Tensor, weight: Tensor) -> tuple[DirectConvolution, Any] | None:
        """The kernel's convolution of such tensors, and the kernels, where that is the way to do it."""
        if not (x.is_contiguous(memory_format=_LAST) and weight.is_contiguous(memory_format=_LAST)):
            return None
        key = x.shape, weight.dtype, x.dtype
        if key not in self._direct:
            self._direct[key] = direct_convolution(self.parts.linear, x, weight)
        direct = self._direct[key]
        kernels = None if direct is None else library(TYPES[x.dtype])
        return None if direct is None or kernels is None else (direct, kernels)

    @torch.no_grad()
    def infer(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """The same map without gradients, in the linear operation's own output; part of the probe."""
        norm, following = self.norm, self.norm.take_following()
        if residual is not None and self.shortcut is not None:
            residual = self.shortcut(residual)
        centre = norm.mean.detach()
        weight, iw = self.linear.weight, None
        bias = -centre if self.linear.bias is None else self.linear.bias - centre
        if isinstance(self.linear, StandardizedConv2d) and not weight.requires_grad:  # and so must not move
            weight = standardize_weight(weight)
        elif isinstance(self.linear, StandardizedConv2d):  # as in `fold_once`: no copy of the weight
            centre_filters(weight)
            iw = filter_scale(weight).flatten()
            bias = bias / iw
        out = dense(self._linear_(x, weight, bias.expand(norm.num_features)))
        groups, relu = self.parts.groups, self.parts.relu
        is_last = groups is None
        if following is not None:
            following.normalize_(out, residual if is_last else None, iw, relu=relu and is_last)
        else:
            scale, shift = norm.affine_map()
            shift = torch.addcmul(shift, centre, scale).expand(norm.num_features)
            table = torch.stack((scale if iw is None else scale * iw, shift))
            backend = backend_for(out, table.dtype, residual)
            backend.map_(out, residual if is_last else None, Epilogue(table, relu=relu and is_last))
        if groups is not None:
            gamma, beta = groups.weight.detach(), groups.bias.detach()
            one = torch.ones_like(gamma)
            table = torch.stack((one, beta, one, gamma))  # of xhat itself
            epilogue = Epilogue(table, groups.num_channels // groups.num_groups, groups.eps, relu)
            backend_for(out, table.dtype, residual).map_(out, residual, epilogue)
        return out

    def _linear_(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The linear operation; into x's own memory where nothing else wants x and the shape stays, a quarter at a time."""
        if self.input_is_free and self.in_parts and autocast_dtype(x) is None and keeps_shape(self.linear):
            for part in x.split(max(2, x.shape[0] // 4)):  # of single images PyTorch makes slower convolutions
                part.copy_(self.apply_linear(part, weight, bias))
            return x
        dtype = autocast_dtype(x) or x.dtype
        return self.apply_linear(x.to(dtype), weight.to(dtype), bias.to(dtype))

    def __repr__(self) -> str:
        parts = [type(part).__name__ for part in self.parts[:3] if part is not None]
        return f"FoldedConvNorm({' + '.join([*parts, *(['relu'] if self.parts.relu else [])])})"


class FoldedChain:
    """Folded layers that follow each other, as one operation; owns none of them.

    Args:
        plan: which layer reads what, see fused/function.py.

    Shapes: the plan's inputs to its outputs, a tensor where that is one, else a tuple.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._fits: dict[tuple[torch.Size, ...], bool] = {}
        # Where each value is read last, so that without gradients none outlives its use.
        last = {
            number: n for n, step in enumerate(plan.steps) for number in (step.x, step.residual) if number is not None
        }
        self._dead_after = [
            [number for number, place in last.items() if place == n and number not in plan.outputs]
            for n in range(len(plan.steps))
        ]

    def __call__(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """See the class."""
        plan = self.plan
        fits = self._fit(inputs)
        if fits and torch.is_grad_enabled() and all(step.layer.norm.training for step in plan.steps):
            out = run_chain(plan, [step.layer.constants or measure(step.layer.parts) for step in plan.steps], inputs)
        else:
            out = self._one_by_one(inputs, fits)
        return out if len(out) > 1 else out[0]

    def _one_by_one(self, inputs: tuple[Tensor, ...], fits: bool) -> tuple[Tensor, ...]:
        plan, values = self.plan, dict(enumerate(inputs))
        del inputs
        is_alone = len(plan.steps) == 1
        for n, step in enumerate(plan.steps):
            layer = step.layer
            args = values[step.x], None if step.residual is None else values[step.residual]
            if not fits or not layer.norm.training:
                out = layer.run_parts(*args)
            elif torch.is_grad_enabled() and not is_alone:
                out = layer(*args)
            else:
                out = layer.infer(*args)
            values[plan.num_inputs + n] = out
            del args, out
            for number in self._dead_after[n]:
                del values[number]
        return tuple(values[number] for number in plan.outputs)

    def _fit(self, inputs: tuple[Tensor, ...]) -> bool:
        """Whether each layer takes what it would get."""
        if not all(isinstance(value, Tensor) for value in inputs):
            return False  # a number is added, say
        first = inputs[0]
        if any(value.dtype != first.dtype for value in inputs) and autocast_dtype(first) is None:
            return False  # the sum has another dtype than its parts
        key = tuple(value.shape for value in inputs)
        if key not in self._fits:
            self._fits[key] = self._fit_shapes(key)
        return self._fits[key]

    def _fit_shapes(self, shapes: Sequence[Sequence[int]]) -> bool:
        known: list[Sequence[int]] = list(shapes)
        for step in self.plan.steps:
            shape = shape_after(step.layer.linear, known[step.x])
            if shape is None:
                return False
            # What a shortcut makes of its input fits by itself.
            if (
                step.residual is not None
                and step.layer.shortcut is None
                and not fits_residual(shape, known[step.residual])
            ):
                return False
            known.append(shape)
        return True

    def __repr__(self) -> str:
        return f"FoldedChain({', '.join(repr(step.layer) for step in self.plan.steps)})"


class _Begun(NamedTuple):
    """What `fold_once` works out before the first forward."""

    constants: list[Constants]
    standardized: list[RawGradient]


@contextmanager
def fold_once(layers: Iterable[FoldedConvNorm], run: Run = at_once) -> Iterator[None]:
    """Work out the layers' constants once for all forwards and backwards inside, in which no parameter may change.

    Of standardised convolutions the filters are centred in place, which changes nothing that they compute; the plain filters
    then enter the convolution, their scale goes into the norm's map, and gradients gather in `weight.grad` as if the scale
    were constant, to be projected together at the end: no copy of a weight or of a gradient is ever made. What `weight.grad`
    held on entry passes through untouched. Gradients of the norms' parameters gather apart and are added to theirs at the end. No
    gradient of these layers' parameters passes through autograd: hooks on them are not called. The loss may depend on a
    standardised convolution's weight through these layers alone. What else enters its gradient inside, of a penalty on the weight
    or another layer that shares it, is projected and scaled with the rest, and wrong. Add such a term's gradient after.

    Args:
        run: does what is to be done before and after (norm/replay.py).
    """
    layers = list(layers)
    own_constants = [
        layer.norm.training for layer in layers
    ]  # else the parts run one by one, and autograd has all gradients
    layers = [layer for layer, has in zip(layers, own_constants, strict=True) if has]
    if not layers:
        yield
        return
    weights = list({layer.linear.weight: None for layer in layers})
    learns = tuple(weight.requires_grad for weight in weights)

    def kind(name: str) -> tuple[Hashable, ...]:
        return name, tuple(own_constants), learns, addresses([weight.grad for weight in weights])

    try:
        begun = run(lambda: _begin(layers), lambda: kind("begin fold"), twice=True)
        scales = {gradient.weight: gradient.scale for gradient in begun.standardized}
        for layer, constants in zip(layers, begun.constants, strict=True):
            layer.constants = constants
            if layer.linear.weight in scales:  # for forwards that run the convolution by itself
                layer.linear.constant_scale = scales[layer.linear.weight]
        yield
        _give(layers, run(lambda: _end(begun), lambda: (*kind("end fold"), id(begun))))
    finally:
        for layer in layers:
            layer.constants = None
            if isinstance(layer.linear, StandardizedConv2d):
                layer.linear.constant_scale = None


def _begin(layers: Sequence[FoldedConvNorm]) -> _Begun:
    standardized: dict[Tensor, RawGradient] = {}
    weights: list[Tensor] = []
    scales: list[Tensor | None] = []
    for layer in layers:
        weight, iw = layer.linear.weight, None
        if isinstance(layer.linear, StandardizedConv2d) and not weight.requires_grad:  # and so must not move
            weight = standardize_weight(weight)
        elif isinstance(layer.linear, StandardizedConv2d):
            if weight not in standardized:
                standardized[weight] = RawGradient(weight)
            iw = standardized[weight].scale.flatten()
        weights.append(weight)
        scales.append(iw)
    return _Begun(measure_once([layer.parts for layer in layers], weights, scales), list(standardized.values()))


def _end(begun: _Begun) -> list[tuple[Tensor, ...]]:
    """Project the filters' gradients; returns those of each norm's parameters, as `_give` takes them."""
    for gradient in begun.standardized:
        gradient.project()
    gathered = [own.gradients for own in begun.constants if own.gradients is not None]
    return [own.unbind(0) for own in gathered]


def _give(layers: Sequence[FoldedConvNorm], gradients: Sequence[tuple[Tensor, ...]]) -> None:
    """Add gradients to those of the norms' parameters."""
    for layer, own in zip(layers, gradients, strict=True):
        norm, groups = layer.norm, layer.parts.groups
        of_groups = () if groups is None else (groups.weight, groups.bias)
        parameters = (norm.mean, norm.raw_std, norm.weight, norm.bias, *of_groups)
        for parameter, gradient in zip(parameters, own, strict=True):
            add_gradient(parameter, gradient)
