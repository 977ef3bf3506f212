"""Random draws as a pure function of (seed, epoch, image, purpose).

A stateful generator hands out numbers in the order of the requests. Another split of the batch, another process or a
resume would then change what each image gets. Here each draw is a hash of its purpose. So the split, the device and the
number of processes cannot change it. Nothing has to be saved, and no memory grows with the effective batch.

The mixers are the finalizers of MurmurHash3 (32 bits) and SplitMix64 (Steele et al. 2014). They need integers that wrap
around, as torch's do. torch shifts right arithmetically, so the sign bits are masked off.
"""

from __future__ import annotations

from torch import Tensor

_GOLDEN_64 = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer


def _shift_right_64(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix_64(x: Tensor) -> Tensor:
    x = (x ^ _shift_right_64(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift_right_64(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shift_right_64(x, 31)


def instance_seeds(seed: int, epoch: int, index: Tensor) -> Tensor:
    """Hash (seed, epoch, image) into one 64-bit seed for each image.

    Args:
        seed: the run's seed.
        epoch: the epoch, from 0.
        index: (N,) int64, positions of the images in the data set.

    Returns: (N,) int64 on the device of `index`.
    """
    state = _mix_64(index + (seed + 1) * _GOLDEN_64 % 2**63)
    return _mix_64(state + (epoch + 1) * _GOLDEN_64 % 2**63)


def draw_uniform(seeds: Tensor, purpose: int) -> Tensor:
    """Draw one number in [0, 1) for each instance.

    Args:
        seeds: (N,) int64 from `instance_seeds`.
        purpose: names the draw; different purposes are independent.

    Returns: (N,) float64 multiples of 2^-53.
    """
    return _shift_right_64(_mix_64(seeds + (purpose + 1) * _GOLDEN_64 % 2**63), 11).double() * 2.0**-53


def draw_integers(seeds: Tensor, purpose: int, high: int) -> Tensor:
    """Draw one integer in [0, high) for each instance: (N,) int64 seeds to (N,) int64."""
    return (draw_uniform(seeds, purpose) * high).long()


def keep_mask(seeds: Tensor, purpose: int, shape: tuple[int, ...], keep: float) -> Tensor:
    """Draw a Bernoulli mask, element by element a function of its instance's seed.

    Args:
        seeds: (N,) int64 from `instance_seeds`.
        purpose: names the draw, as in `draw_uniform`.
        shape: shape of one instance.
        keep: probability of True, in [0, 1].

    Returns: (N, *shape) bool. Hashing is 32-bit: half the temporary memory of 64.
    """
    import math

    import torch

    base = _mix_64(seeds + (purpose + 1) * _GOLDEN_64 % 2**63).to(torch.int32)
    x = torch.arange(math.prod(shape), dtype=torch.int32, device=seeds.device) * -1640531527  # 0x9E3779B9
    x = x.view(1, *shape) ^ base.view(-1, *([1] * len(shape)))
    for bits, factor in ((16, -2048144789), (13, -1028477387), (16, 1)):  # 0x85EBCA6B, 0xC2B2AE35
        x = (x ^ ((x >> bits) & ((1 << (32 - bits)) - 1))) * factor
    return (x & 0x7FFFFFFF) < int(keep * 2**31)
