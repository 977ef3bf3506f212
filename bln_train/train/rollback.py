"""Tensors and random numbers as they were, for a step that is given up."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_

import torch
from torch import Tensor


class Rollback:
    """The values of some tensors and the state of the random number generators, to be put back bit for bit.

    The copies lie in host memory and are no tensors of training: no memory tracker sees them. On CUDA they are pinned, so
    that taking them waits for nothing.

    Args:
        device: where the tensors are, and whose random numbers are kept beside the CPU's.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._tensors: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._rng = torch.empty(0)
        self._device_rng: Tensor | None = None

    @torch.no_grad()
    def take(self, tensors: Sequence[Tensor]) -> None:
        """Keep the values of `tensors` as they are now, and forget what was kept before."""
        on_cuda = self.device.type == "cuda"
        before, self._tensors = self._tensors, list(tensors)
        with torch._C._DisableTorchDispatch():
            if len(before) != len(self._tensors) or not all(map(is_, before, self._tensors)):
                self._copies = [torch.empty_like(t, device="cpu", pin_memory=on_cuda) for t in self._tensors]
            if self._tensors:
                torch._foreach_copy_(self._copies, self._tensors, non_blocking=on_cuda)
            self._rng = torch.get_rng_state()
            self._device_rng = torch.cuda.get_rng_state(self.device) if on_cuda else None

    @torch.no_grad()
    def restore(self) -> None:
        """Put back the values taken last, into the same tensors; allocates nothing on the device."""
        if self._tensors:
            torch._foreach_copy_(self._tensors, self._copies)
        torch.set_rng_state(self._rng)
        if self._device_rng is not None:
            torch.cuda.set_rng_state(self._device_rng, self.device)
