"""What a folded layer is made of, and what its parameters say for one or more forwards. It imports no other module of this room."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from bln_train.norm.batchless import _BatchlessNorm
from bln_train.norm.kernels.table import Epilogue


class Parts(NamedTuple):
    """The modules of a folded layer, which stay where they are in the network."""

    linear: Any
    """Convolution or linear layer."""
    norm: _BatchlessNorm
    groups: nn.GroupNorm | None
    """Groups of channels that are normalised again behind the norm, None for none."""
    shortcut: Any
    """What the residual passes through, None for the identity."""
    relu: bool


class Constants(NamedTuple):
    """What a layer's parameters say; valid until one of them changes."""

    weight: Tensor
    """The linear operation's weight, as it enters it."""
    own_bias: Tensor | None
    """The linear operation's own, as the network has it."""
    bias: Tensor
    """Of the linear operation, so that its output is centred, (C,)."""
    iw: Tensor | None
    """(C,), scale of standardised filters, None where `weight` needs none."""
    epilogue: Epilogue
    gradients: Tensor | None
    """`Gradients.vectors`, where gradients of the norm's parameters gather; those of weight and conv bias are added to theirs at
    once. None to give them all to autograd."""
