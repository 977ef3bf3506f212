"""Memory orders of tensors, and views of them as rows, in which sums and maps of channels are fastest.

Legend as in norm/functional.py: N images, C channels, S positions of an image.
"""

from __future__ import annotations

import torch
from torch import Tensor


def positions_of(tensor: Tensor) -> int:
    """S, of (N, C, *spatial)."""
    return tensor.numel() // (tensor.shape[0] * tensor.shape[1])


def channels_last(tensor: Tensor) -> bool:
    """Whether channels are adjacent in memory, and nothing else is between."""
    return tensor.dim() == 4 and tensor.stride(1) == 1 and tensor.is_contiguous(memory_format=torch.channels_last)


def dense(tensor: Tensor) -> Tensor:
    """The tensor, contiguous or channels-last; a copy only of what is neither."""
    return tensor if channels_last(tensor) else tensor.contiguous()


def in_order_of(tensor: Tensor, model: Tensor) -> Tensor:
    """The tensor in the memory order of `model`; a copy only of what is in another."""
    if tensor is model or tensor.stride() == model.stride():
        return tensor
    return torch.empty_like(model, dtype=tensor.dtype).copy_(tensor)


def by_image(tensor: Tensor) -> tuple[Tensor, int]:
    """Rows of a dense tensor, a view, (N, S, C), or (N, C, S) of a contiguous one; and their axis of positions."""
    if channels_last(tensor):
        n, c, h, w = tensor.shape
        return tensor.as_strided((n, h * w, c), (h * w * c, c, 1)), 1
    return (tensor.unsqueeze(1), 1) if tensor.dim() == 2 else (tensor.flatten(2), 2)


def is_same(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors begin at one address."""
    return tensor is other or tensor.data_ptr() == other.data_ptr()
