"""The Triton kernels on the CPU, by Triton's interpreter, against PyTorch's operators; test_triton.py runs this file by itself.

    TRITON_INTERPRET=1 python -m pytest tests/triton_interpreted.py

Triton decides when it is imported whether it interprets, so that a process with other tests cannot.
"""

import itertools
import os

import pytest
import torch
from helpers import largest_difference
from torch import nn

from bln_train.norm import compiled, triton_launch
from bln_train.norm.batchless import BatchlessNorm1d, BatchlessNorm2d
from bln_train.norm.epilogue import Row, activate_, backward, forward_, map_, sums_of
from bln_train.norm.fused import FoldedConvNorm

assert os.environ.get("TRITON_INTERPRET") == "1", "see above"

ACTIVATIONS = ["identity", "relu", "leaky_relu"]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
LAST, FIRST = torch.channels_last, torch.contiguous_format
# More channels than a tile and no multiple of anything, several tiles and parts, single positions, matrices, sequences.
CASES = [
    ((2, 3, 7, 7), LAST),
    ((3, 24, 1, 1), LAST),
    ((1, 100, 7, 7), LAST),
    ((2, 3, 7, 7), FIRST),
    ((2, 24, 13), FIRST),
    ((5, 100), FIRST),
]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Kernels take tensors of the CPU; few programs, so that each has several tiles to add."""
    monkeypatch.setattr(triton_launch, "_TYPES", ("cuda", "cpu"))
    monkeypatch.setattr(triton_launch, "_TILE", 128)
    monkeypatch.setattr(triton_launch, "_MOST_PROGRAMS", 3)
    monkeypatch.setattr(triton_launch, "_FINISH_TILE", 64)
    monkeypatch.setattr(triton_launch, "_FINISH_CHANNELS", 32)
    yield
    compiled.use_compiled(True)


def drawn(case, dtype, seed):
    shape, order = case
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return tensor.contiguous(memory_format=order)


def table_for(channels, dtype, seed=1):
    return drawn(((len(Row), channels), FIRST), torch.float64 if dtype == torch.float64 else torch.float32, seed)


def on_both_paths(run, dtype):
    found = []
    for wanted in (True, False):
        compiled.use_compiled(wanted)
        assert triton_launch.takes(torch.zeros(1, 8, dtype=dtype), table_for(1, dtype).dtype) == wanted
        found.append(run())
    assert largest_difference(*found) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward(case, activation, dtype):
    """Result, sums, likelihood and the sums of watched images, with and without a residual."""
    table = table_for(case[0][1], dtype)

    def run(residual, num_watched):
        z, nll = drawn(case, dtype, 2), table.new_tensor(0.5)
        seen = torch.ones_like(table[:4]) if num_watched else None
        sums = forward_(z, drawn(case, dtype, 3) if residual else None, table, activation, 0.3, nll, num_watched, seen)
        return {"z": z.to(table.dtype), "nll": nll, "sums": sums} | ({} if seen is None else {"seen": seen})

    for residual, num_watched in ((False, 0), (True, 0), (False, 1), (True, 1)):
        on_both_paths(lambda r=residual, n=num_watched: run(r, n), dtype)
