"""What computes the epilogue of a folded convolution: one interface, four backends, chosen here.

    eager     PyTorch's operators, the reference; for everything that no kernel takes          eager.py
    native    a kernel in C: CPU, float32 or float64, channels-last or (N, C)                  native.py, epilogue.c
    triton    kernels in Triton: CUDA, low precision included, any dense memory order          triton.py, triton_kernels.py
    fake      the host's part of native or triton with kernels that compute nothing: for plans fake.py

All compute the same up to rounding; eager.py has the formulas, table.py the shapes.
"""

from __future__ import annotations

import functools
from typing import Protocol

import torch
from torch import Tensor

from bln_train.errors import first_line
from bln_train.norm.kernels.eager import Eager
from bln_train.norm.kernels.fake import FakeKernels
from bln_train.norm.kernels.native import Native
from bln_train.norm.kernels.table import (
    Correction,
    Epilogue,
    Gradients,
    ProbeRow,
    Row,
    StateRow,
    kernels_are_wanted,
    pretends,
)
from bln_train.norm.kernels.triton import Triton, takes_tensor


class Backend(Protocol):
    """The epilogue forward and backward. Tensors are (N, C, *spatial), dense, in the memory order of y; shapes as in table.py."""

    def forward(
        self, y: Tensor, z: Tensor, residual: Tensor | None, epilogue: Epilogue, nll: Tensor, probe: tuple[int, Tensor] | None
    ) -> Tensor:  # fmt: skip
        """Write the epilogue of y into z, which may be y.

        Args:
            residual: of y's shape; in another memory order or dtype only where `backend_for` knew it.
            nll: (), gains the likelihood of the N images.
            probe: how many of the first images are the probe's, and (2, C), which gains their sums of y and y^2.

        Returns: each image's sums of y and of y^2, (N, 2, C).
        """

    def map_(self, y: Tensor, residual: Tensor | None, epilogue: Epilogue) -> None:
        """Write the epilogue of y into y, without likelihood; of the table the rows to OUTER are enough."""

    def follow_(
        self, y: Tensor, residual: Tensor | None, probe: Tensor, unit: Tensor | None, eps: float, *, relu: bool
    ) -> Tensor:
        """Follow the probe's moments, and write relu(gamma * (x - mean) / std + beta + residual) into y.

        Args:
            y: (x - mean before) / unit for the layer's input x.
            probe: (len(ProbeRow), C).
            unit: (C,), None for 1.
            eps: the smallest standard deviation.

        Returns: the change of the mean and the new standard deviation, (2, C).
        """

    def backward(
        self, grad_z: Tensor, z: Tensor | None, y: Tensor, sums: Tensor, epilogue: Epilogue, correction: Correction,
        gradients: Gradients,
    ) -> None:  # fmt: skip
        """The way back through `forward`, into `gradients`; the correction's state goes on.

        Args:
            grad_z: gradient of z.
            z: what `forward` gave; None without relu.
            y: what `forward` got.
            sums: what `forward` returned.
        """


EAGER, NATIVE, TRITON, FAKE_TRITON = Eager(), Native(), Triton(), Triton(FakeKernels)
_OLDEST = (7, 0)  # compute capability that Triton supports


def backend_for(y: Tensor, dtype: torch.dtype, *others: Tensor | None) -> Backend:
    """The backend of a layer's pass.

    Args:
        y: decides by its device, dtype and memory order.
        dtype: of the layer's constants.
        others: of y's shape; where one is in another memory order or dtype, Triton's kernels do not take it.
    """
    if pretends("triton") and takes_tensor(y, dtype, *others):
        return FAKE_TRITON
    if y.device.type in TRITON.device_types and takes_tensor(y, dtype, *others) and kernels_are_wanted():
        return EAGER if why_not_triton(y.device) else TRITON
    return NATIVE if NATIVE.takes(y, dtype) else EAGER


def why_not_triton(device: torch.device) -> str:
    """Why no Triton kernel runs on a CUDA device; "" if they do, or are not wanted."""
    if not kernels_are_wanted():
        return ""
    return _trial(torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device)


@functools.cache
def _trial(device: torch.device) -> str:
    """What is wrong with Triton's kernels on a device, "" if nothing: they run once, beside the reference."""
    try:
        if device.type == "cuda" and torch.version.cuda and torch.cuda.get_device_capability(device) < _OLDEST:
            have = ".".join(map(str, torch.cuda.get_device_capability(device)))
            return (
                f"{torch.cuda.get_device_name(device)} has compute capability {have}, below {_OLDEST[0]}.{_OLDEST[1]}"
            )
        pairs = [
            pair
            for size in (0, 5)
            for pair in zip(*(_example(own, device, size) for own in (TRITON, EAGER)), strict=True)
        ]
        close = all(torch.allclose(found, expected, rtol=1e-4, atol=1e-4) for found, expected in pairs)
        return "" if close else "Triton's kernels compute something else than PyTorch on this device"
    except torch.OutOfMemoryError:
        raise  # says nothing of the kernels
    except ImportError as error:
        return f"Triton cannot be imported: {first_line(error)}"
    except Exception as error:  # of its compiler, of the system's, of the driver: whatever it is, there is another way
        return f"Triton failed: {first_line(error)}"


@torch.no_grad()
def _example(backend: Backend, device: torch.device, group_size: int) -> list[Tensor]:
    """All results of one layer of three images and five channels, forward and backward."""
    numbers = torch.arange(float(len(Row) * 5), device=device)
    table = torch.sin(numbers).view(len(Row), 5)
    y, residual, grad_z = (torch.cos(n * numbers[:15] + n).view(3, 5) for n in range(1, 4))
    epilogue = Epilogue(table, group_size, 1e-5, relu=True)
    nll, probe = torch.zeros((), device=device), torch.zeros(2, 5, device=device)
    z = torch.empty_like(y)
    sums = backend.forward(y, z, residual, epilogue, nll, (2, probe))
    mapped, followed = y.clone(), y.clone()
    backend.map_(mapped, None, epilogue)
    found = backend.follow_(followed, residual, table[2 : 2 + len(ProbeRow)].abs(), None, 1e-3, relu=True)
    correction = Correction(table[0, 1].abs(), table[:2].clone(), torch.cos(numbers[: 5 * len(StateRow)]).view(-1, 5))
    gradients = Gradients(
        torch.empty_like(y), torch.empty_like(y), torch.zeros(6 if group_size else 4, 5, device=device)
    )
    backend.backward(grad_z, z, y, sums, epilogue, correction, gradients)
    assert correction.state is not None
    assert gradients.inner is not None
    return [
        z,
        sums,
        nll,
        probe,
        mapped,
        followed,
        found,
        correction.state,
        *(part for part in gradients if part is not None),
    ]
