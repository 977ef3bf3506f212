"""What follows a stream of numbers: norms whose statistics are its mean and standard deviation, and how far off they are.

Every stream and repetition is a channel of one layer, so all are estimated side by side. The published layer sums the likelihood
over channels, so each is a layer of one channel by itself. Everything is float64: an error is the method's, not rounding's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from bln_train.norm.base import LikelihoodNorm
from bln_train.norm.batchless import BatchlessNorm1d
from bln_train.norm.statistics import BatchlessStatistics
from bln_train.paper.layer import PaperNorm1d, Parametrization

_OPTIMIZERS: dict[str, type[torch.optim.SGD] | type[torch.optim.Adam]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
}


class Cell(NamedTuple):
    """One estimator of a grid."""

    name: str
    """natural, sgd, adam, batchnorm or exact."""
    parametrization: str | None
    """Of the published layer, which sgd and adam move; None for the others."""
    rate: float | None


class Start(NamedTuple):
    """Where every estimate begins, in the stream's units."""

    mean: float
    std: float
    eps: float
    """The smallest standard deviation of a layer."""


class Truth(NamedTuple):
    """What a stream is made of."""

    mean: Tensor
    """(T,) mean of each sample's distribution."""
    std: Tensor
    """(T,) its standard deviation."""


class _Batchless:
    """Batchless layers, each moved as its cell says."""

    def __init__(self, cells: Sequence[Cell], samples: Tensor, start: Start) -> None:
        self.layers = {cell: _layer(cell, samples, start) for cell in cells}
        self.statistics = BatchlessStatistics(nn.ModuleList(self.layers.values()))
        self.optimizers = []
        for name, optimizer in _OPTIMIZERS.items():
            groups = [
                {"params": [layer.mean, layer.raw_std], "lr": cell.rate}
                for cell, layer in self.layers.items()
                if cell.name == name
            ]
            if groups:
                self.optimizers.append(optimizer(groups, lr=1.0, foreach=True))  # each group has its own rate

    def update(self, batch: Tensor) -> None:
        """One step from a batch, (N, C)."""
        for layer in self.layers.values():
            layer(batch)
        nll = self.statistics.nll()
        if isinstance(nll, Tensor):
            (nll / batch.shape[0]).backward()
        self.statistics.update(batch.shape[0])
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def estimates(self) -> dict[Cell, Tensor]:
        """Mean and standard deviation of each cell, (2, C)."""
        return {cell: torch.stack((layer.mean, layer.std)).detach() for cell, layer in self.layers.items()}


def _layer(cell: Cell, samples: Tensor, start: Start) -> LikelihoodNorm:
    """The product's layer, which moves itself, or the published one, which an optimizer moves."""
    num_channels = samples.shape[1]
    place: dict[str, Any] = {"device": samples.device, "dtype": samples.dtype}
    if cell.name == "natural":
        assert cell.rate is not None
        return BatchlessNorm1d(
            num_channels, eps=start.eps, affine=False, init_mean=start.mean, init_std=start.std, statistics_rate=cell.rate,
            correction_rate=0.0, **place,
        )  # fmt: skip
    return PaperNorm1d(
        num_channels, parametrization=cast(Parametrization, cell.parametrization), eps=start.eps, affine=False,
        init_mean=start.mean, init_std=start.std, nll_reduction="sum", **place,
    )  # fmt: skip


class _BatchNorm:
    """BatchNorm layers, whose running averages are the estimates."""

    def __init__(self, cells: Sequence[Cell], samples: Tensor, start: Start) -> None:
        self.layers: dict[Cell, nn.BatchNorm1d] = {}
        for cell in cells:
            place: dict[str, Any] = {"device": samples.device, "dtype": samples.dtype}
            layer = nn.BatchNorm1d(samples.shape[1], momentum=cell.rate, affine=False, **place)
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.fill_(start.mean)
            layer.running_var.fill_(start.std**2)
            self.layers[cell] = layer

    @torch.no_grad()
    def update(self, batch: Tensor) -> None:
        """One training forward of a batch, (N, C)."""
        for layer in self.layers.values():
            layer(batch)

    def estimates(self) -> dict[Cell, Tensor]:
        """Mean and standard deviation of each cell, (2, C)."""
        found = {}
        for cell, layer in self.layers.items():
            assert layer.running_mean is not None
            assert layer.running_var is not None
            found[cell] = torch.stack((layer.running_mean, layer.running_var.sqrt()))
        return found


def estimate(
    cells: Sequence[Cell],
    samples: Tensor,
    batch_size: int,
    points: Sequence[int],
    *,
    start: Start,
    progress: Callable[[int], None] = lambda num_seen: None,
) -> dict[Cell, Tensor]:
    """Run the estimators over the samples, batch after batch.

    Args:
        samples: (T, C) float64.
        points: numbers of samples, multiples of the batch size, after which estimates are kept: P of them.
        progress: is called with the number of samples seen, after each batch.

    Returns: of each cell the estimates of mean and standard deviation, (P, 2, C). BatchNorm is missing at batch size 1, where
        it raises "Expected more than 1 value per channel when training".
    """
    moved = [c for c in cells if c.name in ("natural", *_OPTIMIZERS)]
    averaged = [c for c in cells if c.name == "batchnorm" and batch_size > 1]
    followers = (_Batchless(moved, samples, start), _BatchNorm(averaged, samples, start))
    found: dict[Cell, list[Tensor]] = {c: [] for c in cells if c in {*moved, *averaged} or c.name == "exact"}
    wanted = set(points)
    for seen in range(batch_size, samples.shape[0] + 1, batch_size):
        batch = samples[seen - batch_size : seen]
        for follower in followers:
            follower.update(batch)
        if seen in wanted:
            now = followers[0].estimates() | followers[1].estimates()
            for cell, kept in found.items():
                kept.append(now[cell] if cell in now else exact_estimate(samples[:seen]))
        progress(seen)
    return {cell: torch.stack(kept) for cell, kept in found.items()}


def exact_estimate(samples: Tensor) -> Tensor:
    """Mean and standard deviation (its square the mean squared deviation) of the samples, (k, C) to (2, C)."""
    variance, mean = torch.var_mean(samples, 0, correction=0)
    return torch.stack((mean, variance.sqrt()))


def errors_of(estimates: Tensor, truth: Truth, points: Sequence[int]) -> Tensor:
    """|mean_hat - mean| / std and |log(std_hat / std)|, (P, 2, R) from estimates of one stream, (P, 2, R).

    The truth is that of the last sample seen; what is not finite, from a diverged estimate, is infinite.
    """
    last = torch.tensor(points) - 1
    mean, std = truth.mean[last, None], truth.std[last, None]
    error = torch.stack(((estimates[:, 0] - mean).abs() / std, (estimates[:, 1] / std).log().abs()), 1)
    return error.nan_to_num(nan=math.inf, posinf=math.inf)
