"""The kernel's convolutions equal PyTorch's, and gradients gather where they should."""

import copy
import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bln_train.norm import BatchlessNorm2d
from bln_train.norm.fused.layer import FoldedConvNorm
from bln_train.norm.kernels.convolution import direct_convolution
from bln_train.norm.kernels.library import library, uses_compiled
from bln_train.norm.kernels.table import use_kernels

pytestmark = pytest.mark.skipif(not uses_compiled(), reason="no C compiler")
LAST = torch.channels_last


def tensors(conv, num_images, side, dtype):
    x = torch.randn(num_images, conv.in_channels, *side, dtype=dtype).contiguous(memory_format=LAST)
    conv = conv.to(dtype=dtype, memory_format=LAST)
    return x, conv.weight.detach(), conv.bias.detach()


def relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.sampled_from([16, 32]), st.sampled_from([16, 48])),
    st.tuples(st.integers(1, 5), st.integers(1, 5)).filter(lambda kernel: kernel != (1, 1)),
    st.integers(1, 3),
    st.integers(0, 3),
    st.tuples(st.integers(1, 33), st.integers(1, 35)),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([torch.float64, torch.float32]),
)
def test_equals_pytorch(channels, kernel, stride, padding, side, num_images, threads, dtype):
    if any(size + 2 * padding < k for size, k in zip(side, kernel, strict=True)):
        return
    torch.manual_seed(0)
    conv = nn.Conv2d(*channels, kernel, stride, padding)
    x, weight, bias = tensors(conv, num_images, side, dtype)
    direct = direct_convolution(conv, x, weight)
    assert direct is not None
    kernels = library("double" if dtype == torch.float64 else "float")
    geometry = conv.stride, conv.padding, conv.dilation, False, (0, 0), 1
    expected = torch.convolution(x, weight, bias, *geometry)
    grad = torch.randn_like(expected).contiguous(memory_format=LAST)
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, (True, True, False))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        y = direct.forward(kernels, x, weight, bias)
        gathers = torch.ones_like(weight)
        found = direct.backward(kernels, grad, x, weight, gathers, needs_x=True)
        torch.set_num_threads(1)
        assert torch.equal(y, direct.forward(kernels, x, weight, bias)), "depends on the number of threads"
    finally:
        torch.set_num_threads(before)
    bound = 1e-13 if dtype == torch.float64 else 3e-6
    assert y.shape == expected.shape
    assert y.is_contiguous(memory_format=LAST)
    assert relative(y, expected) < bound
    assert relative(found, grad_x) < bound
    assert relative(gathers, 1 + grad_weight) < bound
    assert direct.backward(kernels, grad, x, weight, None, needs_x=False) is None


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 16, 3),
        nn.Conv2d(16, 24, 3),
        nn.Conv2d(16, 16, 1),
        nn.Conv2d(16, 16, 3, groups=2),
        nn.Conv2d(16, 16, 3, dilation=2),
        nn.Conv2d(16, 16, 3, stride=(1, 2)),
        nn.Conv2d(16, 16, 3, padding=(1, 2)),
        nn.Conv2d(128, 128, 3),
    ],
    ids=str,
)
def test_what_the_kernel_cannot_do_or_not_fast_is_left_to_pytorch(conv):
    x, weight, _ = tensors(conv, 1, (8, 8), torch.float32)
    assert direct_convolution(conv, x, weight) is None


def test_many_images_and_low_precision_are_left_to_pytorch():
    conv = nn.Conv2d(16, 16, 3, padding=1)
    x, weight, _ = tensors(conv, 1, (32, 32), torch.float32)
    assert direct_convolution(conv, x, weight) is not None
    assert direct_convolution(conv, x.expand(64, -1, -1, -1), weight) is None
    assert direct_convolution(conv, x.bfloat16(), weight.bfloat16()) is None


@pytest.mark.parametrize("is_kept", [True, False], ids=["", "computed again"])
def test_a_folded_layer_is_the_same_with_and_without(is_kept):
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 32, 3, 2, 1).double().to(memory_format=LAST)
    norm = BatchlessNorm2d(32, dtype=torch.float64)
    norm.set_statistics(torch.randn(32).double() / 3, 1 + torch.rand(32).double())
    layers = [
        FoldedConvNorm(*parts, relu=True, recompute=not is_kept)
        for parts in ((conv, norm), copy.deepcopy((conv, norm)))
    ]
    x = torch.randn(3, 16, 9, 9).double().contiguous(memory_format=LAST)
    results = []
    try:
        for layer, compiled in zip(layers, (True, False), strict=True):
            use_kernels(compiled)
            own = x.clone(memory_format=torch.preserve_format).requires_grad_()
            out = layer(own)
            (out.square().sum() + layer.norm.account.nll).backward()
            results.append([out, own.grad, layer.linear.weight.grad, layer.linear.bias.grad, layer.norm.mean.grad])
    finally:
        use_kernels(True)
    for found, expected in zip(*results, strict=True):
        assert relative(found.detach(), expected.detach()) < 1e-12


def test_the_kernel_reads_its_shape_as_it_is_written():
    conv = nn.Conv2d(16, 32, (2, 3), 2, 1)
    x, weight, _ = tensors(conv, 2, (5, 7), torch.float32)
    shape = direct_convolution(conv, x, weight).shape
    assert [getattr(shape, name) for name, _ in shape._fields_] == [2, 5, 7, 16, 3, 4, 32, 2, 3, 2, 1]
    assert ctypes.sizeof(shape) == 11 * ctypes.sizeof(ctypes.c_long)
