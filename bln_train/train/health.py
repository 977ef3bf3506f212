"""Which channels' statistics have gone astray: standard deviations that collapsed or exploded, inputs that do not vary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bln_train.norm.base import LikelihoodNorm
from bln_train.records import LayerRecord
from bln_train.train.check_state import check_numbers, check_tensors

FACTOR = 1e3
"""Growth or shrinkage since the start of the run that is reported."""
DEAD_BELOW = 1e-6
"""Second moment of a channel's normalised inputs, 1 when its statistics fit, below which it is dead."""
_MAX_NAMED = 5


class LayerHealth(NamedTuple):
    """Standard deviations of one layer, in units of its input, and how many of its channels have gone astray."""

    min_std: float
    max_std: float
    at_floor: int
    """At eps, and not there at the start."""
    grown: int
    """By more than FACTOR since the start."""
    shrunk: int
    """The same, downwards."""
    dead: int
    """Inputs equal their mean: their second moment about it is below DEAD_BELOW of the variance."""


_KINDS = {
    "at_floor": "standard deviation at its floor (norm.eps)",
    "grown": f"standard deviation more than {FACTOR:g} times that of the start",
    "shrunk": f"standard deviation less than 1/{FACTOR:g} of that of the start",
    "dead": f"dead, their inputs do not vary (second moment below {DEAD_BELOW:g})",
}


@torch.no_grad()
def layer_health(layer: LikelihoodNorm, initial_std: Tensor) -> LayerHealth:
    """What has become of a layer since its standard deviations were `initial_std`, (C,) or (1,)."""
    std, floor = layer.std, _highest_floor(layer)
    ratio = std / initial_std
    seen = layer.second_moment
    flags = (
        (std <= floor) & (initial_std > floor),
        ratio > FACTOR,
        ratio < 1 / FACTOR,
        torch.zeros_like(std, dtype=torch.bool) if seen is None else seen < DEAD_BELOW,
    )
    low, high, *counts = torch.stack([std.min(), std.max(), *(flag.sum().to(std.dtype) for flag in flags)]).tolist()
    return LayerHealth(low, high, *map(int, counts))


@torch.no_grad()
def layer_records(layers: Mapping[str, LikelihoodNorm]) -> dict[str, LayerRecord]:
    """Learned statistics of each layer, and what the last effective batch showed of them; layers that saw none are left out."""
    found = {}
    for name, layer in layers.items():
        m1, m2, std = layer.first_moment, layer.second_moment, layer.std
        if m1 is None or m2 is None:
            continue
        log_ratio = (m2 - m1.square()).clamp(min=DEAD_BELOW).log() / 2
        mean_low, mean_high, std_low, std_high, offset, low, middle, high, dead, at_floor = torch.stack(
            [
                *layer.mean.aminmax(),
                *std.aminmax(),
                m1.square().mean().sqrt(),
                *(log.exp() for log in (log_ratio.min(), log_ratio.mean(), log_ratio.max())),
                (m2 < DEAD_BELOW).sum().to(std.dtype),
                (std <= _highest_floor(layer)).sum().to(std.dtype),
            ]
        ).tolist()
        ends = mean_low, mean_high, std_low, std_high
        found[name] = LayerRecord(layer.mean.numel(), *ends, offset, low, middle, high, int(dead), int(at_floor))
    return found


def _highest_floor(layer: LikelihoodNorm) -> float:
    """The smallest standard deviation that there is, with room for rounding."""
    return layer.eps * (1 + 1e-3)


class HealthWatch:
    """Says what has gone astray in a network's batchless layers, whenever that has changed.

    Args:
        layers: by name, with the standard deviations that the run starts from.
    """

    def __init__(self, layers: Mapping[str, LikelihoodNorm]) -> None:
        self.layers = layers
        self._said: dict[str, dict[str, int]] = {}
        self._initial_std = {name: layer.std.detach().clone() for name, layer in self.layers.items()}

    def notices(self) -> Iterator[str]:
        """A line for each kind of fault whose channels are not those that it was said of last."""
        found = {name: layer_health(layer, self._initial_std[name]) for name, layer in self.layers.items()}
        for kind, words in _KINDS.items():
            counts = {name: getattr(health, kind) for name, health in found.items() if getattr(health, kind)}
            if counts and counts != self._said.get(kind):
                named = [
                    f"{name} ({number} of {self.layers[name].mean.numel()}, "
                    f"sigma {found[name].min_std:.3g} to {found[name].max_std:.3g})"
                    for name, number in list(counts.items())[:_MAX_NAMED]
                ]
                more = f" and {len(counts) - _MAX_NAMED} more layers" if len(counts) > _MAX_NAMED else ""
                yield (
                    f"Channels with {words}: {', '.join(named)}{more}."
                    if kind != "dead"
                    else (f"Channels that are {words}: {', '.join(named)}{more}.")
                )
            self._said[kind] = counts

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and strings."""
        return {"initial_std": self._initial_std, "said": self._said}

    def check_state_dict(self, state: Any) -> None:
        """Raise ValueError unless `state_dict` could have given this for these layers."""
        if not isinstance(state, dict) or state.keys() != {"initial_std", "said"}:
            raise ValueError("what it says of statistics is no state of it")
        check_tensors(self._initial_std, state["initial_std"], "its statistics at the start")
        said = state["said"]
        if not isinstance(said, dict) or not said.keys() <= _KINDS.keys():
            raise ValueError("what it says of statistics is of other kinds")
        for counts in said.values():
            check_numbers("its channels gone astray", counts)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave and `check_state_dict` has passed."""
        self._initial_std = {name: std.to(self.layers[name].mean.device) for name, std in state["initial_std"].items()}
        self._said = state["said"]
