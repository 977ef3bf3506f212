"""The norm section of the published method: settings that only its layer (paper/layer.py) has. No torch here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from bln_train.recipe.sections import PositiveFloat, Section

_PARAMETRIZATIONS = {"batchless-paper": "log", "batchless-paper-abs": "abs", "batchless-paper-inv": "inv"}


class PaperNormSection(Section):
    """Batchless Normalization as published; the names differ in the default of `parametrization`."""

    name: Literal["batchless-paper", "batchless-paper-abs", "batchless-paper-inv"]
    """The method as published, whose mean and standard deviation are parameters of the optimizer, in its three parametrisations."""
    parametrization: Literal["log", "abs", "inv"]
    """What is stored for the standard deviation: its logarithm, |s|+eps, or its inverse."""
    share: Literal["channel", "layer"] = "channel"
    """One mean and standard deviation per channel, or one pair for the whole layer."""
    eps: PositiveFloat = 1e-5
    """The smallest standard deviation that data can set, in units of the layer's input; `abs` adds it to |s|, `inv` to |s|
    before inverting."""
    statistics_rate: PositiveFloat | None = None
    """Learning rate of mean and standard deviation, under the schedule; default that of the weights."""
    nll_weight: PositiveFloat = 1.0
    """Factor of the likelihood in the loss."""
    nll_reduction: Literal["mean", "sum"] = "mean"
    """Over channels: the published mean, or their sum."""
    gauge: bool = True
    """Report the likelihood shifted to be 0 for inputs that follow the statistics; changes no gradient."""
    init_images: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Training images from which the statistics are initialised; 0 starts from mean 0, standard deviation 1; auto is 128, or
    none with model.init, which brings them."""

    @model_validator(mode="before")
    @classmethod
    def _fill_parametrization(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("name") not in _PARAMETRIZATIONS:
            return data
        return {"parametrization": _PARAMETRIZATIONS[data["name"]], **data}
