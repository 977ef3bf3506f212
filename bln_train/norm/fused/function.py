"""The autograd function of convolutions + batchless norms + groups of channels + residual sums + relus, run as one.

The statistics do not depend on the batch, so the norm is an affine map per channel. The operation is

    y = conv(x, w) + (b - mean) / iw
    z = relu(gamma / std * iw * y + beta + residual)

with iw the scale of a standardised filter (norm/standardize.py), 1 for a plain one. The statistics need two sums per
channel, which are taken in the same pass. Backward needs z, and x, which the layer before keeps as its z. Backward
gives the convolution's own backward

    gradient of y = s * (g - p * (A + B * xhat))      g = gz * relu'(z),  s = gamma / std * iw

where gz is the gradient of z, (A, B) the image's correction (kernels/feedback.py), and p its weight in the loss.
kernels/eager.py has the same with groups of channels.

The correction needs xhat = iw / std * y. With `recompute` z is written over y, and backward runs the convolution again.
Then nothing is kept that a network without norms does not keep. Without `recompute` y is kept beside z, which is what
BatchNorm keeps.

Successive layers are one function, a chain, for three reasons. The autograd engine visits no node between them. Saved
tensors are freed layer by layer. A gradient that nothing else can read is overwritten by the next one.

The values of a chain are numbered, the inputs first, then the output of each step. Symbols and shapes are those of
docs/method.md; "per channel" is (C,).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bln_train.norm.fused.parts import Constants
from bln_train.norm.kernels.backend import backend_for
from bln_train.norm.kernels.eager import likelihood_backward
from bln_train.norm.kernels.layout import dense, in_order_of, positions_of
from bln_train.norm.kernels.table import Correction, Gradients


class Step(NamedTuple):
    """One layer of a chain, and the values that it reads."""

    layer: Any
    """FoldedConvNorm"""
    x: int
    residual: int | None


class Plan(NamedTuple):
    """What a chain computes; see the top for the numbers."""

    steps: tuple[Step, ...]
    num_inputs: int
    outputs: tuple[int, ...]
    """Values that others want."""


def run_chain(plan: Plan, constants: list[Constants], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Training forward of the layers of a plan, with gradients: the values that `plan.outputs` names.

    Leaves the likelihood in the last layer's norm, and each layer's count in its own.
    """
    parameters: list[Tensor | None] = []
    for step, own in zip(plan.steps, constants, strict=True):
        norm = step.layer.norm
        if own.gradients is None:
            groups = step.layer.parts.groups
            of_groups = (None, None) if groups is None else (groups.weight, groups.bias)
            parameters += (own.weight, own.own_bias, norm.mean, norm.raw_std, norm.weight, norm.bias, *of_groups)
        else:
            parameters += (None,) * _PER_STEP
    anchor = torch.empty((), device=inputs[0].device, requires_grad=True)  # statistics move even if nothing else does
    *out, nll = _ChainFunction.apply(plan, constants, anchor, *inputs, *parameters)
    plan.steps[-1].layer.norm.account.take(nll)
    return tuple(out)


_PER_STEP = 8  # parameters of a step: weight, conv bias, mean, raw_std, gamma, beta, scale and shift of groups


class _ChainFunction(torch.autograd.Function):
    """plan, constants of its steps, anchor, inputs, parameters of its steps -> outputs, nll."""

    @staticmethod
    def forward(
        ctx: Any, plan: Plan, constants: list[Constants], anchor: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        # At micro-batch 1 every call costs as much as its arithmetic: none is made that does nothing.
        values = list(tensors[: plan.num_inputs])
        dtype = autocast_dtype(values[0])
        nll = torch.zeros((), dtype=constants[0].epilogue.table.dtype, device=anchor.device)
        saved: list[Tensor | None] = []
        for step, own in zip(plan.steps, constants, strict=True):
            x, residual = values[step.x], None if step.residual is None else values[step.residual]
            x = x if dtype is None else x.to(dtype)
            y, z, sums = _forward(step.layer, own, x, residual, nll)
            values.append(z)
            saved += (x, own.weight, z if own.epilogue.relu else None, None if y is z else y, sums)
        ctx.save_for_backward(*saved)
        ctx.plan, ctx.constants = plan, constants
        ctx.dtypes, ctx.shapes = [value.dtype for value in values], [value.shape for value in values]
        ctx.set_materialize_grads(False)
        return *[values[number] for number in plan.outputs], nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_out: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        *grads_of_outputs, grad_nll = grads_out
        saved = list(ctx.saved_tensors)
        # Unless the graph is kept; from here on each is let go after its use. Undocumented, and what torch.compile does.
        ctx.maybe_clear_saved_tensors()
        needs = ctx.needs_input_grad[3:]
        gradients = _Gradients()
        for number, grad in zip(plan.outputs, grads_of_outputs, strict=True):
            gradients.add(number, grad, is_own=False)
        del grads_out, grads_of_outputs
        of_parameters: list[Tensor | None] = [None] * (_PER_STEP * len(plan.steps))
        for n in reversed(range(len(plan.steps))):
            own, first = ctx.constants[n], plan.num_inputs + n * _PER_STEP
            kept = _Kept(*saved[-5:])
            del saved[-5:]
            way = _WayBack(plan, n, own, needs, grad_nll, ctx.dtypes, ctx.shapes)
            grad_weight, grad_bias = way.run(gradients, kept)
            del kept
            if own.gradients is None:
                of_parameters[n * _PER_STEP : n * _PER_STEP + 2] = grad_weight, grad_bias
                reached = (grad_nll is not None, grad_nll is not None, True, True, True, True)
                for place, value in enumerate(way.vectors.unbind(0)):
                    if needs[first + 2 + place] and reached[place]:
                        of_parameters[n * _PER_STEP + 2 + place] = value
            else:
                add_gradient(own.weight, grad_weight)
                add_gradient(own.own_bias, grad_bias)
            del grad_weight, grad_bias
        of_inputs = [gradients.pop(number)[0] for number in range(plan.num_inputs)]
        return None, None, None, *of_inputs, *of_parameters


def _forward(
    layer: Any, own: Constants, x: Tensor, residual: Tensor | None, nll: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """y, z and their sums, (N, 2, C), of one layer; y is z where backward computes it again."""
    norm, shortcut = layer.norm, layer.shortcut
    low = (own.weight, own.bias) if x.dtype == own.weight.dtype else (own.weight.to(x.dtype), own.bias.to(x.dtype))
    y = dense(layer.apply_linear(x, *low))
    if residual is not None:
        residual = residual if shortcut is None else shortcut(residual)
        residual = residual if residual.shape == y.shape else residual.expand(y.shape)
    num_positions = positions_of(y)
    probe = norm.watch(len(y), num_positions, own.iw) if norm.account.is_open else None
    norm.count(len(y), num_positions)
    z = y if layer.recompute else torch.empty_like(y)
    backend = backend_for(y, own.epilogue.table.dtype, residual)
    return y, z, backend.forward(y, z, residual, own.epilogue, nll, probe)


class _Kept(NamedTuple):
    """What a layer keeps for backward."""

    x: Tensor
    weight: Tensor
    z: Tensor | None
    """None without a relu."""
    y: Tensor | None
    """None to compute it again."""
    sums: Tensor


class _WayBack:
    """One layer's part of a chain's backward.

    Args:
        plan, n: the chain, and the layer's number in it.
        needs: whether each input of the chain, and each parameter, needs a gradient.
        grad_nll: () gradient of the likelihood.
        dtypes, shapes: of the chain's values.
    """

    def __init__(
        self,
        plan: Plan,
        n: int,
        own: Constants,
        needs: Sequence[bool],
        grad_nll: Tensor | None,
        dtypes: Any,
        shapes: Any,
    ) -> None:
        self.step, self.layer, self.own, self.grad_nll = plan.steps[n], plan.steps[n].layer, own, grad_nll
        self.number, self.num_inputs = plan.num_inputs + n, plan.num_inputs
        self.needs, self.dtypes, self.shapes = needs, dtypes, shapes
        table, num = own.epilogue.table, 6 if own.epilogue.group_size else 4
        vectors = own.gradients
        self.vectors = (
            torch.zeros(num, table.shape[1], dtype=table.dtype, device=table.device) if vectors is None else vectors
        )

    def run(self, gradients: _Gradients, kept: _Kept) -> tuple[Tensor | None, Tensor | None]:
        """Take the gradient of the layer's output and add those of its inputs; returns those of weight and conv bias.

        The latter are None where they were added to where they gather.
        """
        grad, is_own = gradients.pop(self.number)
        if grad is None:
            if self.grad_nll is not None:
                positions = self.shapes[self.number][2:].numel()
                likelihood_backward(self.own.epilogue.table, kept.sums, self.grad_nll, positions, self.vectors)
            return None, None
        weight = kept.weight
        low = weight if kept.x.dtype == weight.dtype else weight.to(kept.x.dtype)
        grad_y = self._through_epilogue(gradients, grad, kept, low, is_own=is_own)
        del grad
        needs_bias = self.own.own_bias is not None and self.own.own_bias.requires_grad
        # At once: held until the chain ends gradients would take the memory of its weights.
        gathered = None if self.own.gradients is None or low is not weight else weight.grad
        grad_x, grad_weight, grad_bias = self.layer.linear_backward(
            grad_y, kept.x, low, (self._needs(self.step.x), weight.requires_grad, needs_bias), gathered
        )
        del grad_y
        if grad_x is not None:
            gradients.add(self.step.x, grad_x.to(self.dtypes[self.step.x]), is_own=True)
        if grad_weight is not None and low is not weight:
            grad_weight = grad_weight.to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(self.vectors.dtype)
            grad_bias = grad_bias if self.own.iw is None else grad_bias / self.own.iw
        return grad_weight, grad_bias

    def _needs(self, number: int) -> bool:
        return number >= self.num_inputs or bool(self.needs[number])

    def _through_epilogue(
        self, gradients: _Gradients, grad: Tensor, kept: _Kept, low: Tensor, *, is_own: bool
    ) -> Tensor:
        """The gradient of y; adds that of the residual."""
        own, norm, residual = self.own, self.layer.norm, self.step.residual
        y = kept.y
        if y is None:
            y = dense(
                self.layer.apply_linear(
                    kept.x, low, own.bias if own.bias.dtype == low.dtype else own.bias.to(low.dtype)
                )
            )
        in_order = in_order_of(grad, y)
        grad, is_own = in_order, is_own or in_order is not grad
        z = None if kept.z is None else in_order_of(kept.z, y)
        wants_inner = residual is not None and self._needs(residual)
        inner, grad_y = None, y
        if wants_inner and own.epilogue.relu:
            inner = grad if is_own else torch.empty_like(grad)
        if kept.y is not None:  # another backward may want it again
            grad_y = grad if is_own and not wants_inner and grad.dtype == y.dtype else torch.empty_like(y)
        correction = Correction(self.grad_nll, norm.correction, norm.feedback)
        backend = backend_for(y, own.epilogue.table.dtype, grad)
        backend.backward(grad, z, y, kept.sums, own.epilogue, correction, Gradients(grad_y, inner, self.vectors))
        if wants_inner and residual is not None:
            self._give_residual(
                gradients, residual, grad if inner is None else inner, is_own=is_own or inner is not None
            )
        return grad_y

    def _give_residual(self, gradients: _Gradients, residual: int, grad: Tensor, *, is_own: bool) -> None:
        shape, shortcut = self.shapes[residual], self.layer.shortcut
        if shortcut is not None:
            grad, is_own = shortcut.adjoint(grad, shape), True
        if grad.shape != shape:  # it was broadcast
            grad, is_own = grad.sum_to_size(shape), True
        gradients.add(residual, grad, is_own=is_own)


def add_gradient(parameter: Tensor | None, grad: Tensor | None) -> None:
    """Add to a parameter's gradient, in place where it has one."""
    if parameter is not None and grad is not None and parameter.requires_grad:
        if parameter.grad is None:
            parameter.grad = grad
        else:
            parameter.grad.add_(grad)


class _Gradients:
    """Gradients of a chain's values on the way back."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[Tensor, bool]] = {}

    def add(self, number: int, grad: Tensor | None, *, is_own: bool) -> None:
        """Add to the gradient of a value; `is_own`: nobody else sees the tensor, so it may be overwritten."""
        if grad is None:
            return
        other, other_is_own = self._found.get(number, (None, False))
        if other is None:
            self._found[number] = grad, is_own
        elif other_is_own:
            other.add_(grad)
        elif is_own:
            self._found[number] = grad.add_(other), True
        else:
            self._found[number] = grad + other, True

    def pop(self, number: int) -> tuple[Tensor | None, bool]:
        """Take out the gradient of a value, and whether it may be overwritten."""
        return self._found.pop(number, (None, False))


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The precision in which autocast runs a convolution of x now, None outside autocast."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
