"""What a recipe with `experiment: synthetic` may say: streams of known mean and scale, and what estimates them. No torch here.

No network and no images: a layer's statistics alone follow a stream of numbers. A list of estimators holds grids: each entry
stands for every pair of its parametrisations and rates.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic.functional_validators import AfterValidator

from bln_train.recipe.sections import Device, Positive, PositiveFloat, Section


def _check_some(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values:
        raise ValueError("is empty; give at least one")
    return values


AtLeastOne = AfterValidator(_check_some)  # not min_length, which counts only the items without a problem
Finite = Annotated[float, Field(allow_inf_nan=False)]
MAX_NUMBERS = 2**27
"""Numbers drawn, 1 GiB in float64: they are held in memory, so that every estimator sees the same."""
LEAST_STD = 1e-3
"""The layer's eps, as `norm.eps` of other recipes."""


class _Stream(Section):
    name: str
    """What the stream's samples are drawn from."""
    label: str | None = None
    """What tables and files call it; default its name."""
    mean: Finite
    """True mean, in the stream's units (at the beginning, where it moves)."""
    std: PositiveFloat
    """True standard deviation, in the stream's units (at the beginning, where it moves)."""

    @property
    def title(self) -> str:
        """The label, or what stands for it."""
        return self.label or self.name


class GaussianStream(_Stream):
    """Independent normal samples."""

    name: Literal["gaussian"]
    """Independent normal samples."""


class SkewedStream(_Stream):
    """Independent log-normal samples, shifted and scaled to the stated mean and standard deviation."""

    name: Literal["skewed"]
    """Independent log-normal samples."""
    shape: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Standard deviation of the logarithm, in units of 1; 0.5 gives skewness 1.75 and excess kurtosis 5.9."""


class HeavyTailedStream(_Stream):
    """Independent samples of Student's t, scaled to the stated standard deviation."""

    name: Literal["heavy-tailed"]
    """Independent samples of Student's t."""
    degrees_of_freedom: Annotated[int, Field(ge=5, le=100)] = 5
    """Number of degrees of freedom, at least 5: below, the sample variance has no standard error; 5 gives excess kurtosis 6."""


class _Moving(_Stream):
    mean_after: Finite | None = None
    """True mean at the end, in the stream's units; default `mean`."""
    std_after: PositiveFloat | None = None
    """True standard deviation at the end, in the stream's units; default `std`."""

    @model_validator(mode="after")
    def _check(self) -> _Moving:
        if self.mean_after in (None, self.mean) and self.std_after in (None, self.std):
            raise ValueError("mean_after: nothing moves; set mean_after or std_after to another value")
        return self


class DriftingStream(_Moving):
    """Normal samples whose mean and logarithm of the standard deviation move linearly over the whole stream."""

    name: Literal["drifting"]
    """Normal samples whose mean and standard deviation move all the time."""


class JumpStream(_Moving):
    """Normal samples whose mean and standard deviation change once."""

    name: Literal["jump"]
    """Normal samples whose mean and standard deviation change once."""
    at: Positive
    """Samples before the change."""


Stream = Annotated[
    GaussianStream | SkewedStream | HeavyTailedStream | DriftingStream | JumpStream, Field(discriminator="name")
]
Rates = Annotated[tuple[PositiveFloat, ...], Field(strict=False), AtLeastOne]
Averages = Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(strict=False), AtLeastOne]
Parametrizations = Annotated[tuple[Literal["log", "abs", "inv"], ...], Field(strict=False), AtLeastOne]


class NaturalEstimator(Section):
    """The layer of `batchless-plain`, which moves itself."""

    name: Literal["natural"]
    """The batchless layer's own moving averages."""
    rates: Averages
    """Rates of the moving averages."""


class GradientEstimator(Section):
    """The published layer, `batchless-paper`: the optimizer moves mean and standard deviation."""

    name: Literal["sgd", "adam"]
    """The optimizer that moves mean and standard deviation."""
    parametrizations: Parametrizations = ("log", "abs", "inv")
    """What stores the standard deviation, and so what the optimizer moves."""
    rates: Rates
    """Learning rates, constant; no momentum in SGD, Adam's other settings are PyTorch's."""


class BatchNormEstimator(Section):
    """The running averages of torch.nn.BatchNorm1d; it cannot train on one sample."""

    name: Literal["batchnorm"]
    """The running averages of torch.nn.BatchNorm1d."""
    rates: Averages
    """Its `momentum`."""


class ExactEstimator(Section):
    """Mean and standard deviation of all samples so far: the best there is where nothing moves."""

    name: Literal["exact"]
    """All samples so far."""


Estimator = Annotated[
    NaturalEstimator | GradientEstimator | BatchNormEstimator | ExactEstimator, Field(discriminator="name")
]


class SyntheticRuntime(Section):
    """Where it runs; nothing here changes the result beyond rounding."""

    device: Device = "cpu"
    """As in other recipes; the tensors are so small that a GPU gains nothing."""
    num_threads: Positive | None = None
    """CPU threads; default PyTorch's."""


class SyntheticRecipe(Section):
    """A whole synthetic experiment."""

    experiment: Literal["synthetic"]
    """Says that this recipe trains no network: the statistics alone follow streams of numbers."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Number that all streams are drawn from."""
    num_samples: Positive
    """Samples of each stream; a multiple of each batch size."""
    num_repetitions: Annotated[int, Field(ge=2)] = 64
    """Number of independent draws of each stream, behind every median and quartile."""
    batch_sizes: Annotated[tuple[Positive, ...], Field(strict=False), AtLeastOne]
    """Samples behind one update; the layer gets the same from micro-batches of any size."""
    report_after: Annotated[tuple[Positive, ...], Field(strict=False), AtLeastOne]
    """Samples after which the printed tables show the errors; multiples of each batch size, rising."""
    init_mean: Finite = 0.0
    """Where every estimate of the mean starts, in the streams' units."""
    init_std: PositiveFloat = 1.0
    """Where every estimate of the standard deviation starts, in the streams' units."""
    recovered_below: PositiveFloat = 0.25
    """After a jump, the median errors of mean (in units of the standard deviation) and standard deviation (of its logarithm) that
    count as recovered."""
    streams: Annotated[tuple[Stream, ...], Field(strict=False), AtLeastOne]
    """What is followed, each by its name."""
    estimators: Annotated[tuple[Estimator, ...], Field(strict=False), AtLeastOne]
    """What follows them, each by its name; an entry stands for every pair of its parametrisations and rates."""
    runtime: SyntheticRuntime = SyntheticRuntime()
    """Device and threads."""

    @model_validator(mode="after")
    def _check(self) -> SyntheticRecipe:
        problems = []
        for key in ("batch_sizes", "report_after"):
            values = getattr(self, key)
            if list(values) != sorted(set(values)):
                problems.append(f"{key}: must be in rising order, each once")
        for size in self.batch_sizes:
            odd = [k for k in self.report_after if k % size]
            if odd:
                problems.append(f"report_after: {odd[0]} samples are not a whole number of batches of {size}")
            if self.num_samples % size:
                problems.append(f"num_samples: {self.num_samples} is not a whole number of batches of {size}")
        if max(self.report_after) > self.num_samples:
            problems.append(f"report_after: {max(self.report_after)} is above num_samples {self.num_samples}")
        titles = Counter(stream.title for stream in self.streams)
        for n, stream in enumerate(self.streams):
            if titles[stream.title] > 1:
                problems.append(f"streams.{n}: another stream is called `{stream.title}` too; give each a label")
            if isinstance(stream, JumpStream) and stream.at >= self.num_samples:
                problems.append(f"streams.{n}.at: {stream.at} is not before the end, {self.num_samples}")
        grid = Counter(cell for estimator in self.estimators for cell in cells_of(estimator))
        for (name, parametrization, rate), times in grid.items():
            if times > 1:
                problems.append(f"estimators: {label_of(name, parametrization, rate)} is there {times} times")
        numbers = self.num_samples * self.num_repetitions * len(self.streams)
        if numbers > MAX_NUMBERS:
            problems.append(
                f"num_samples: times repetitions and streams that is {numbers} numbers, above {MAX_NUMBERS} (1 GiB)"
            )
        if self.init_std <= LEAST_STD:
            problems.append(f"init_std: must be above {LEAST_STD}, the smallest standard deviation of the layer")
        if problems:
            raise ValueError("\n".join(problems))
        return self


def cells_of(estimator: Estimator) -> list[tuple[str, str | None, float | None]]:
    """Every (name, parametrisation, rate) an entry stands for."""
    if isinstance(estimator, ExactEstimator):
        return [(estimator.name, None, None)]
    kinds = estimator.parametrizations if isinstance(estimator, GradientEstimator) else ()
    return [(estimator.name, kind, rate) for kind in kinds or (None,) for rate in estimator.rates]


def label_of(name: str, parametrization: str | None, rate: float | None) -> str:
    """A cell of the grid as tables and legends write it, such as `adam log 0.01`."""
    return " ".join(part for part in (name, parametrization, None if rate is None else f"{rate:g}") if part)
