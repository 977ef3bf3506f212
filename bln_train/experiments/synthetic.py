"""The synthetic experiment: streams of known mean and scale, what the layer makes of them, and how far off that is.

Every stream and repetition is a channel of one layer, so all are estimated side by side; with the likelihood summed over
channels each is a layer of one channel by itself. Everything is float64: an error is the method's, not rounding's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from bln_train.norm import BatchlessNorm1d, BatchlessStatistics
from bln_train.norm.functional import Parametrization
from bln_train.recipe.synthetic import (
    LEAST_STD,
    DriftingStream,
    HeavyTailedStream,
    JumpStream,
    SkewedStream,
    Stream,
    SyntheticRecipe,
    cells_of,
    label_of,
)

POINTS_PER_OCTAVE = 4  # at which errors are recorded, after the start and after a jump


class Truth(NamedTuple):
    """What a stream is made of."""

    mean: Tensor
    """(T,) mean of each sample's distribution."""
    std: Tensor
    """(T,) its standard deviation."""


def truth_of(stream: Stream, num_samples: int) -> Truth:
    """Mean and standard deviation of each of T samples, (T,) float64 each; the logarithm of the latter drifts linearly."""
    mean = torch.full((num_samples,), stream.mean, dtype=torch.float64)
    std = torch.full((num_samples,), stream.std, dtype=torch.float64)
    if not isinstance(stream, DriftingStream | JumpStream):
        return Truth(mean, std)
    moved = torch.linspace(0, 1, num_samples, dtype=torch.float64)
    if isinstance(stream, JumpStream):
        moved = (torch.arange(num_samples) >= stream.at).double()
    mean_after = stream.mean if stream.mean_after is None else stream.mean_after
    std_after = stream.std if stream.std_after is None else stream.std_after
    return Truth(mean + moved * (mean_after - stream.mean), std * (moved * math.log(std_after / stream.std)).exp())


def draw_noise(stream: Stream, num_samples: int, num_repetitions: int, generator: torch.Generator) -> Tensor:
    """Independent draws of mean 0 and variance 1, (T, R) float64, of the stream's kind.

    normal z;   (exp(s*z) - exp(s^2/2)) / sqrt((exp(s^2) - 1) * exp(s^2));   z / sqrt(chi2_n / n) * sqrt((n - 2) / n)
    """
    z = torch.randn(num_samples, num_repetitions, generator=generator, dtype=torch.float64)
    if isinstance(stream, SkewedStream):
        square = stream.shape**2
        std = math.sqrt(math.expm1(square) * math.exp(square))
        return ((stream.shape * z).exp() - math.exp(square / 2)) / std
    if isinstance(stream, HeavyTailedStream):
        n, chi2 = stream.degrees_of_freedom, torch.zeros_like(z)
        for _ in range(n):
            chi2 += torch.randn(z.shape, generator=generator, dtype=torch.float64).square()
        return z * ((n - 2) / chi2).sqrt()
    return z


def draw_stream(stream: Stream, num_samples: int, num_repetitions: int, seed: int, position: int) -> Tensor:
    """The stream's samples, (T, R) float64 on the CPU: a function of the seed and of the stream's position in the recipe."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + position)
    truth = truth_of(stream, num_samples)
    noise = draw_noise(stream, num_samples, num_repetitions, generator)
    return torch.addcmul(truth.mean[:, None], noise, truth.std[:, None])


class Cell(NamedTuple):
    """One estimator of the grid."""

    name: str
    """natural, sgd, adam, batchnorm or exact."""
    parametrization: str | None
    rate: float | None

    @property
    def label(self) -> str:
        """As tables and legends write it."""
        return label_of(*self)

    @property
    def columns(self) -> dict[str, Any]:
        """As tables of numbers write it."""
        return {"estimator": self.name, "parametrization": self.parametrization, "rate": self.rate}


def record_points(recipe: SyntheticRecipe, batch_size: int, at: int = 0) -> list[int]:
    """Samples after which errors are recorded, rising multiples of the batch size above `at`, evenly spaced in log(k - at)."""
    steps = (2 ** (n / POINTS_PER_OCTAVE) for n in range(64 * POINTS_PER_OCTAVE))
    after = takewhile(lambda step: at + step <= recipe.num_samples, steps)
    rounded = {math.ceil((at + step) / batch_size) * batch_size for step in after}
    return sorted(k for k in rounded | set(recipe.report_after) if at < k <= recipe.num_samples)


class _Batchless:
    """Batchless layers, each moved as its cell says."""

    def __init__(self, recipe: SyntheticRecipe, cells: Sequence[Cell], samples: Tensor) -> None:
        self.layers = {cell: _batchless_layer(recipe, cell, samples) for cell in cells}
        self.statistics = BatchlessStatistics(nn.ModuleList(self.layers.values()))
        classes: dict[str, type[torch.optim.SGD] | type[torch.optim.Adam]] = {
            "sgd": torch.optim.SGD,
            "adam": torch.optim.Adam,
        }
        self.optimizers = []
        for name, optimizer in classes.items():
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


def _batchless_layer(recipe: SyntheticRecipe, cell: Cell, samples: Tensor) -> BatchlessNorm1d:
    natural = cell.name == "natural"
    return BatchlessNorm1d(
        samples.shape[1],
        parametrization=cast(Parametrization, cell.parametrization),
        eps=LEAST_STD,
        affine=False,
        init_mean=recipe.init_mean,
        init_std=recipe.init_std,
        statistics="natural" if natural else "gradient",
        statistics_rate=cell.rate if natural and cell.rate else 1.0,
        nll_reduction="sum",  # over channels, which are separate streams here
        correction_rate=0.0,
        device=samples.device,
        dtype=samples.dtype,
    )


class _BatchNorm:
    """BatchNorm layers, whose running averages are the estimates."""

    def __init__(self, recipe: SyntheticRecipe, cells: Sequence[Cell], samples: Tensor) -> None:
        self.layers: dict[Cell, nn.BatchNorm1d] = {}
        for cell in cells:
            place: dict[str, Any] = {"device": samples.device, "dtype": samples.dtype}
            layer = nn.BatchNorm1d(samples.shape[1], momentum=cell.rate, affine=False, **place)
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.fill_(recipe.init_mean)
            layer.running_var.fill_(recipe.init_std**2)
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
    recipe: SyntheticRecipe,
    cells: Sequence[Cell],
    samples: Tensor,
    batch_size: int,
    points: Sequence[int],
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
    moved = [c for c in cells if c.name in ("natural", "sgd", "adam")]
    averaged = [c for c in cells if c.name == "batchnorm" and batch_size > 1]
    followers = (_Batchless(recipe, moved, samples), _BatchNorm(recipe, averaged, samples))
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


def _rows(of: dict[str, Any], points: Sequence[int], estimates: Tensor, truth: Truth) -> list[dict[str, Any]]:
    """A row for each point: median and quartiles over repetitions, and how many estimates are not finite."""
    quartiles = torch.tensor([0.5, 0.25, 0.75], dtype=estimates.dtype)
    error = errors_of(estimates, truth, points)
    spread = (
        error.quantile(quartiles, dim=2, interpolation="nearest").permute(1, 2, 0).tolist()
    )  # inf - inf would be NaN
    num_diverged = (~estimates.isfinite()).any(1).sum(1).tolist()
    return [
        {
            **of,
            "num_samples": points[p],
            **{
                f"{what}_error_{which}": spread[p][w][q]
                for w, what in enumerate(("mean", "std"))
                for q, which in enumerate(("median", "q25", "q75"))
            },
            "num_diverged": num_diverged[p],
        }
        for p in range(len(points))
    ]


def _recovery(stream: JumpStream, rows: Sequence[dict[str, Any]], below: float) -> int | None:
    """Samples after the jump until both median errors are at most `below`; None if they never are."""
    for row in rows:
        after = row["num_samples"] - stream.at
        if after > 0 and max(row["mean_error_median"], row["std_error_median"]) <= below:
            return int(after)
    return None


def measure(
    recipe: SyntheticRecipe, device: torch.device, progress: Callable[[int, int], None] = lambda size, num_seen: None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Run the whole grid.

    Args:
        progress: is called with the batch size and the number of samples seen.

    Returns: the errors, a row for each stream, estimator, batch size and recorded number of samples; and of each stream that
        jumps the samples until recovery, a row for each estimator and batch size.
    """
    num, each = recipe.num_samples, recipe.num_repetitions
    cells = [Cell(*cell) for estimator in recipe.estimators for cell in cells_of(estimator)]
    truths = [truth_of(stream, num) for stream in recipe.streams]
    draws = [draw_stream(stream, num, each, recipe.seed, n) for n, stream in enumerate(recipe.streams)]
    samples = torch.cat(draws, 1).to(device)
    errors: list[dict[str, Any]] = []
    recoveries: list[dict[str, Any]] = []
    for size in recipe.batch_sizes:
        common = record_points(recipe, size)
        own = [
            sorted({*common, *(record_points(recipe, size, stream.at) if isinstance(stream, JumpStream) else ())})
            for stream in recipe.streams
        ]
        points = sorted({k for ks in own for k in ks})

        def tell(num_seen: int, size: int = size) -> None:
            progress(size, num_seen)

        found = estimate(recipe, cells, samples, size, points, tell)
        for n, stream in enumerate(recipe.streams):
            kept = [points.index(k) for k in own[n]]
            for cell, estimates in found.items():
                of = {"stream": stream.title, "label": cell.label, **cell.columns, "batch_size": size}
                rows = _rows(of, own[n], estimates[kept, :, n * each : (n + 1) * each].cpu(), truths[n])
                errors += rows
                if isinstance(stream, JumpStream):
                    recoveries.append({**of, "num_samples": _recovery(stream, rows, recipe.recovered_below)})
    return errors, recoveries
