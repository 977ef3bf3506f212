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
    they were trained with, and with correction_mode: imputed; for `batchless-plain` it is 0.
    With groups a folded norm runs its convolution again in backward."""
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
    correction_mode: Literal["exact", "imputed"] = "exact"
    """Where a folded norm's correction takes the normalised input from: `exact` runs the convolution again, `imputed` reads
    it off the output and takes what is expected where a relu cut it off, which is faster and another result."""
    probe_images: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """First images of each batch, on which the statistics follow the weights after the step; at most an effective batch; 0
    turns it off; auto is a rule of the shapes that enter the norms, and takes as many as need about the memory of one image's
    training: from 4 to 8, in networks of more than 32 norms from one for 8 norms to one for 4."""
    init_images: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Training images from which the statistics are initialised; 0 starts from mean 0, standard deviation 1; auto is 128, or
    none with model.init, which brings them."""
    init_cache: bool = False
    """Initialise in one evaluation of those images instead of one for each layer in depth, with their activations in host
    memory."""
    reestimate_images: Annotated[int, Field(ge=0)] = 0
    """With model.init: training images on which the trained statistics are measured anew before the first step; weight and
    bias take up the change, so that the network computes what it did. 0 keeps the trained ones."""
    fold: bool = True
    """Run convolution, norm and relu as one operation, which keeps no tensor of its own for backward."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_probe_gain(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "probe_gain" not in data:
            return data
        if data["probe_gain"] != 1:  # earlier runs wrote it out; 1 is what happens
            raise ValueError("probe_gain: is no setting any more, the statistics follow in full; leave it out")
        return {key: value for key, value in data.items() if key != "probe_gain"}

    @model_validator(mode="after")
    def _check(self) -> BatchlessNormSection:
        if self.init_cache and not self.init_images:
            raise ValueError("init_cache: there is nothing to initialise with init_images 0")
        if self.channel_groups not in ("auto", 0) and self.correction_mode == "imputed":
            raise ValueError(
                "correction_mode: with channel_groups backward runs the convolution again anyway; use exact"
            )
        if self.correction_mode == "imputed":
            for key, missing in (("fold", not self.fold), ("probe_images", not self.probe_images)):
                if missing:
                    raise ValueError(
                        f"correction_mode: imputed works in folded norms and is measured on the probe; set {key}"
                    )
        for key, default in (("correction_mode", "exact"), ("correction_parts", "auto")):
            if getattr(self, key) != default and not self.correction_rate:
                raise ValueError(f"{key}: there is no correction with correction_rate 0")
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
            # Earlier runs wrote the default out as a number.
            written = (cls.model_fields[foreign].default, DEFAULT_INIT_IMAGES) if foreign else ()
            if foreign and foreign in data and data[foreign] not in written:
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
