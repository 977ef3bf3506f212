"""Parameter groups, optimizer and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bln_train.norm.statistics import BatchlessStatistics


def parameter_groups(
    model: nn.Module, statistics: BatchlessStatistics, *, weight_decay: float, statistics_lr: float | None
) -> list[dict[str, Any]]:
    """Split a network's parameters into decay, no_decay and statistics groups.

    decay: convolution and linear weights. no_decay: biases, scales and shifts. statistics: means and standard deviations
    that are left to the optimizer, with their own rate `statistics_lr` where given; those that follow a natural gradient
    are in no group. Empty groups are left out.
    """
    apart = {id(p) for p in (*statistics.natural_parameters, *statistics.gradient_parameters)}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in apart]
    own = {} if statistics_lr is None else {"lr": statistics_lr}
    groups = [
        {"name": "decay", "params": [p for p in rest if p.dim() > 1], "weight_decay": weight_decay},
        {"name": "no_decay", "params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0},
        {"name": "statistics", "params": statistics.gradient_parameters, "weight_decay": 0.0, **own},
    ]
    return [group for group in groups if group["params"]]


class MomentumAccumulatingSGD(torch.optim.SGD):
    """SGD with momentum whose weights gather their gradient in the momentum buffer: one weight-sized buffer less.

        begin:     buf = momentum * buf + weight_decay * p;  p.grad = buf, which every backward adds to
        step:      p -= lr * buf;  p.grad = None

    This is torch.optim.SGD up to the order of a sum, and its state dict is the same. Parameters of at most one dimension
    (biases, scales, shifts, statistics) keep gradients of their own, for those who read them, and buf is updated in `step`.
    A weight that no backward reaches has the gradient 0 here, where torch.optim.SGD would leave it as it is.

    With `clip_norm`, every buf, those of the small parameters included, is scaled by min(1, bound / norm) before it is
    applied, and stays so: norm is that of all bufs together, this step's gradient and weight decay in them, and
    bound = clip_norm / (1 - momentum), what a constant gradient of norm clip_norm would lead to.

    Between `begin` and `step` the buffers belong to no step. Nothing may zero, scale or read the weights' gradients there, and
    a step that is given up is not undone here (that would take the memory this saves): go on with `load_state_dict`, or
    `give_up` and copy into the buffers what they held before.

    Args:
        params, lr, momentum, weight_decay: see torch.optim.SGD; one momentum for all groups, above 0 and below 1.
        clip_norm: bound on the momentum's norm in units of a gradient's, None for none.

    Attributes:
        update_norm: () norm of all bufs of the last step before clipping, None before the first.

    Raises:
        ValueError: a group, or one of a loaded state, has no usable momentum, Nesterov momentum or dampening.
        RuntimeError: `begin`, `step` and `state_dict` out of turn.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]] | Iterable[nn.Parameter],
        lr: float,
        *,
        momentum: float,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
    ) -> None:
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
        self.clip_norm = clip_norm
        self.update_norm: Tensor | None = None
        self._gathering: list[Tensor] | None = None  # weights whose gradient is their buffer, from begin to step
        self._check_groups()

    def _check_groups(self) -> None:
        momenta = {group["momentum"] for group in self.param_groups}
        if len(momenta) != 1 or not 0 < min(momenta) < 1:
            raise ValueError(f"gradients gather in one momentum for all, above 0 and below 1, got {sorted(momenta)}")
        for key in ("nesterov", "dampening", "maximize"):
            if any(group[key] for group in self.param_groups):
                raise ValueError(f"{key} needs the gradient apart from the momentum")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._check_groups()

    def state_dict(self) -> dict[str, Any]:
        """That of torch.optim.SGD; raises RuntimeError between `begin` and `step`."""
        if self._gathering is not None:
            raise RuntimeError("a step is under way: the momentum holds part of a gradient")
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of this class or of torch.optim.SGD, and forget a step under way."""
        super().load_state_dict(state_dict)
        self.give_up()

    def give_up(self) -> None:
        """Forget a step under way, if one is, and its gradients; the buffers stay as `begin` and the backwards left them."""
        for p in self._gathering or []:
            p.grad = None
        self._gathering = self.update_norm = None

    def _buffer(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(p)
        buffer: Tensor = state["momentum_buffer"]
        return buffer

    @torch.no_grad()
    def begin(self, *, from_zero: bool = False) -> None:
        """Scale the momentum, add the weight decay, and let gradients gather there; call it before the step's forwards.

        Args:
            from_zero: gather from zero, in a process that gets the sum over all of them before `step`; one of them keeps the rest.

        Raises:
            RuntimeError: a step is under way already, or a weight still has a gradient, which would be lost.
        """
        if self._gathering is not None:
            raise RuntimeError("begin() was called twice: the step before was given up; load a state to go on")
        groups: list[list[Tensor]] = [
            [p for p in group["params"] if p.dim() > 1 and p.requires_grad] for group in self.param_groups
        ]
        if any(p.grad is not None for weights in groups for p in weights):
            raise RuntimeError("a weight has a gradient already: set gradients to None before begin()")
        for group, weights in zip(self.param_groups, groups, strict=True):
            buffers = [self._buffer(p) for p in weights]
            if weights and from_zero:
                torch._foreach_zero_(buffers)
            elif weights:
                torch._foreach_mul_(buffers, group["momentum"])
            if weights and group["weight_decay"] and not from_zero:
                torch._foreach_add_(buffers, weights, alpha=group["weight_decay"])
            for p, buffer in zip(weights, buffers, strict=True):
                p.grad = buffer
        self._gathering = [p for weights in groups for p in weights]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # a backward cannot be repeated
        """Move every parameter and drop the weights' gradients; takes no closure.

        Raises:
            RuntimeError: `begin` was not called, or a weight's gradient is no longer the buffer that it set.
        """
        if self._gathering is None or closure is not None:
            raise RuntimeError(
                "call begin() before the step's forwards, and step() without a closure after its backwards"
            )
        if any(p.grad is not self.state[p]["momentum_buffer"] for p in self._gathering):
            raise RuntimeError("a weight's gradient was replaced after begin(): only backward may change it")
        moved: list[tuple[list[Tensor], list[Tensor], float]] = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            small = [p for p in params if p.dim() <= 1]
            if small:
                gradients = [p.grad for p in small if p.grad is not None]
                if group["weight_decay"]:
                    gradients = list(torch._foreach_add(gradients, small, alpha=group["weight_decay"]))
                buffers = [self._buffer(p) for p in small]
                torch._foreach_mul_(buffers, group["momentum"])
                torch._foreach_add_(buffers, gradients)
            if params:
                moved.append((params, [self._buffer(p) for p in params], group["lr"]))
        every = [buffer for _, buffers, _ in moved for buffer in buffers]
        self.update_norm = torch.nn.utils.get_total_norm(every)
        if self.clip_norm is not None:
            bound = self.clip_norm / (1 - self.param_groups[0]["momentum"])
            torch._foreach_mul_(every, (bound / self.update_norm).clamp(max=1.0))  # on the device: nothing waits
        for params, buffers, lr in moved:
            torch._foreach_add_(params, buffers, alpha=-lr)
        for p in self._gathering:
            p.grad = None
        self._gathering = None


def build_optimizer(groups: Iterable[dict[str, Any]], name: str, lr: float, **settings: Any) -> torch.optim.Optimizer:
    """PyTorch's sgd, adam or adamw, or sgd-into-momentum, over the groups; each remembers its peak rate as `peak_lr`."""
    classes: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "sgd": torch.optim.SGD,
        "sgd-into-momentum": MomentumAccumulatingSGD,
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
    }
    optimizer = classes[name](groups, lr=lr, **settings)
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


class Schedule:
    """The learning rate of a step as a fraction of the peak: a pure function of the step, so there is no state to resume.

    linear warm-up:  (step + 1) / warmup_steps
    cosine:          final + (1 - final) * (1 + cos(pi * t)) / 2, t from 0 to 1 after the warm-up
    step:            gamma ^ (number of milestones passed)

    Args:
        name: "cosine", "step" or "constant".
        steps_per_epoch, epochs: the length of the run.
        warmup_epochs, milestones: in epochs.
    """

    def __init__(
        self,
        name: str,
        *,
        steps_per_epoch: int,
        epochs: int,
        warmup_epochs: float = 0.0,
        final_fraction: float = 0.0,
        milestones: tuple[float, ...] = (),
        gamma: float = 0.1,
    ) -> None:
        self.name, self.final_fraction, self.gamma = name, final_fraction, gamma
        self.num_steps = steps_per_epoch * epochs
        self.warmup_steps = round(warmup_epochs * steps_per_epoch)
        self.milestones = [milestone * steps_per_epoch for milestone in milestones]

    def factor(self, step: int) -> float:
        """Fraction of the peak rate at `step`, from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.name == "cosine":
            t = (step - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps)
            return self.final_fraction + (1 - self.final_fraction) * (1 + math.cos(math.pi * min(t, 1.0))) / 2
        if self.name == "step":
            return float(self.gamma ** sum(step >= milestone for milestone in self.milestones))
        return 1.0

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set every group's rate for `step`; returns the first group's."""
        factor = self.factor(step)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        return float(optimizer.param_groups[0]["lr"])
