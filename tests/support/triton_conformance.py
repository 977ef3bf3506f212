"""The Triton kernels against PyTorch's operators, on CUDA or by Triton's interpreter on the CPU; test_triton.py runs this file.

    TRITON_INTERPRET=1 python -m pytest tests/support/triton_conformance.py        # without the variable: on CUDA

Triton decides when it is imported whether it interprets, so that a process with other tests cannot.
"""

import os

import pytest
import torch
from conformance import (
    BACKWARD,
    FIRST,
    FOLLOW,
    FORWARD,
    LAST,
    MAP,
    TOLERANCES,
    Back,
    Layer,
    backward,
    check_backward,
    check_follow,
    check_forward,
    check_map,
    check_not_finite,
    check_same_bits,
    compare,
    forward,
)
from torch import nn

from bln_train.norm import BatchlessNorm2d, BatchlessStatistics
from bln_train.norm.fused.layer import FoldedConvNorm
from bln_train.norm.kernels import backend as backends
from bln_train.norm.kernels import triton
from bln_train.norm.kernels.backend import EAGER, TRITON, backend_for
from bln_train.norm.kernels.table import Correction, Gradients, StateRow, use_kernels

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
# Channels that fill no tile, more than one, and one; several tiles, parts and programs; single positions; sequences, matrices.
SHAPES = [
    ((2, 3, 7, 7), LAST, 3),
    ((3, 24, 1, 1), LAST, 6),
    ((1, 40, 2, 3), LAST, 20),
    ((2, 3, 7, 7), FIRST, 1),
    ((3, 1, 2, 2), FIRST, 1),
    ((1, 24, 5), FIRST, 12),
    ((3, 40), FIRST, 20),
]
LAYERS = [
    Layer(shape, order, size * wanted, torch.float64, DEVICE) for shape, order, size in SHAPES for wanted in (0, 1)
]
LAYERS += [
    Layer((2, 3, 7, 7), order, size, dtype, DEVICE)
    for dtype in TOLERANCES
    for order, size in ((LAST, 0), (FIRST, 3))
    if dtype != torch.float64
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Kernels take tensors of the CPU; tiles and programs are so small and few that each path has several."""
    monkeypatch.setattr(TRITON, "device_types", ("cuda", "cpu"))
    for name, value in {"_TILE": 128, "_MOST_PROGRAMS": 3, "_FINISH_TILE": 64, "_FINISH_CHANNELS": 32}.items():
        monkeypatch.setattr(triton, name, value)
    yield
    use_kernels(True)


def some(options, number, step):
    """Each `step`th, beginning with another one for each layer."""
    return options[number % step :: step]


@pytest.mark.parametrize("number", range(len(LAYERS)), ids=[str(layer) for layer in LAYERS])
def test_all_passes_are_those_of_the_reference(number):
    """tests/support/conformance.py: of each layer some ways to run each pass, of all layers every one."""
    layer = LAYERS[number]
    assert takes(layer)
    for there in some(FORWARD, number, 9):
        check_forward(TRITON, layer, there)
    check_map(TRITON, layer, *MAP[number % len(MAP)])
    if layer.group_size == 0:
        check_follow(TRITON, layer, *FOLLOW[number % len(FOLLOW)])
    for back in some(BACKWARD, number, 15):
        check_backward(TRITON, layer, back)


def takes(layer):
    """Whether the kernels take a layer's tensors."""
    y = layer.y()
    return y.device.type in TRITON.device_types and triton.takes_tensor(y, layer.real)


def test_the_trial_finds_nothing():
    """With it the backend is chosen."""
    backends._trial.cache_clear()
    device = torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE)
    assert backends.why_not_triton(device) == ""
    y = LAYERS[0].y()
    assert backend_for(y, torch.float64) is TRITON
    assert backend_for(y, torch.float64, y[:, :1].expand(y.shape)) is not TRITON
    use_kernels(False)
    assert backend_for(y, torch.float64) is EAGER


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, with which the interpreter computes
@pytest.mark.parametrize("group_size", [0, 2])
def test_a_nan_stays_one(group_size):
    """One value in one of several images."""
    check_not_finite(TRITON, Layer((2, 4, 3, 3), LAST, group_size, device=DEVICE))


def test_the_same_bits_every_time():
    """Sums are taken in one order."""
    check_same_bits(TRITON, LAYERS[0]._replace(dtype=torch.float32))


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("num_groups", [0, 2])
def test_folded_layer(num_groups, recompute):
    """Output and gradients of a layer in training, and its output without gradients; with groups of channels too."""
    generator = torch.Generator().manual_seed(1)
    conv, norm = nn.Conv2d(2, 6, 3, padding=1), BatchlessNorm2d(6, affine=not num_groups)
    groups = nn.GroupNorm(num_groups, 6) if num_groups else None
    drawn_ones = [conv, groups or norm]
    for parameter in [norm.mean, norm.raw_std, norm.correction, *(p for part in drawn_ones for p in part.parameters())]:
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    holder = nn.ModuleList([conv, norm, *([groups] if groups else [])]).to(DEVICE, torch.float64)
    holder = holder.to(memory_format=LAST)
    layer = FoldedConvNorm(conv, norm, groups=groups, relu=True, recompute=recompute)
    statistics = BatchlessStatistics(holder)
    of_x, of_z = (Layer((3, channels, 4, 4), device=DEVICE) for channels in (2, 6))

    def run(wanted):
        use_kernels(wanted)
        assert (backend_for(of_z.y(), torch.float64) is TRITON) == wanted
        holder.zero_grad()
        x, r, weights = of_x.y().requires_grad_(), of_z.drawn(3).requires_grad_(), of_z.drawn(4)
        statistics.begin(4, 2)
        z = layer(x, r)
        ((z * weights).sum() + statistics.nll()).backward()
        gradients = {name: p.grad.clone() for name, p in holder.named_parameters() if p.grad is not None}
        gradients["probe"] = norm.account.watched.clone()
        statistics.discard()  # and the statistics' gradients
        with torch.no_grad():
            inferred = layer(x, r)
        return {"z": z.detach(), "inferred": inferred, "x": x.grad, "r": r.grad} | gradients

    compare(of_z, run(wanted=True), run(wanted=False))


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter is slow")
@pytest.mark.parametrize("group_size", [0, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", [LAST, FIRST], ids=str)
def test_as_large_as_layers_are(dtype, order, group_size, monkeypatch):
    """The launch as it is, of a layer of ResNet-50 with more tiles than programs; and within a graph replay."""
    monkeypatch.undo()
    layer = Layer((8, 96, 56, 56), order, group_size, dtype, DEVICE)
    there, back = FORWARD[0], Back(True, "y", "new", True, 0.3)
    compare(layer, forward(TRITON, layer, there), forward(EAGER, layer, there))
    compare(layer, backward(TRITON, layer, back), backward(EAGER, layer, back))
    epilogue, residual, grad_z = layer.epilogue(relu=True), layer.drawn(3), layer.drawn(7)
    running = layer.rows(2, 8)

    def fresh():
        table = epilogue.table
        vectors = torch.zeros(6 if group_size else 4, layer.shape[1], dtype=layer.real, device=DEVICE)
        return layer.y(), table.new_zeros(()), torch.zeros_like(table[:2]), layer.rows(len(StateRow), 9), vectors

    def run(y, nll, probe, state, vectors):
        z, inner = torch.empty_like(y), torch.empty_like(y)
        sums = TRITON.forward(y, z, residual, epilogue, nll, (3, probe))
        correction = Correction(nll, running, state)
        TRITON.backward(grad_z, z, y, sums, epilogue, correction, Gradients(y, inner, vectors))
        return z, inner, sums, y, nll, probe, state, vectors

    expected, kept = run(*fresh()), fresh()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(*kept)
    for own, new in zip(kept, fresh(), strict=True):
        own.copy_(new)
    graph.replay()
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
