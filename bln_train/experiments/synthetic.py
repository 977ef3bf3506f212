"""The synthetic experiment: streams of known mean and scale, and the errors of what follows them (paper/estimators.py)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from bln_train.paper.estimators import Cell, Start, Truth, errors_of, estimate
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


def record_points(recipe: SyntheticRecipe, batch_size: int, at: int = 0) -> list[int]:
    """Samples after which errors are recorded, rising multiples of the batch size above `at`, evenly spaced in log(k - at)."""
    steps = (2 ** (n / POINTS_PER_OCTAVE) for n in range(64 * POINTS_PER_OCTAVE))
    after = takewhile(lambda step: at + step <= recipe.num_samples, steps)
    rounded = {math.ceil((at + step) / batch_size) * batch_size for step in after}
    return sorted(k for k in rounded | set(recipe.report_after) if at < k <= recipe.num_samples)


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
    start = Start(recipe.init_mean, recipe.init_std, LEAST_STD)
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

        found = estimate(cells, samples, size, points, start=start, progress=tell)
        for n, stream in enumerate(recipe.streams):
            kept = [points.index(k) for k in own[n]]
            for cell, estimates in found.items():
                of = {
                    "stream": stream.title,
                    "label": label_of(*cell),
                    "estimator": cell.name,
                    "parametrization": cell.parametrization,
                    "rate": cell.rate,
                    "batch_size": size,
                }
                rows = _rows(of, own[n], estimates[kept, :, n * each : (n + 1) * each].cpu(), truths[n])
                errors += rows
                if isinstance(stream, JumpStream):
                    recoveries.append({**of, "num_samples": _recovery(stream, rows, recipe.recovered_below)})
    return errors, recoveries
