"""Convolutions of few small images by a compiled kernel (kernels/convolution.c) instead of PyTorch's.

At one 32x32 image PyTorch's convolutions spend as long on lookup, reordering and allocation as on arithmetic. The
kernel computes the same sums from the tensors as they lie in memory. It adds the filters' gradient to the accumulated
one in place. From some millions of products on, or with wide layers, PyTorch's blocking for caches is faster, and
PyTorch is used.

N are images, C channels, H height, W width.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bln_train.norm.kernels.library import TYPES

# Where the kernel was the faster, forward and backward together, on a processor with AVX2: benchmarks/convolutions.py.
_MOST_PRODUCTS = 2**26
_MOST_WEIGHTS = 40_000
_VECTORS_BYTES = 64  # of channels that the kernel takes at once


class _Shape(ctypes.Structure):
    """`struct shape` of kernels/convolution.c."""

    _fields_ = [
        (name, ctypes.c_long)
        for name in (
            "num_images", "height", "width", "in_channels", "out_height", "out_width", "out_channels", "kernel_height",
            "kernel_width", "stride", "padding",
        )
    ]  # fmt: skip


class DirectConvolution(NamedTuple):
    """A convolution of N images of one size, as the kernel does it."""

    shape: _Shape
    out_size: tuple[int, int, int, int]
    """(N, C_out, H_out, W_out)"""

    def forward(self, kernels: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """x, (N, C_in, H, W), and weight channels-last, bias (C_out,): the output, (N, C_out, H_out, W_out), channels-last."""
        y = torch.empty(self.out_size, dtype=x.dtype, memory_format=torch.channels_last)
        failed = kernels.convolve(
            x.data_ptr(), weight.data_ptr(), bias.data_ptr(), y.data_ptr(), ctypes.addressof(self.shape),
            torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError("a convolution ran out of memory")
        return y

    def backward(
        self, kernels: Any, grad_y: Tensor, x: Tensor, weight: Tensor, grad_weight: Tensor | None, *, needs_x: bool
    ) -> Tensor | None:
        """Add the filters' gradient to grad_weight, of weight's strides, if given; returns that of x where needed."""
        grad_x = torch.empty_like(x) if needs_x else None
        kernels.convolve_backward(
            grad_y.data_ptr(), x.data_ptr(), weight.data_ptr(), None if grad_x is None else grad_x.data_ptr(),
            None if grad_weight is None else grad_weight.data_ptr(), ctypes.addressof(self.shape), torch.get_num_threads(),
        )  # fmt: skip
        return grad_x


def direct_convolution(linear: nn.Module, x: Tensor, weight: Tensor) -> DirectConvolution | None:
    """The kernel's convolution of such tensors with the hyperparameters of `linear`, where it can do that and is the faster."""
    if (
        x.dtype not in TYPES
        or not x.is_cpu
        or weight.dtype != x.dtype
        or not isinstance(linear, nn.Conv2d)
        or x.dim() != 4
    ):
        return None
    num_images, in_channels, height, width = x.shape
    out_channels, _, kernel_height, kernel_width = weight.shape
    vectors = _VECTORS_BYTES // x.dtype.itemsize
    if (
        isinstance(linear.padding, str)
        or linear.groups != 1
        or linear.dilation != (1, 1)
        or in_channels % vectors
        or out_channels % vectors
    ):
        return None
    (stride, stride_w), (padding, padding_w) = linear.stride, linear.padding
    num_taps = kernel_height * kernel_width
    if (
        stride != stride_w
        or padding != padding_w
        or num_taps == 1
        or num_taps * in_channels * out_channels > _MOST_WEIGHTS
    ):
        return None
    out_height, out_width = (
        (size + 2 * padding - kernel) // stride + 1 for size, kernel in ((height, kernel_height), (width, kernel_width))
    )
    num_outputs = num_images * out_height * out_width
    if not 0 < num_outputs * num_taps * in_channels * out_channels <= _MOST_PRODUCTS:
        return None
    shape = _Shape(
        num_images, height, width, in_channels, out_height, out_width, out_channels, kernel_height, kernel_width, stride,
        padding,
    )  # fmt: skip
    return DirectConvolution(shape, (num_images, out_channels, out_height, out_width))
