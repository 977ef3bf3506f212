"""Convolutions, forward and backward, by the compiled kernel and by PyTorch, around the bounds of kernels/convolution.py.

    python benchmarks/convolutions.py [--threads 2] [--repeats 30]

Both take turns; figures are medians in microseconds, and `rule` is what training would take.
"""

import argparse
import ctypes
import statistics
import time

import torch
from torch import nn

from bln_train.norm.kernels.convolution import _Shape, direct_convolution
from bln_train.norm.kernels.library import library
from bln_train.system import machine

LAYERS = [  # channels in, out, side, stride, kernel
    (16, 16, 32, 1, 3),
    (16, 32, 32, 2, 3),
    (32, 32, 16, 1, 3),
    (32, 64, 16, 2, 3),
    (64, 64, 8, 1, 3),
    (64, 64, 32, 1, 3),
    (64, 64, 56, 1, 3),
    (96, 96, 16, 1, 3),
    (128, 128, 16, 1, 3),
    (64, 256, 14, 1, 1),
]


def ours(x, weight, bias, grad, shape, grad_weight):
    """The kernel, whatever its bounds."""
    kernels = library("float")
    y, grad_x = torch.empty_like(grad), torch.empty_like(x)
    threads, where = torch.get_num_threads(), ctypes.addressof(shape)
    kernels.convolve(x.data_ptr(), weight.data_ptr(), bias.data_ptr(), y.data_ptr(), where, threads)
    kernels.convolve_backward(
        grad.data_ptr(), x.data_ptr(), weight.data_ptr(), grad_x.data_ptr(), grad_weight.data_ptr(), where, threads
    )


def theirs(x, weight, bias, grad, conv, grad_weight):
    """PyTorch's, its gradient added to what gathers."""
    geometry = conv.stride, conv.padding, conv.dilation, False, (0, 0), 1
    torch.convolution(x, weight, bias, *geometry)
    found = torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, (True, True, False))
    grad_weight.add_(found[1])


def main():
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("images  in  out  side  stride  kernel    kernel us  PyTorch us  kernel/PyTorch  rule")
    for num_images in (1, 2, 4, 8, 16, 32, 64):
        for c_in, c_out, side, stride, kernel in LAYERS:
            conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2).to(memory_format=torch.channels_last)
            x = torch.randn(num_images, c_in, side, side).contiguous(memory_format=torch.channels_last)
            with torch.no_grad():
                weight, bias, grad = conv.weight.detach(), conv.bias.detach(), conv(x)
            shape = _Shape(
                num_images, side, side, c_in, *grad.shape[2:], c_out, kernel, kernel, stride, conv.padding[0]
            )
            gathers = torch.zeros_like(weight)
            seconds = [], []
            for _ in range(args.repeats + 2):
                for own, work, how in zip(seconds, (ours, theirs), (shape, conv), strict=True):
                    began = time.perf_counter()
                    work(x, weight, bias, grad, how, gathers)
                    own.append(time.perf_counter() - began)
            kernel_us, torch_us = (1e6 * statistics.median(own[2:]) for own in seconds)
            rule = "kernel" if direct_convolution(conv, x, weight) else "PyTorch"
            print(f"{num_images:6} {c_in:3} {c_out:4} {side:5} {stride:7} {kernel:7} {kernel_us:12.0f} {torch_us:11.0f} "
                  f"{kernel_us / torch_us:15.2f}  {rule}")  # fmt: skip
    device = machine.device_name(torch.device("cpu"))
    print(f"medians of {args.repeats}; {device}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
