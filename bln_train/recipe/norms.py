"""The norm section of a recipe: a union by its name. No torch here."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from bln_train.recipe.paper_norm import PaperNormSection
from bln_train.recipe.sections import Positive, PositiveFloat, Section

DEFAULT_INIT_IMAGES = 128
DEFAULT_CHANNEL_GROUPS = 8


class BatchlessNormSection(Section):
    """Batchless Normalization as this package trains with it; the two names differ in the default of `channel_groups`."""

    name: Literal["batchless", "batchless-plain"]
    """`batchless`: what to train with, learned statistics and behind them groups of channels of each image; `batchless-plain`: the
    learned statistics alone, faster, and a BatchNorm for inference."""
    channel_groups: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Groups of channels of each image over which its normalised values are normalised again; a layer whose channels do not divide
    uses the greatest common divisor; 0 turns it off. auto is 8 for `batchless`, but 0 with model.init, whose weights state how many
    they were trained with; for `batchless-plain` it is 0."""
    eps: PositiveFloat = 1e-3
    """The smallest standard deviation that data can set, in units of the layer's input."""
    statistics_rate: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Rate of the moving averages that the statistics are, outside the schedule; 0.01 with model.init, whose statistics follow the
    weights by the probe."""
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

    @model_validator(mode="after")
    def _check(self) -> BatchlessNormSection:
        if self.correction_parts != "auto" and not self.correction_rate:
            raise ValueError("correction_parts: there is no correction with correction_rate 0")
        if self.recompute is False and not self.fold:
            raise ValueError(
                "recompute: norms that are not folded keep their input anyway; leave it out, or set fold: true"
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
    BatchlessNormSection | PaperNormSection | GroupNormSection | BatchNormSection | PlainNormSection,
    Field(discriminator="name"),
]
NORM_NAMES: tuple[str, ...] = tuple(
    name for section in get_args(get_args(Norm)[0]) for name in get_args(section.model_fields["name"].annotation)
)
