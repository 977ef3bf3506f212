"""The Triton kernels against PyTorch's operators, on CUDA or by Triton's interpreter on the CPU; test_triton.py runs this file.

    TRITON_INTERPRET=1 python -m pytest tests/triton_paths.py        # without the variable: on CUDA

Triton decides when it is imported whether it interprets, so that a process with other tests cannot.
"""

import itertools
import math
import os

import pytest
import torch
from bln_train.norm.kernels.epilogue import Row, activate_, backward, forward_, map_, sums_of
from helpers import largest_difference
from torch import nn

from bln_train.norm import BatchlessNorm2d, BatchlessStatistics
from bln_train.norm.fused.layer import FoldedConvNorm
from bln_train.norm.kernels import compiled, triton_launch
from bln_train.norm.kernels.feedback import HORIZON, BalanceRow

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
ACTIVATIONS = ["identity", "relu", "leaky_relu"]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
LAST, FIRST = torch.channels_last, torch.contiguous_format
# Channels that fill no tile, more than one, and one; several tiles, parts and programs; single positions; sequences, matrices.
SHAPES = {
    "last 3": ((2, 3, 7, 7), LAST),
    "last 24": ((3, 24, 1, 1), LAST),
    "last 100": ((1, 100, 2, 3), LAST),
    "first 3": ((2, 3, 7, 7), FIRST),
    "first 1": ((3, 1, 2, 2), FIRST),
    "sequence": ((2, 24, 5), FIRST),
    "matrix": ((5, 100), FIRST),
}
# All activations of one, and of each other one: what differs has nothing to do with them.
CASES = [("last 3", torch.float64, activation) for activation in ACTIVATIONS]
CASES += [(name, torch.float64, ACTIVATIONS[n % 3]) for n, name in enumerate(SHAPES) if name != "last 3"]
CASES += [
    (name, dtype, ACTIVATIONS[n % 3])
    for n, dtype in enumerate(TOLERANCES)
    for name in ("last 3", "first 3")
    if dtype != torch.float64
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Kernels take tensors of the CPU; tiles and programs are so small and few that each path has several."""
    monkeypatch.setattr(triton_launch, "_TYPES", ("cuda", "cpu"))
    for name, value in {"_TILE": 128, "_MOST_PROGRAMS": 3, "_FINISH_TILE": 64, "_FINISH_CHANNELS": 32}.items():
        monkeypatch.setattr(triton_launch, name, value)
    yield
    compiled.use_compiled(True)


def drawn(case, dtype, seed):
    shape, order = SHAPES.get(case, (case, FIRST))
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return tensor.to(DEVICE, dtype).contiguous(memory_format=order)


def tables(case, dtype):
    """A table of constants and sums, in the precision that goes with a tensor's."""
    real, channels = torch.promote_types(dtype, torch.float32), SHAPES[case][0][1]
    table = drawn((len(Row), channels), real, 1)
    table[Row.SPREAD].abs_()
    (num_images, _, *spatial), _ = SHAPES[case]
    sums = drawn((num_images, 2, channels), real, 2)
    sums[:, 1].abs_().mul_(20 * math.prod(spatial))  # some images are so wide that their correction is scaled down
    return table, sums


def correction(table):
    """Prior and state, in which fewer images are to come than do."""
    generator = torch.Generator().manual_seed(7)
    prior, state = (
        torch.randn(rows, table.shape[1], generator=generator, dtype=torch.float64).to(table)
        for rows in (2, len(BalanceRow))
    )
    state[BalanceRow.TO_COME] = HORIZON + 1
    return prior, state


def on_both_paths(run, dtype):
    found = []
    for wanted in (True, False):
        compiled.use_compiled(wanted)
        assert triton_launch.takes(drawn((1, 8), dtype, 1), torch.promote_types(dtype, torch.float32)) == wanted
        found.append({name: value.to(torch.promote_types(dtype, torch.float32)) for name, value in run().items()})
    assert largest_difference(*found) < TOLERANCES[dtype]


@pytest.mark.parametrize(("case", "dtype", "activation"), CASES, ids=str)
def test_forward(case, dtype, activation):
    """Result, sums, likelihood and the sums of watched images, with and without a residual."""
    table, _ = tables(case, dtype)

    def run(residual, num_watched):
        z, nll = drawn(case, dtype, 3), table.new_tensor(0.5)
        seen = torch.ones_like(table[:4]) if num_watched else None
        sums = forward_(z, drawn(case, dtype, 4) if residual else None, table, activation, 0.3, nll, num_watched, seen)
        if seen is not None and activation != "relu":
            seen = seen[:2]  # the rest is defined for a relu
        return {"z": z, "nll": nll, "sums": sums} | ({} if seen is None else {"seen": seen})

    for options in itertools.product((False, True), (0, 1)):
        on_both_paths(lambda o=options: run(*o), dtype)


@pytest.mark.parametrize("case", ["last 3", "sequence"])
def test_sums_and_map_apart(case):
    """What the probe and inference take: a table of two rows, no likelihood."""
    table = tables(case, torch.float64)[0][:2].contiguous()

    def run():
        y = drawn(case, torch.float64, 3)
        sums = sums_of(y, torch.float64)
        map_(y, drawn(case, torch.float64, 4), table, "relu", 0.0)
        return {"sums": sums, "y": y}

    on_both_paths(run, torch.float64)


@pytest.mark.parametrize(("case", "dtype", "activation"), CASES, ids=str)
def test_backward(case, dtype, activation):
    """Both gradients, the four vectors and the correction's state, for q read off z and q given, corrected or not, overwriting or
    not."""
    table, sums = tables(case, dtype)

    def run(residual, given, corrects, overwrite):
        z = activate_(drawn(case, dtype, 3), activation, 0.3)
        grad_out, vectors = drawn(case, dtype, 4), torch.ones_like(table[:4])
        prior, state = correction(table)
        grad, grad_y = backward(
            grad_out, z, drawn(case, dtype, 5) if given else None, drawn(case, dtype, 6) if residual else None, table, sums,
            table.new_tensor(0.3) if corrects or given else None, activation, 0.3, vectors,
            prior=prior if corrects else None, state=state if corrects else None, wants_grad=residual, may_overwrite=overwrite,
        )  # fmt: skip
        assert overwrite or torch.equal(grad_out, drawn(case, dtype, 4))
        assert grad_y.dtype == dtype
        return {"grad_y": grad_y, "vectors": vectors, "state": state} | ({"grad": grad} if residual else {})

    every = list(itertools.product((False, True), repeat=4))
    few = [
        (False, False, True, True),
        (True, False, True, False),
        (True, True, True, True),
        (False, False, False, False),
    ]
    for options in every if case == "last 3" and dtype == torch.float64 else few:
        on_both_paths(lambda o=options: run(*o), dtype)


def test_a_nan_stays_one():
    """A relu may not turn a diverged network into a healthy one; backward passes a gradient's NaN on."""
    table = torch.ones(len(Row), 8, device=DEVICE)
    for activation in ACTIVATIONS:
        z = torch.full((2, 8), torch.nan, device=DEVICE)
        sums = forward_(z, None, table, activation, 0.1, table.new_zeros(()))
        assert bool(z.isnan().all())
        assert bool(sums.isnan().all())
        _, grad_y = backward(
            torch.full_like(z, torch.nan), torch.ones_like(z), None, None, table, torch.zeros_like(sums), None, activation, 0.1,
            torch.zeros_like(table[:4]), prior=None, state=None, wants_grad=False, may_overwrite=False,
        )  # fmt: skip
        assert bool(grad_y.isnan().all())


def test_the_same_bits_every_time():
    """Sums are taken in one order."""
    table, sums = tables("last 3", torch.float32)

    def run():
        z, nll, vectors = drawn("last 3", torch.float32, 3), table.new_zeros(()), torch.zeros_like(table[:4])
        own = forward_(z, None, table, "relu", 0.0, nll)
        prior, state = correction(table)
        backward(
            drawn("last 3", torch.float32, 4), z, None, None, table, sums, nll, "relu", 0.0, vectors, prior=prior, state=state,
            wants_grad=False, may_overwrite=False,
        )  # fmt: skip
        return own, nll, vectors, state

    assert all(map(torch.equal, run(), run()))


@pytest.mark.parametrize("num_groups", [0, 1, 2, 3])
def test_folded_layer(num_groups):
    """Output and gradients of a layer in training, and its output without gradients; with groups of channels too."""
    generator = torch.Generator().manual_seed(1)
    conv, norm = nn.Conv2d(2, 6, 3, padding=1), BatchlessNorm2d(6, affine=not num_groups)
    groups = nn.GroupNorm(num_groups, 6) if num_groups else None
    drawn_ones = [conv, groups or norm]
    for parameter in [norm.mean, norm.raw_std, norm.correction, *(p for part in drawn_ones for p in part.parameters())]:
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    holder = nn.ModuleList([conv, norm, *([groups] if groups else [])]).to(DEVICE, torch.float64)
    holder = holder.to(memory_format=LAST)
    layer, statistics = FoldedConvNorm(conv, norm, channel=groups, activation="relu"), BatchlessStatistics(holder)
    shapes = [(5, channels, 4, 4) for channels in (2, 6, 6)]

    def run():
        holder.zero_grad()
        x, r, weights = (
            drawn(shape, torch.float64, n).contiguous(memory_format=LAST) for n, shape in enumerate(shapes)
        )
        x[1] *= 10  # so wide that its correction is scaled down
        x.requires_grad_(), r.requires_grad_()
        statistics.begin(6, 2)
        z = layer(x, r)
        ((z * weights).sum() + statistics.nll()).backward()
        gradients = {name: p.grad.clone() for name, p in holder.named_parameters()}
        gradients["watched"] = norm.account.watched[:2].clone()
        statistics.discard()  # and the statistics' gradients
        with torch.no_grad():
            inferred = layer(x, r)
        return {"z": z.detach(), "inferred": inferred, "x": x.grad, "r": r.grad} | gradients

    on_both_paths(run, torch.float64)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter is slow")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", [LAST, FIRST], ids=str)
def test_as_large_as_layers_are(dtype, order, monkeypatch):
    """The launch as it is, of a layer of ResNet-50 with more tiles than programs; and within a graph replay."""
    monkeypatch.undo()
    monkeypatch.setitem(SHAPES, "large", ((8, 96, 56, 56), order))
    table, _ = tables("large", dtype)
    residual, grad_out = drawn("large", dtype, 4), drawn("large", dtype, 5)
    prior, start = correction(table)

    compiled.use_compiled(False)
    z = drawn("large", dtype, 3)  # of both paths: in low precision each rounds another entry to 0, whose gradient jumps
    forward_(z, residual, table, "relu", 0.0, table.new_zeros(()))

    def run(y, nll, vectors, seen, state):
        sums = forward_(y, residual, table, "relu", 0.0, nll, 3, seen)
        grad, grad_y = backward(
            grad_out, z, None, residual, table, sums, nll, "relu", 0.0, vectors, prior=prior, state=state, wants_grad=True,
            may_overwrite=False,
        )  # fmt: skip
        return {"y": y, "nll": nll, "vectors": vectors, "seen": seen, "sums": sums, "grad": grad, "grad_y": grad_y}

    def fresh():
        zeros = torch.zeros_like(table[:4])
        return drawn("large", dtype, 3), table.new_zeros(()), zeros, zeros.clone(), start.clone()

    on_both_paths(lambda: run(*fresh()), dtype)
    compiled.use_compiled(True)
    expected, kept = run(*fresh()), fresh()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(*kept)
    for own, new in zip(kept, fresh(), strict=True):
        own.copy_(new)
    graph.replay()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
