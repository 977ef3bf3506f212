"""From a model's and a norm's name to a network."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from bln_train.models.cifar_resnet import CifarResNet, WideResNet
from bln_train.models.layers import NormFactory
from bln_train.models.names import CIFAR_RESNET_DEPTHS, parse_wide
from bln_train.models.paper_cnn import PaperCnn
from bln_train.norm.batchless import BatchlessNorm1d, BatchlessNorm2d
from bln_train.norm.batchless_channel import BatchlessChannelNorm
from bln_train.norm.standardize import StandardizedConv2d
from bln_train.paper.layer import PaperNorm1d, PaperNorm2d


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that always uses its running statistics, which are set once from data; scale and shift still learn."""

    def train(self, mode: bool = True) -> FrozenBatchNorm2d:
        """Stay in eval mode, whatever the network does."""
        super().train(False)
        return self


class FrozenBatchNorm1d(nn.BatchNorm1d):
    """The same for dense layers."""

    def train(self, mode: bool = True) -> FrozenBatchNorm1d:
        """Stay in eval mode, whatever the network does."""
        super().train(False)
        return self


def norm_factory(
    name: str, *, num_groups: int = 8, momentum: float = 0.1, channel_groups: int = 0, **settings: Any
) -> NormFactory:
    """Factory of norm layers by the field's short name: batch, batch-frozen, group, layer, instance, none, batchless, paper.

    Args:
        num_groups: of `group`, the greatest common divisor with the channels where those do not divide.
        momentum: of `batch`, rate of its running averages.
        channel_groups: of `batchless`, groups of a BatchlessChannelNorm; 0 for none.
        settings: of `batchless` and `paper`, the arguments of BatchlessNorm2d and of PaperNorm2d.

    Raises:
        ValueError: `instance` is asked for a dense layer, whose single position has no variance, or groups of one channel are.
    """

    def instance(num_features: int, num_axes: int) -> nn.Module:
        if num_axes == 0:
            raise ValueError("instance norm needs positions to average over, and a dense layer has only one")
        return nn.InstanceNorm2d(num_features, affine=True)

    def group(num_features: int, num_axes: int) -> nn.Module:
        number = math.gcd(num_groups, num_features)
        if num_axes == 0 and number == num_features:
            raise ValueError(
                f"groups of one channel of a dense layer of {number} have one value each: take fewer groups"
            )
        return nn.GroupNorm(number, num_features)

    def pick(with_axes: type[nn.Module], without: type[nn.Module], **own: Any) -> Callable[[int, int], nn.Module]:
        return lambda num_features, num_axes: (with_axes if num_axes else without)(num_features, **own)

    def with_channels(num_features: int, num_axes: int) -> nn.Module:
        return BatchlessChannelNorm(num_features, channel_groups, num_axes=num_axes, **settings)

    makers: dict[str, Callable[[int, int], nn.Module]] = {
        "batch": pick(nn.BatchNorm2d, nn.BatchNorm1d, momentum=momentum),
        "batch-frozen": pick(FrozenBatchNorm2d, FrozenBatchNorm1d),
        "group": group,
        "layer": lambda num_features, _: nn.GroupNorm(1, num_features),
        "instance": instance,
        "none": lambda _num_features, _num_axes: nn.Identity(),
        "batchless": with_channels if channel_groups else pick(BatchlessNorm2d, BatchlessNorm1d, **settings),
        "paper": pick(PaperNorm2d, PaperNorm1d, **settings),
    }
    make = makers[name]

    def norm(num_features: int, num_axes: int = 2) -> nn.Module:
        return make(num_features, num_axes)

    return norm


def build_model(
    name: str,
    num_classes: int,
    *,
    norm: NormFactory,
    weight_standardization: bool = False,
    shortcut: str = "A",
    zero_init_residual: bool = False,
    image_size: int = 32,
) -> nn.Module:
    """Network of `models.names`, freshly drawn from torch's generator: (N, 3, image_size, image_size) to (N, num_classes).

    Raises:
        ValueError: the network cannot be built with that norm or image size.
    """
    conv: type[nn.Conv2d] = StandardizedConv2d if weight_standardization else nn.Conv2d
    wide = parse_wide(name)
    if wide:
        return WideResNet(*wide, num_classes, norm=norm, conv=conv)
    if name == "paper_cnn":
        if image_size < 8:
            raise ValueError(f"paper_cnn halves the image three times; {image_size} pixels are too few")
        return PaperCnn(num_classes, norm=norm, conv=conv, image_size=image_size)
    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    if name == "resnet18":
        blocks, widths, shortcut = (2, 2, 2, 2), (64, 128, 256, 512), "B"
    else:
        depth = int(name.removeprefix("resnet"))
        assert depth in CIFAR_RESNET_DEPTHS
        blocks, widths = ((depth - 2) // 6,) * 3, (16, 32, 64)
    return CifarResNet(
        blocks, widths, num_classes, norm=norm, conv=conv, shortcut=shortcut, zero_init_residual=zero_init_residual
    )
