"""The correction: what is taken out of each image's gradient, so that as little as possible of the batch's is left.

BatchNorm's backward takes from the gradient g of the normalised values its regression on 1 and xhat over the batch. One image at a
time that regression is not known before the last image. Known are `running`, the average of earlier batches, and what the images
before this one have left over. The latter is spread over the images to come:

    (A, B) of image k  =  d * (running + (left over by images 0 to k-1) / (N - k + HORIZON))
    left over by an image  =  d * (its means of g and g*xhat  -  [[1, m1], [m1, m2]] (A, B))
    d  =  min(1, sqrt(LARGEST_SQUARE / (1 + m2)))                              m1, m2: its means of xhat and xhat^2

With independent images the residual of the batch has the variance of N * HORIZON / (N + HORIZON) images, not of N. The means are
counted as they are: where statistics lag behind, m2 is not 1. Taking out B * xhat as if it were 1 would leave (1 - m2) * B, layer
after layer.

d bounds the correction whatever the inputs. Without it an image multiplies the residual by
1 - [[1, m1], [m1, m2]] / (N - k + HORIZON). That grows geometrically where a channel is many deviations wide. With d the
regressors of an image, d * (1, xhat), have a mean square of at most c = LARGEST_SQUARE. Each image is then one step of a
least-mean-squares filter whose step size is below 1 / c. The energy balance of such filters is known (Hassibi, Sayed &
Kailath, IEEE Trans. Signal Processing 44(2), 1996). Let f be g without the running part, and e be f without the part of the
residual. With w = (N - k + HORIZON) / (N + HORIZON):

    sum of w * mean e^2  <=  sum of w * mean f^2 / (1 - c / HORIZON)            sums over images, means over positions
    mean (running part)^2  <=  c * |running|^2,    |running|^2  <=  (4 + 10) * mean g^2 of earlier batches

No image sees a later one, so any split into micro-batches gives the same. The order of the images counts.

Legend as in docs/method.md. A and B are per position, for a loss that weighs each image with 1.

Source: the feedback of Online Normalization (Chiley et al., arXiv 1905.05894), here within a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bln_train.norm.kernels.table import HORIZON, LARGEST_SQUARE, StateRow

_SMALLEST_VARIANCE = 0.1  # of xhat, that a regression divides by


@torch.no_grad()
def begin_feedback(states: Sequence[Tensor], num_images: int | None) -> None:
    """Begin a batch, or a part of one with a feedback of its own, in place; None where nobody knows how many images come.

    Args:
        states: (len(StateRow), C) each.
    """
    if not states:
        return
    torch._foreach_zero_(list(states))
    to_come = torch.inf if num_images is None else num_images + HORIZON
    torch._foreach_add_([state[StateRow.TO_COME] for state in states], to_come)


def no_feedback(running: Tensor) -> Tensor:
    """A state, (len(StateRow), C), with which the correction of every image is that of `running`, (2, C)."""
    state = running.new_zeros(len(StateRow), running.shape[1])
    state[StateRow.TO_COME] = torch.inf
    return state


def nonzero(weight: Tensor) -> Tensor:
    """What sums of a loss that weighs each image with `weight`, (), are divided by, so that a weight of 0 gives 0."""
    return torch.where(weight == 0, torch.inf, weight)


def corrections(running: Tensor, state: Tensor, means: Tensor, moments: Tensor, weight: Tensor) -> Tensor:
    """(A, B) of each image of a micro-batch, (N, 2, C); the state goes on to the images after them.

    An image of weight 0 has no gradient, from which nothing is taken out: it leaves the state as it is.

    Args:
        running: (2, C), of earlier batches.
        state: (len(StateRow), C).
        means: (N, 2, C), of g and of g*xhat.
        moments: (N, 2, C), means of xhat and of xhat^2.
        weight: () of each image in the loss.
    """
    found = torch.empty_like(means)
    left, rest = state[: StateRow.TO_COME], state[StateRow.TO_COME]
    damping = (LARGEST_SQUARE / (1 + moments[:, 1])).clamp(max=1).sqrt()
    counts = (weight != 0).to(state.dtype)
    parts = zip(found, means, moments, damping, damping * counts, strict=True)
    for of_image, own, (first, second), factor, share in parts:
        torch.addcdiv(running, left, rest.clamp(min=HORIZON), out=of_image)
        of_image *= factor
        shift, slope = of_image
        left += share * (own - torch.stack((shift + slope * first, shift * first + slope * second)))
        rest -= counts
    return found


def regression(means: Sequence[Tensor], moments: Sequence[Tensor]) -> Tensor:
    """(A, B) that leave nothing over, (2, ...), from means of g, g*xhat and of xhat, xhat^2.

    Less is taken where xhat hardly varies, or varies less than it is off, so that A^2 <= 4 * mean g^2 and B^2 <= 10 * mean g^2.
    """
    (along_one, along_xhat), (first, second) = means, moments
    square = first * first
    slope = (along_xhat - along_one * first) / (second - square).clamp(min=_SMALLEST_VARIANCE).maximum(square)
    return torch.stack((along_one - slope * first, slope))
