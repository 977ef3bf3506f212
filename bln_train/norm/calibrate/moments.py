"""Mean and variance of what enters norms, gathered in micro-batches of any size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn

Passes = Literal[1, 2]
MicroBatches = Callable[[], Iterable[Tensor]]


class StopForward(BaseException):
    """The rest of a forward is not needed; no Exception, so that no network catches it as one."""


class Moments:
    """Mean and variance of each channel, in float64, one image's temporaries at a time.

    In one pass, counts, means and squared deviations of images are merged pairwise (Chan et al. 1979). `recentre` begins a
    second pass over the same images, which sums deviations from the mean that the first one found (Chan et al. 1983, eq. 1.7):

        variance = (sum d^2 - (sum d)^2 / count) / count,   d = x - mean
    """

    def __init__(self) -> None:
        self.count = 0
        """Images times positions."""
        self.mean: Tensor | float = 0.0
        """(C,)"""
        self._deviations: Tensor | float = 0.0
        self._shift: Tensor | None = None
        """(C,) sum d of the second pass; None in the first."""

    def add(self, x: Tensor) -> None:
        """Merge in (N, C, *spatial)."""
        for image in x.detach().split(1):
            self._add_rows(image.movedim(1, -1).reshape(-1, x.shape[1]).double())

    def _add_rows(self, rows: Tensor) -> None:
        if self._shift is not None:
            rows = rows - self.mean
            self._shift += rows.sum(0)
            self._deviations = self._deviations + rows.square().sum(0)
            return
        count, mean = rows.shape[0], rows.mean(0)
        delta, total = mean - self.mean, self.count + rows.shape[0]
        self._deviations = self._deviations + (rows - mean).square().sum(0) + delta**2 * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total

    def recentre(self) -> None:
        """Begin the second pass."""
        assert isinstance(self.mean, Tensor)
        self._shift, self._deviations = torch.zeros_like(self.mean), 0.0

    def read(self, *, shared: bool = False) -> tuple[Tensor, Tensor]:
        """Mean and variance, (C,) each, or, shared, of all channels together, (1,)."""
        mean, deviations = self.mean, self._deviations
        assert isinstance(mean, Tensor)
        assert isinstance(deviations, Tensor)
        if self._shift is not None:
            deviations = (deviations - self._shift.square() / self.count).clamp(min=0)
        variance = deviations / self.count
        if shared:
            common = mean.mean(0, keepdim=True)
            return common, (variance + (mean - common) ** 2).mean(0, keepdim=True)
        return mean, variance


@contextmanager
def on_input(norms: Iterable[nn.Module], see: Callable[[nn.Module, Tensor], None]) -> Iterator[None]:
    """Inside, `see(norm, its input)` is called before each use of a norm."""

    def hook(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(norm, args[0] if args else next(iter(kwargs.values())))

    hooks = [norm.register_forward_pre_hook(hook, with_kwargs=True) for norm in norms]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, and each module's own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def observe(
    model: nn.Module,
    micro_batches: MicroBatches,
    uses: Mapping[nn.Module, frozenset[int]],
    passes: Passes,
) -> dict[nn.Module, Moments]:
    """Moments of what enters some norms; `model` runs as it is, no further than the last use that counts.

    Args:
        uses: for each norm which of its uses in a forward count, from 0.
        passes: over the sample, see `Moments`.

    Returns: the moments of each norm; one that no forward reached is left out.
    """
    found = {norm: Moments() for norm in uses}
    wanted = sum(len(counted) for counted in uses.values())
    for n in range(passes):
        if n == 1:
            found = {norm: moments for norm, moments in found.items() if moments.count}
            for moments in found.values():
                moments.recentre()
        for x in micro_batches():
            _observe_one(model, x, uses, found, wanted)
    return {norm: moments for norm, moments in found.items() if moments.count}


def _observe_one(
    model: nn.Module,
    x: Tensor,
    uses: Mapping[nn.Module, frozenset[int]],
    found: Mapping[nn.Module, Moments],
    wanted: int,
) -> None:
    seen: Counter[nn.Module] = Counter()
    num_counted = 0

    def see(norm: nn.Module, x: Tensor) -> None:
        nonlocal num_counted
        counted, n = uses[norm], seen[norm]
        seen[norm] += 1
        if n in counted:
            found[norm].add(x)
            num_counted += 1
            if num_counted == wanted:
                raise StopForward

    with on_input(uses, see), suppress(StopForward):
        model(x)
