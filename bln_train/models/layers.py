"""Pieces that several networks share."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class NormFactory(Protocol):
    """How a network asks for a norm of `num_features` channels over inputs with `num_axes` spatial axes (0 or 2)."""

    def __call__(self, num_features: int, num_axes: int = 2) -> nn.Module: ...  # noqa: D102 - see the class


def init_he(model: nn.Module) -> None:
    """Draw convolution weights from N(0, 2 / fan_out) (He et al. 2015), linear ones from U with variance 1 / fan_in; biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight, a=1.0)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


class ShortcutA(nn.Module):
    """Parameter-free shortcut of He et al. 2015: every `stride`-th pixel, missing channels filled with zeros."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride, self.extra = stride, out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C_out, H / stride, W / stride)."""
        x = x[:, :, :: self.stride, :: self.stride]
        half = self.extra // 2
        return F.pad(x, (0, 0, 0, 0, half, self.extra - half)).contiguous(
            memory_format=torch.channels_last if _is_channels_last(x) else torch.contiguous_format
        )

    def adjoint(self, grad: Tensor, shape: torch.Size) -> Tensor:
        """Gradient of an input of a shape from that of the output: a folded layer runs the shortcut itself, and keeps its input."""
        memory_format = torch.channels_last if _is_channels_last(grad) else torch.contiguous_format
        out = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format).zero_()
        out[:, :, :: self.stride, :: self.stride] = grad.narrow(1, self.extra // 2, shape[1])
        return out


def _is_channels_last(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.shape[1] > 1
