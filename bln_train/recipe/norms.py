"""The norm section of a recipe: a union by its name. No torch here."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from bln_train.recipe.sections import Positive, PositiveFloat, Section

DEFAULT_INIT_IMAGES = 128
DEFAULT_CHANNEL_GROUPS = 8
_PAPER = {"statistics": "gradient", "eps": 1e-5, "correction_rate": 0.0, "probe_images": 0}
NORM_PRESETS: dict[str, dict[str, Any]] = {
    "batchless": {"parametrization": "log", "statistics": "natural"},
    "batchless-plain": {"parametrization": "log", "statistics": "natural"},
    "batchless-paper": {"parametrization": "log", **_PAPER},
    "batchless-paper-abs": {"parametrization": "abs", **_PAPER},
    "batchless-paper-inv": {"parametrization": "inv", **_PAPER},
}


class BatchlessNormSection(Section):
    """Batchless Normalization; the presets differ in the defaults of the settings below."""

    name: Literal["batchless", "batchless-plain", "batchless-paper", "batchless-paper-abs", "batchless-paper-inv"]
    """`batchless`: what to train with, learned statistics and behind them groups of channels of each image; `batchless-plain`: the
    learned statistics alone, faster, and a BatchNorm for inference; `batchless-paper` and its other parametrisations: the method as
    published."""
    parametrization: Literal["log", "abs", "inv", "var"]
    """What is stored for the standard deviation: its logarithm, |s|+eps, its inverse, or the variance."""
    share: Literal["channel", "layer"] = "channel"
    """One mean and standard deviation per channel, or one pair for the whole layer."""
    channel_groups: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Groups of channels of each image over which its normalised values are normalised again; a layer whose channels do not divide
    uses the greatest common divisor; 0 turns it off. auto is 8 for `batchless`, but 0 with model.init, whose weights state how many
    they were trained with, and with statistics: gradient or share: layer; for the other names it is 0."""
    eps: PositiveFloat = 1e-3
    """The smallest standard deviation that data can set, in units of the layer's input; `abs` adds it to |s|, `inv` to |s|
    before inverting. The paper's presets take 1e-5."""
    statistics: Literal["natural", "gradient"]
    """`natural`: scale-free moving averages after each step; `gradient`: parameters of the optimizer, as in the
    paper."""
    statistics_rate: PositiveFloat | None = None
    """natural: rate of the moving averages, at most 1, outside the schedule, default 0.1, and 0.01 with model.init, whose
    statistics follow the weights by the probe; gradient: learning rate of the statistics (under the schedule), default that of the
    weights."""
    nll_weight: PositiveFloat = 1.0
    """Factor of the likelihood in the loss; `gradient` only, a natural gradient does not depend on it."""
    nll_reduction: Literal["mean", "sum"] = "mean"
    """Over channels: the paper's mean, or their sum; `gradient` only."""
    gauge: bool = True
    """Report the likelihood shifted to be 0 for inputs that follow the statistics; changes no gradient."""
    correction_rate: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Rate of the running averages from which the backward correction of each batch starts; 0 turns the correction off."""
    correction_parts: Positive | Literal["auto"] = "auto"
    """Parts of each effective batch over which the correction balances what it takes out of the images' gradients; auto is one for
    each process. With a number, which the processes must divide, their number changes no result; no micro-batch spans two parts."""
    recompute: bool | Literal["auto"] = "auto"
    """Whether backward runs the convolution before a folded norm again: then training keeps what a network without norms keeps, and
    otherwise what BatchNorm keeps, in less time. The result is the same. auto is true, unless keeping fits a budget of memory."""
    probe_images: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """First images of each batch, on which the statistics follow the weights after the step; at most an effective batch; 0
    turns it off; auto is a rule of the shapes that enter the norms, and takes as many as need about the memory of one image's
    training: from 4 to 8, in networks of more than 32 norms from one for 8 norms to one for 4."""
    init_images: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Training images from which the statistics are initialised; 0 starts from mean 0, standard deviation 1; auto is 128, or
    none with model.init, which brings them."""
    fold: bool = True
    """Run convolution, norm and relu as one operation, which keeps no tensor of its own for backward."""

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        filled = {**NORM_PRESETS.get(str(data.get("name")), {}), **data}
        if filled.get("statistics") == "natural":
            filled.setdefault("statistics_rate", 0.1)
        return filled

    @model_validator(mode="after")
    def _check(self) -> BatchlessNormSection:
        if self.channel_groups not in ("auto", 0) and self.share == "layer":
            raise ValueError("share: the correction under channel_groups is that of each channel; use channel")
        if self.correction_parts != "auto" and not self.correction_rate:
            raise ValueError("correction_parts: there is no correction with correction_rate 0")
        if self.recompute is False and not self.fold:
            raise ValueError(
                "recompute: norms that are not folded keep their input anyway; leave it out, or set fold: true"
            )
        if self.statistics == "natural":
            if self.statistics_rate is None or self.statistics_rate > 1:
                raise ValueError("statistics_rate: natural statistics need a rate of at most 1")
            for key, neutral in (("nll_weight", 1.0), ("nll_reduction", "mean")):
                if getattr(self, key) != neutral:
                    raise ValueError(
                        f"{key}: natural statistics do not depend on it; set statistics_rate, or statistics: gradient"
                    )
        return self


class GroupNormSection(Section):
    """Group normalisation (Wu & He 2018)."""

    name: Literal["group"]
    """Over groups of channels of each image."""
    num_groups: Positive = 8
    """Groups of each layer; a layer whose channels do not divide uses the greatest common divisor."""


class BatchNormSection(Section):
    """Batch normalisation over each micro-batch, or with statistics frozen after initialisation."""

    name: Literal["batch", "batch-frozen"]
    """`batch`: over each micro-batch, whose size then matters; `batch-frozen`: by statistics taken once and never changed."""
    momentum: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Rate of the running averages that evaluation uses; `batch` only."""
    init_images: Positive | Literal["auto"] = "auto"
    """Training images from which frozen statistics are taken, `batch-frozen` only; auto is 128, or none with model.init, which
    brings them."""

    @model_validator(mode="before")
    @classmethod
    def _check(cls, data: Any) -> Any:
        if isinstance(data, dict):
            foreign = {"batch": "init_images", "batch-frozen": "momentum"}.get(str(data.get("name")))
            # A run's recipe.yaml states every default.
            if foreign and foreign in data and data[foreign] != cls.model_fields[foreign].default:
                raise ValueError(f"{foreign}: {data['name']} does not use it")
        return data


class PlainNormSection(Section):
    """Norms without settings: layer (over channels and space), instance (per channel, over space), none."""

    name: Literal["layer", "instance", "none"]
    """`layer`: over channels and space of each image; `instance`: over the space of each of its channels; `none`: no norm."""


Norm = Annotated[
    BatchlessNormSection | GroupNormSection | BatchNormSection | PlainNormSection, Field(discriminator="name")
]
NORM_NAMES: tuple[str, ...] = tuple(
    name for section in get_args(get_args(Norm)[0]) for name in get_args(section.model_fields["name"].annotation)
)
