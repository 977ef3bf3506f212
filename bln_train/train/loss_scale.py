"""The loss scale of fp16, under which small gradients do not vanish."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bln_train.errors import DivergedError

_SMALLEST = 2.0**-14  # far below any scale at which healthy gradients overflow


class LossScale(torch.amp.GradScaler):
    """PyTorch's GradScaler for steps with gradients that no optimizer holds; with enabled=False the scale is 1.

    A step whose gradients overflow is skipped by `step`, and `update` lowers the scale.

    Args:
        device, init_scale, enabled, ...: see torch.amp.GradScaler.
    """

    def unscale(self, optimizer: torch.optim.Optimizer, others: list[Tensor]) -> None:
        """Divide the scale out of every gradient: those of the optimizer's parameters, and `others`.

        Raises:
            DivergedError: gradients overflow at any scale.
        """
        if not self.is_enabled():
            return
        scale = self.get_scale()
        if scale < _SMALLEST:
            raise DivergedError(
                f"fp16 gradients overflow at any loss scale (now {scale:.1e}); training diverged",
                "Lower optimizer.lr, or use train.precision=bf16 or fp32.",
            )
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if others and gradients:
            # `unscale_` looks at the optimizer's gradients alone: one of them has to show the overflow of the others.
            gradients[0] += 0.0 * torch.nn.utils.get_total_norm(others, norm_type=torch.inf)
        self.unscale_(optimizer)
        if others:
            torch._foreach_mul_(others, 1.0 / scale)

    def keep(self) -> None:
        """End a step that was given up for another reason than the scale, which stays."""
        self.update(self.get_scale())

    def restore(self, state: dict[str, Any]) -> None:
        """Take back the `state_dict()` of before a step, wherever in the step this is called."""
        self.load_state_dict(state)
        if self.is_enabled():
            self._per_optimizer_states.clear()  # that gradients were unscaled; no public way resets it alone
