"""The entries of a BatchNorm in a state dict."""

from __future__ import annotations

from collections.abc import MutableMapping

from torch import Tensor

BATCHNORM_KEYS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def holds_batchnorm(state: MutableMapping[str, Tensor], prefix: str) -> bool:
    """Whether the entries under `prefix` are a BatchNorm's."""
    own = f"{prefix}running_mean" in state and f"{prefix}running_var" in state
    return own and f"{prefix}mean" not in state
