"""The autograd function of convolutions + batchless norms + residual sums + activations, which keeps inputs and outputs only.

The statistics do not depend on the batch, so the norm is an affine map per channel, and the operation is

    yc = conv(x, w) + (b - mean) / iw        iw: scale of a standardised filter (norm/standardize.py), 1 for a plain one
    z  = act(gamma / std * iw * yc + beta + r)

written into the convolution's own output, with the two sums per channel that the statistics need taken on the way. Backward
needs x, which the layer before keeps as its z, and z. Its convolution takes

    gc = s * (g - p * (A + B * xhat))        g = gz * act'(z),  s = gamma / std * iw,  p: weight of one image in the loss

where (A, B) is the image's correction (norm/balance.py). Where a gradient arrives, xhat is (z - r - beta) / gamma; where a relu cut
it off nothing shows it, and the correction wants it: `correction_mode` "exact" runs the convolution again, "imputed" takes

    h = z - r - beta where z > 0,  else what is expected of gamma * xhat, were it normal, below -(beta + r): `cut_off`

less its mean and over its slope against gamma * xhat, both measured on the probe's images (`imputation` of the norm). So what
stands in for xhat has the mean 0 and xhat's own covariance with xhat: with less, the scale of the layers below would drift, slowly
and always one way, since the loss, too, wants it one way. Times s no gamma is divided by; a layer with a gamma too small
to read xhat from z, or whose z or r nothing else keeps alive, runs its convolution again.

Where normalisation over groups of channels of each image stands between norm and activation (kernels/channel.py), the convolution
is always run again.

Layers that follow each other are one function: between them no node of the autograd engine is visited, what is saved is let go
layer by layer, and a gradient that nobody else can see is overwritten by the next. Its values are numbered, the inputs first,
then the output of each step.

Legend: N images, C channels, other shapes as in norm/functional.py; "per channel" is (C,).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bln_train.norm.kernels import channel
from bln_train.norm.kernels.epilogue import backward, forward_, likelihood_backward
from bln_train.norm.kernels.layout import dense, positions_of


class Constants(NamedTuple):
    """What a layer's parameters say; valid until one of them changes."""

    weight: Tensor
    """The linear operation's weight, as it enters it."""
    own_bias: Tensor | None
    """The linear operation's own, as the network has it."""
    bias: Tensor
    """Of the linear operation, so that its output is centred, (C,)."""
    iw: Tensor | None
    """(C,), scale of standardised filters, None where `weight` needs none."""
    table: Tensor
    """(len(Row), C), see kernels/epilogue.py."""
    corrects: bool
    """Whether there is a correction."""
    recompute: bool
    """Whether backward's q is yc, computed again, or read off z."""
    gradients: Tensor | None
    """(4, C), where gradients of mean, raw_std, gamma and beta gather, those of weight and conv bias being added to theirs at
    once, or (6, C) with those of scale and shift of groups of channels; None to give them all to autograd."""


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
            groups = step.layer.channel
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
        nll = torch.zeros((), dtype=constants[0].table.dtype, device=anchor.device)
        saved: list[Tensor | None] = []
        sizes = []
        for step, own in zip(plan.steps, constants, strict=True):
            layer, norm = step.layer, step.layer.norm
            x, weight, bias = values[step.x], own.weight, own.bias
            residual = None if step.residual is None else values[step.residual]
            low_weight = weight
            if dtype is not None:
                x, low_weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
            z = dense(layer.apply_linear(x, low_weight, bias))
            kept_residual = None if own.recompute else residual
            if residual is not None:
                residual = residual if layer.shortcut is None else layer.shortcut(residual)
                residual = residual if residual.shape == z.shape else residual.expand(z.shape)
            num_images, num_positions = len(z), positions_of(z)
            account = norm.account
            num_watched, watched = 0, None
            if account.is_open:
                shows_relu = layer.activation == "relu" and layer.channel is None
                num_watched, watched = norm.watch(num_images, num_positions, own.iw, shows_relu)
            norm.count(num_images, num_positions)
            if layer.channel is None:
                sums = forward_(z, residual, own.table, layer.activation, layer.slope, nll, num_watched, watched)
            else:
                sums = channel.forward_(
                    z, residual, own.table, layer.channel, layer.activation, layer.slope, nll, num_watched, watched
                )
            values.append(z)
            keeps_z = layer.activation != "identity" or not own.recompute
            saved += (x, weight, z if keeps_z else None, kept_residual, sums)
            sizes.append((num_images, num_positions))
        ctx.save_for_backward(*saved)
        ctx.plan, ctx.constants, ctx.sizes = plan, constants, sizes
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
            step, own = plan.steps[n], ctx.constants[n]
            layer = step.layer
            x, weight, z, residual, sums = saved[-5:]
            del saved[-5:]
            first = plan.num_inputs + n * _PER_STEP
            vectors = own.gradients
            if vectors is None:
                num = 4 if layer.channel is None else 6
                vectors = torch.zeros(num, own.table.shape[1], dtype=own.table.dtype, device=own.table.device)
            grad, is_own = gradients.pop(plan.num_inputs + n)
            if grad is None:
                if grad_nll is not None:
                    num_images, num_positions = ctx.sizes[n]
                    likelihood_backward(own.table, sums, grad_nll, num_images, num_positions, vectors)
            else:
                low = weight if x.dtype == weight.dtype else weight.to(x.dtype)
                given = None
                if own.recompute and (own.corrects or layer.norm.weight is not None or layer.channel is not None):
                    bias = own.bias if own.bias.dtype == x.dtype else own.bias.to(x.dtype)
                    given = dense(layer.apply_linear(x, low, bias))
                if residual is not None:
                    residual = residual if layer.shortcut is None else layer.shortcut(residual)
                    residual = residual if residual.shape == grad.shape else residual.expand(grad.shape)
                wants_grad = step.residual is not None and (step.residual >= plan.num_inputs or needs[step.residual])
                if layer.channel is None:
                    grad, grad_y = backward(
                        grad, z, given, residual, own.table, sums, grad_nll, layer.activation, layer.slope, vectors,
                        prior=layer.norm.correction, state=layer.norm.balance, wants_grad=wants_grad, may_overwrite=is_own,
                    )  # fmt: skip
                else:
                    assert given is not None
                    grad, grad_y = channel.backward(
                        grad, z, given, own.table, sums, grad_nll, layer.channel, layer.activation, layer.slope, vectors,
                        prior=layer.norm.correction, state=layer.norm.balance, wants_grad=wants_grad, may_overwrite=is_own,
                    )  # fmt: skip
                del z, given, residual
                if wants_grad and step.residual is not None:
                    is_own = is_own or layer.activation != "identity"
                    shape = ctx.shapes[step.residual]
                    if layer.shortcut is not None:
                        grad, is_own = layer.shortcut.adjoint(grad, shape), True
                    if grad.shape != shape:  # it was broadcast
                        grad, is_own = grad.sum_to_size(shape), True
                    gradients.add(step.residual, grad, is_own=is_own)
                del grad
                needs_x = step.x >= plan.num_inputs or needs[step.x]
                needs_bias = own.own_bias is not None and own.own_bias.requires_grad
                # At once: held until the chain ends gradients would take the memory of its weights.
                gathered = None if own.gradients is None or low is not weight else weight.grad
                grad_x, grad_weight, grad_bias = layer.linear_backward(
                    grad_y, x, low, (needs_x, weight.requires_grad, needs_bias), gathered
                )
                del grad_y
                if grad_x is not None:
                    kind = ctx.dtypes[step.x]
                    gradients.add(step.x, grad_x if grad_x.dtype == kind else grad_x.to(kind), is_own=True)
                if grad_weight is not None and low is not weight:
                    grad_weight = grad_weight.to(weight.dtype)
                if grad_bias is not None:
                    grad_bias = grad_bias.to(vectors.dtype)
                    grad_bias = grad_bias if own.iw is None else grad_bias / own.iw
                if own.gradients is None:
                    of_parameters[n * _PER_STEP : n * _PER_STEP + 2] = grad_weight, grad_bias
                else:
                    add_gradient(weight, grad_weight)
                    add_gradient(own.own_bias, grad_bias)
                del grad_weight, grad_bias, gathered
            if own.gradients is None:
                reached = (grad_nll is not None, grad_nll is not None, True, True, True, True)
                for place, value in enumerate(split_gradients(layer.norm.share, vectors)):
                    if needs[first + 2 + place] and reached[place]:
                        of_parameters[n * _PER_STEP + 2 + place] = value
        of_inputs = [gradients.pop(number)[0] for number in range(plan.num_inputs)]
        return None, None, None, *of_inputs, *of_parameters


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


def split_gradients(share: str, vectors: Tensor) -> tuple[Tensor, ...]:
    """Gradients of mean, raw_std and the others, of their shapes, from (4, C) or (6, C)."""
    mean, raw_std, *others = vectors.unbind(0)
    if share == "layer":
        mean, raw_std = mean.mean(0, keepdim=True), raw_std.mean(0, keepdim=True)
    return mean, raw_std, *others


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The precision in which autocast runs a convolution of x now, None outside autocast."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
