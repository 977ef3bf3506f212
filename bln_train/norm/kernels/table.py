"""The rows of the tables that all backends share, and what describes a layer to them. It imports no other module of ours.

Legend: N images of a micro-batch, C channels, S positions of an image. y, (N, C, *spatial), is the convolution's
output less the mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import NamedTuple

from torch import Tensor

HORIZON = 64.0
"""Images: with less the last ones get more than their share, and add noise from layer to layer (recipes/RESULTS.md)."""
LARGEST_SQUARE = 8.0
"""Mean square of an image's regressors, 1 and xhat together, above which they are scaled down; that of a standard normal is 2."""


class Row(IntEnum):
    """Rows of a layer's constants, (len(Row), C)."""

    INNER = 0
    """Scale of y in the norm's output; with groups of channels it is that of INVERSE."""
    SHIFT = 1
    """Added last: the norm's bias, or that of the groups."""
    INVERSE = 2
    """xhat = inverse * y."""
    OUTER = 3
    """The groups' scale; 1 without groups."""
    NLL_SQUARE = 4
    """nll = sum over channels of nll_square * (sum of y^2) / S + nll_image * N."""
    NLL_IMAGE = 5
    MEAN_MOMENT = 6
    """Gradient of mean per unit of nll = mean_moment * (sum of y) / S."""
    RAW_MOMENT = 7
    """Gradient of raw_std per unit of nll = raw_moment * (sum of y^2) / S + raw_image * N."""
    RAW_IMAGE = 8


class StateRow(IntEnum):
    """Rows of a layer's feedback, (len(StateRow), C); see feedback.py."""

    LEFT_SHIFT = 0
    """Along 1, left over so far."""
    LEFT_SLOPE = 1
    """Along xhat, left over so far."""
    TO_COME = 2
    """Images to come and HORIZON, the same in each channel; infinite where nothing is to be spread."""


class ProbeRow(IntEnum):
    """Rows of what a layer needs to follow the probe, (len(ProbeRow), C), in units of the layer's input; see norm/probe.py."""

    STD = 0
    """Before the step."""
    OLD_VARIANCE = 1
    """Of the probe's images under the old weights."""
    DRIFT = 2
    """mean - mean_old."""
    GAMMA = 3
    BETA = 4


class Epilogue(NamedTuple):
    """What follows a convolution: batchless norm, groups of channels, residual sum, relu."""

    table: Tensor
    """(len(Row), C), dense; sums are taken in its dtype."""
    group_size: int = 0
    """Channels of a group that is normalised again; 0 for no groups."""
    group_eps: float = 0.0
    relu: bool = False


class Correction(NamedTuple):
    """What the way back needs of the loss and of earlier batches."""

    loss_weight: Tensor | None = None
    """() weight of one image in the loss, which is the gradient of the likelihood; None for 0."""
    running: Tensor | None = None
    """(2, C), A and B of earlier batches; None for no correction."""
    state: Tensor | None = None
    """(len(StateRow), C), which goes on from image to image."""

    @property
    def corrects(self) -> bool:
        """Whether anything is taken out of the gradient."""
        return self.loss_weight is not None and self.running is not None


class Gradients(NamedTuple):
    """Where the way back writes."""

    y: Tensor
    """Becomes the gradient of y; may be y itself or the incoming gradient."""
    inner: Tensor | None
    """Becomes g, the gradient of what enters the relu; may be the incoming gradient. None: nobody reads it."""
    vectors: Tensor
    """(4, C), gains the gradients of mean, raw_std, weight and bias of the norm; (6, C) with those of the groups' weight and bias,
    and then the norm's are those of a weight of 1 and a bias of 0."""


_wanted = True
_pretends: frozenset[str] = frozenset()


def use_kernels(wanted: bool) -> None:
    """Let folded layers use compiled kernels where they can (the default), in C or Triton, or PyTorch's operators alone."""
    global _wanted
    _wanted = wanted


def kernels_are_wanted() -> bool:
    """What `use_kernels` was told."""
    return _wanted


def pretends(backend: str) -> bool:
    """Whether the fake backend takes the place of this one."""
    return backend in _pretends


@contextmanager
def pretending(backend: str) -> Iterator[None]:
    """Inside, the kernels of "native" or "triton" are not run: their results are allocated, and hold any value."""
    global _pretends
    before, _pretends = _pretends, _pretends | {backend}
    try:
        yield
    finally:
        _pretends = before
