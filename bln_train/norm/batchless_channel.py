"""Batchless normalisation followed by normalisation over groups of channels of each image, as one norm."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from bln_train.norm.batchless import BatchlessNorm1d, BatchlessNorm2d, _BatchlessNorm
from bln_train.norm.batchnorm_state import holds_batchnorm


class BatchlessChannelNorm(nn.Sequential):
    """Batch-channel normalisation without a batch: the learned statistics of a channel first, then those of each image.

        xhat = (x - mean) / std,     out = weight * (xhat - m) / sqrt(v + 1e-5) + bias

    with m and v the mean and variance of xhat over a group of channels and all positions of one image. Like both of its parts it
    looks at one image at a time.

    Args:
        num_features: C, channels of the input (N, C, *spatial).
        num_groups: groups of channels, the greatest common divisor with C where C does not divide.
        num_axes: 2 for (N, C, H, W) input, 0 for (N, C).
        settings: of the batchless norm, see `BatchlessNorm2d`; `affine` is not among them.

    Shapes: (N, C, *spatial) to the same.

    Raises:
        ValueError: groups of one value, which normalisation would make a constant: of one channel without spatial axes here, of
            one channel and one position in forward.

    Source: Qiao et al., arXiv 1911.09738, there with batch statistics or running averages of them, and a scale in both parts; their
    reason is that within a group alone nothing keeps a channel from dying. One scale is better here (recipes/RESULTS.md).
    """

    def __init__(self, num_features: int, num_groups: int, *, num_axes: int = 2, **settings: Any) -> None:
        make = BatchlessNorm2d if num_axes else BatchlessNorm1d
        num_groups = math.gcd(num_groups, num_features)
        if not num_axes and num_groups == num_features:
            raise ValueError(
                f"{num_groups} groups of {num_features} channels without positions have one value each, which normalisation makes "
                f"a constant: take fewer groups, or {make.__name__}({num_features})"
            )
        batchless = make(num_features, affine=False, **settings)
        batchless.group_size = num_features // num_groups
        super().__init__(batchless, nn.GroupNorm(num_groups, num_features))

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: Any, unexpected_keys: Any, errors: Any
    ) -> None:  # fmt: skip
        if holds_batchnorm(state_dict, prefix):
            errors.append(
                f"'{prefix}' has groups of channels behind its statistics, so no BatchNorm computes what it does: load into the "
                "BatchNorm, then convert_batchnorm, which has no groups"
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors
        )  # fmt: skip

    @property
    def batchless(self) -> _BatchlessNorm:
        """The learned statistics."""
        part = self[0]
        assert isinstance(part, _BatchlessNorm)
        return part

    @property
    def weight(self) -> nn.Parameter:
        """Scale of the output, (C,)."""
        weight = self[1].weight
        assert isinstance(weight, nn.Parameter)
        return weight
