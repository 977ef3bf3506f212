"""Parameter groups, optimizer and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from bln_train.norm.batchless import BatchlessStatistics


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


def build_optimizer(groups: Iterable[dict[str, Any]], name: str, lr: float, **settings: Any) -> torch.optim.Optimizer:
    """PyTorch's sgd, adam or adamw over the groups; each group remembers its peak rate as `peak_lr`."""
    classes: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "sgd": torch.optim.SGD,
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
        """Set every group's rate for `step`; returns that of the first group."""
        factor = self.factor(step)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        return float(optimizer.param_groups[0]["lr"])
