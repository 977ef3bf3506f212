"""Dropout and stochastic depth whose masks belong to the images, so that the probe runs with the masks of training.

The probe runs the first images of the batch again after the step (norm/probe.py). With other masks the statistics would
follow the masks as well as the step. A mask is a hash of its image's seed. The seeds come from the first of these that
is set:

    `seeds`         set for each forward, as the trainer does, by (seed, epoch, image)
    `batch_seed`    set by `BatchlessStatistics.begin`; a seed then follows from the place in the effective batch
    neither         each layer is the ordinary one
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bln_train.norm.replace import replace
from bln_train.system.rng import instance_seeds, keep_mask

_FIRST_PURPOSE = 100  # below are those of augmentation


class InstanceDropout(nn.Module):
    """Dropout whose mask is a function of the image, not of the micro-batch it travels in.

        out = x * keep_mask / (1 - p)

    The same seeds give the same mask, however the batch is split; see the module. Without any it is nn.Dropout. In eval mode the
    identity.

    Args:
        p: probability of a 0, in [0, 1).
        purpose: distinguishes this layer's draws from other layers'.

    Attributes:
        seeds: (N,) int64 of the next forward's images, or None; see `set_instance_seeds`.
        batch_seed: of the effective batch under way, or None; see `begin_masks`.

    Raises:
        ValueError: p is out of range, or `seeds` are of another number of images.
    """

    seeds: Tensor | None

    def __init__(self, p: float, purpose: int) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout probability is {p}; it must be in [0, 1)")
        self.p, self.purpose, self.seeds = p, purpose, None
        self.batch_seed: int | None = None
        self.num_done = 0
        """Images of the effective batch in earlier forwards."""
        self.num_images = self.num_uses = 0
        """Of the forward under way: its images, and how often it came here."""
        self.is_following = False

    def forward(self, x: Tensor) -> Tensor:
        """(N, *) to the same shape."""
        return x if not self.training or self.p == 0 else self._drop(x)

    def _drop(self, x: Tensor) -> Tensor:
        seeds = self._seeds_of(x)
        if seeds is None:
            return F.dropout(x, self.p)
        if seeds.shape[0] != x.shape[0]:
            raise ValueError(
                f"dropout got {x.shape[0]} images, and seeds of {seeds.shape[0]}: set those of this micro-batch"
            )
        mask = keep_mask(seeds, self.purpose, tuple(x.shape[1:]), 1 - self.p)
        return x * mask.to(x.dtype).div_(1 - self.p)

    def _seeds_of(self, x: Tensor) -> Tensor | None:
        if self.seeds is not None or self.batch_seed is None or not (self.is_following or torch.is_grad_enabled()):
            return self.seeds
        if not self.num_uses:
            self.num_images = len(x)
        self.num_uses += 1
        places = torch.arange(self.num_done, self.num_done + len(x), device=x.device)
        return instance_seeds(self.batch_seed, self.num_uses, places)

    def extra_repr(self) -> str:
        """Arguments, as torch.nn layers print theirs."""
        return f"p={self.p}"


class InstanceChannelDropout(InstanceDropout):
    """Dropout of whole channels of an image, as nn.Dropout1d, 2d and 3d; arguments of InstanceDropout."""

    def _drop(self, x: Tensor) -> Tensor:
        """(N, C, *spatial) to the same shape."""
        return x * super()._drop(x.new_ones(*x.shape[:2], *([1] * (x.dim() - 2))))


class InstanceStochasticDepth(InstanceDropout):
    """Stochastic depth (Huang et al. 2016) whose choice belongs to the image: one draw keeps or drops all of its entries.

    Without seeds it is torchvision's, in mode `row`. In eval mode the identity. Arguments of InstanceDropout.
    """

    def _drop(self, x: Tensor) -> Tensor:
        """(N, *) to the same shape."""
        return x * super()._drop(x.new_ones(x.shape[0], *([1] * (x.dim() - 1))))


def set_instance_seeds(dropouts: Iterable[InstanceDropout], seeds: Tensor | None) -> None:
    """Hand the images' seeds, (N,) int64 or None, to the dropout layers of a network."""
    for dropout in dropouts:
        dropout.seeds = seeds


def begin_masks(dropouts: Iterable[InstanceDropout], batch_seed: int | None) -> None:
    """Begin an effective batch whose images' masks are those of their places in it; None for masks that are drawn anew."""
    for dropout in dropouts:
        dropout.batch_seed = batch_seed
        dropout.num_done = dropout.num_uses = 0


def go_on_with_masks(dropouts: Iterable[InstanceDropout]) -> None:
    """After a training forward: the next one's images are those after its."""
    for dropout in dropouts:
        if dropout.num_uses:
            dropout.num_done += dropout.num_images
            dropout.num_uses = 0


@contextmanager
def first_masks_again(dropouts: Iterable[InstanceDropout]) -> Iterator[None]:
    """Inside, a forward without gradients is of the effective batch's first images, with the masks that they had."""
    for dropout in dropouts:
        dropout.num_done, dropout.num_uses, dropout.is_following = 0, 0, True
    try:
        yield
    finally:
        for dropout in dropouts:
            dropout.num_uses, dropout.is_following = 0, False


def keep_masks(model: nn.Module) -> nn.Module:
    """Put an InstanceDropout or InstanceStochasticDepth in the place of every dropout inside `model`, in place.

    Of torch.nn's Dropout and Dropout1d to 3d, torchvision's StochasticDepth by rows and timm's DropPath that scales. Others, as
    AlphaDropout, stay, and so does what a forward calls as a function (F.dropout).

    Returns: the model, or the new layer where `model` itself is one of these.
    """
    own = [module.purpose for module in model.modules() if isinstance(module, InstanceDropout)]
    purposes = itertools.count(max([_FIRST_PURPOSE - 1, *own]) + 1)

    for name, (kind, p) in _KINDS.items():

        def matches(module: nn.Module, name: tuple[str, str] = name) -> bool:
            return _name(module) == name and _keeps(module)

        def convert(old: nn.Module, kind: type[InstanceDropout] = kind, p: str = p) -> nn.Module:
            return kind(getattr(old, p), next(purposes)).train(old.training)

        model = replace(model, matches, convert)
    return model


_KINDS: dict[tuple[str, str], tuple[type[InstanceDropout], str]] = {
    ("torch", "Dropout"): (InstanceDropout, "p"),
    ("torch", "Dropout1d"): (InstanceChannelDropout, "p"),
    ("torch", "Dropout2d"): (InstanceChannelDropout, "p"),
    ("torch", "Dropout3d"): (InstanceChannelDropout, "p"),
    ("torchvision", "StochasticDepth"): (InstanceStochasticDepth, "p"),
    ("timm", "DropPath"): (InstanceStochasticDepth, "drop_prob"),
}


def _name(module: nn.Module) -> tuple[str, str]:
    return type(module).__module__.partition(".")[0], type(module).__name__


def _keeps(module: Any) -> bool:
    """Whether one of these does what its counterpart does without seeds."""
    p = getattr(module, _KINDS[_name(module)][1])
    by_rows = getattr(module, "mode", "row") == "row" and getattr(module, "scale_by_keep", True)
    return bool(by_rows) and p is not None and 0 <= p < 1
