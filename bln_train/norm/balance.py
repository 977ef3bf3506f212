"""What the backward correction takes out of each image's gradient, so that as little as possible of the batch's is left.

BatchNorm's backward takes from the gradient g of the normalised values its regression on 1 and xhat over the batch. One image at a
time the batch's is not known before its last image. What is known is what earlier batches had, `prior`, and what the images before
this one have left over; that is spread over those to come:

    (A, B) of image k  =  d * (prior + (left over by images 0 to k-1) / (N - k + HORIZON))
    left over by an image  =  d * (its means of g and g*xhat  -  [[1, m1], [m1, m2]] (A, B))
    d  =  min(1, sqrt(LARGEST_SQUARE / (1 + m2)))                              m1, m2: its means of xhat and xhat^2

so that of independent images the variance of N * HORIZON / (N + HORIZON) of them is left at the end, and not that of N. What is
left is counted as it is: where statistics lag behind, m2 is not 1, and taking out B * xhat as if it were would leave (1 - m2) * B,
layer after layer. Where xhat is imputed (fused/function.py) what stands in for it counts as xhat.

d bounds the correction whatever the inputs. Without it an image multiplies what is left by 1 - [[1, m1], [m1, m2]] / (N-k+HORIZON),
which grows geometrically where a channel is many deviations wide. With it the regressors of an image, d * (1, xhat), have a mean
square of at most c = LARGEST_SQUARE. Each image is then one step of a least-mean-squares filter whose step size is below 1 / c.
Its energy balance (Hassibi, Sayed & Kailath, IEEE Trans. Signal Processing 44(2), 1996) gives, where g' is g without the prior's
part, h is g' without the part of what is left, and w = (N - k + HORIZON) / (N + HORIZON):

    sum of w * mean h^2  <=  sum of w * mean g'^2 / (1 - c / HORIZON)           sums over images, means over positions
    mean (prior's part)^2  <=  c * |prior|^2,    |prior|^2  <=  (4 + 10) * mean g^2 of earlier batches

No image sees a later one, so any split into micro-batches gives the same; the order of the images counts.

Legend as in norm/functional.py; A and B are per position, for a loss that weighs each image with 1.

Source: the feedback of Online Normalization (Chiley et al., arXiv 1905.05894), here within a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from bln_train.norm.batchless import _BatchlessNorm

HORIZON = 64.0
"""Images: with less the last ones get more than their share, and add noise from layer to layer (recipes/RESULTS.md)."""
LARGEST_SQUARE = 8.0
"""Mean square of an image's regressors, 1 and xhat together, above which they are scaled down; that of a standard normal is 2."""
_SMALLEST_VARIANCE = 0.1  # of xhat, that a regression divides by


class BalanceRow(IntEnum):
    """Rows of a layer's state, (len(BalanceRow), C)."""

    LEFT_SHIFT = 0
    """Along 1, left over so far."""
    LEFT_SLOPE = 1
    """Along xhat, left over so far."""
    TO_COME = 2
    """Images to come and HORIZON, the same in each channel; infinite where nothing is to be spread, and then (A, B) is `prior`."""


@torch.no_grad()
def begin_balance(layers: Iterable[_BatchlessNorm], num_images: int | None) -> None:
    """Begin a batch, or a part of one that is balanced by itself; None where nobody knows how many images come."""
    some = [layer for layer in layers if layer.balance is not None]
    counts = [None if layer.is_reused else num_images for layer in some]
    for count in set(counts):
        states = [
            layer.balance for layer, own in zip(some, counts, strict=True) if own == count and layer.balance is not None
        ]
        torch._foreach_zero_(states)
        torch._foreach_add_(
            [state[BalanceRow.TO_COME] for state in states], torch.inf if count is None else count + HORIZON
        )


def unbalanced(prior: Tensor) -> Tensor:
    """A state, (len(BalanceRow), C), with which the correction of every image is that of `prior`, (2, C)."""
    state = prior.new_zeros(len(BalanceRow), prior.shape[1])
    state[BalanceRow.TO_COME] = torch.inf
    return state


def weight_of_an_image(weight: Tensor) -> Tensor:
    """By what to divide sums of a loss that weighs each image with `weight`, (), to have those of a summed loss; not by 0."""
    return torch.where(weight == 0, torch.inf, weight)


def balance_images(prior: Tensor, state: Tensor, seen: Tensor, moments: Tensor) -> Tensor:
    """(A, B) of each image of a micro-batch, (N, 2, C); the state, (len(BalanceRow), C), goes on to those after them.

    Args:
        prior: (2, C), of earlier batches.
        seen: (N, 2, C), means of g and of g*xhat.
        moments: (N, 2, C), means of xhat and of xhat^2.
    """
    taken = torch.empty_like(seen)
    left, rest = state[: BalanceRow.TO_COME], state[BalanceRow.TO_COME]
    damping = (LARGEST_SQUARE / (1 + moments[:, 1])).clamp(max=1).sqrt()
    for of_image, means, (first, second), factor in zip(taken, seen, moments, damping, strict=True):
        torch.addcdiv(prior, left, rest.clamp(min=HORIZON), out=of_image)
        of_image *= factor
        shift, slope = of_image
        left += factor * (means - torch.stack((shift + slope * first, shift * first + slope * second)))
        rest -= 1
    return taken


def regression(seen: Sequence[Tensor], moments: Sequence[Tensor]) -> Tensor:
    """(A, B) that leave nothing over, (2, ...), from means of g, g*xhat and of xhat, xhat^2.

    Less is taken where xhat hardly varies, or varies less than it is off, so that A^2 <= 4 * mean g^2 and B^2 <= 10 * mean g^2.
    """
    (along_one, along_xhat), (first, second) = seen, moments
    square = first * first
    slope = (along_xhat - along_one * first) / (second - square).clamp(min=_SMALLEST_VARIANCE).maximum(square)
    return torch.stack((along_one - slope * first, slope))
