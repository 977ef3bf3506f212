"""Pieces that several networks share."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bln_train.rng import keep_mask


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


class InstanceDropout(nn.Module):
    """Dropout whose mask is a function of the image, not of the micro-batch it travels in.

        out = x * keep_mask / (1 - p)

    `seeds`, (N,) int64, is set before each training forward (see `set_instance_seeds`); the same seeds give the same mask,
    however the batch is split. Without seeds (a hand-written loop) it is nn.Dropout. In eval mode the identity.

    Args:
        p: probability of a 0, in [0, 1).
        purpose: distinguishes this layer's draws from other layers'.
    """

    seeds: Tensor | None

    def __init__(self, p: float, purpose: int) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout probability is {p}; it must be in [0, 1)")
        self.p, self.purpose, self.seeds = p, purpose, None

    def forward(self, x: Tensor) -> Tensor:
        """(N, *) to the same shape."""
        if not self.training or self.p == 0:
            return x
        if self.seeds is None:
            return F.dropout(x, self.p)
        assert self.seeds.shape[0] == x.shape[0], "seeds were set for another micro-batch"
        mask = keep_mask(self.seeds, self.purpose, tuple(x.shape[1:]), 1 - self.p)
        return x * mask.to(x.dtype).div_(1 - self.p)

    def extra_repr(self) -> str:
        """Arguments, as torch.nn layers print theirs."""
        return f"p={self.p}"


class InstanceStochasticDepth(InstanceDropout):
    """Stochastic depth (Huang et al. 2016) whose choice belongs to the image: one draw keeps or drops all of its entries.

    Without seeds it is torchvision's, in mode `row`. In eval mode the identity. Arguments of InstanceDropout.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, *) to the same shape."""
        if not self.training or self.p == 0:
            return x
        ones = x.new_ones(x.shape[0], *([1] * (x.dim() - 1)))
        return x * super().forward(ones)


def set_instance_seeds(dropouts: list[InstanceDropout], seeds: Tensor | None) -> None:
    """Hand the images' seeds, (N,) int64 or None, to the dropout layers of a network."""
    for dropout in dropouts:
        dropout.seeds = seeds


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
