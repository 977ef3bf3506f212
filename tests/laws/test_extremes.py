"""Inputs far from what statistics expect: whole steps stay finite, and no statistic leaves the range of what was seen."""

import itertools
from functools import partial

import pytest
import torch
from torch import nn

from bln_train.norm import BatchlessChannelNorm, BatchlessNorm2d, BatchlessStatistics, fold_once, folded_layers, fuse
from bln_train.paper.layer import PaperNorm2d

N, C = 8, 16
KINDS = ["normal", "zero", "one value", "a value for each channel", "one image of many wide", "dead, then awake"]
SCALES = [1e-6, 1.0, 1e6]


def images_of(kind, scale, step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(N, C, 3, 3, generator=generator)
    if kind == "zero":
        x.zero_()
    if kind == "one value":
        x.fill_(1)
    if kind == "a value for each channel":
        x = torch.randn(1, C, 1, 1, generator=generator).expand(x.shape)
    if kind == "one image of many wide":
        x[1:] *= 1e-3
    if kind == "dead, then awake" and step < 3:
        x[:, ::2] = 0.0
    return (x * scale).contiguous(memory_format=torch.channels_last)


def network(groups, settings):
    torch.manual_seed(0)
    make = {
        True: partial(BatchlessChannelNorm, C, 4),
        False: partial(BatchlessNorm2d, C),
        "paper": partial(PaperNorm2d, C),
    }
    norms = [make[groups](**settings) for _ in range(2)]
    convs = [nn.Conv2d(C, C, 1, bias=False) for _ in norms]
    return nn.Sequential(convs[0], *([*norms[0]] if groups is True else [norms[0]]), nn.ReLU(), convs[1],
                         *([*norms[1]] if groups is True else [norms[1]]), nn.Flatten(), nn.Linear(9 * C, 3))  # fmt: skip


@pytest.mark.filterwarnings("ignore:the statistics of")  # they are meant to be far off
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize(
    ("groups", "settings", "optimizer"),
    [
        (False, {}, torch.optim.SGD),
        (True, {}, torch.optim.SGD),
        (False, {"statistics_rate": 1e-3}, torch.optim.SGD),
        ("paper", {}, torch.optim.Adam),
    ],
    ids=["plain", "groups", "slow", "optimizer"],
)
def test_steps_on_extreme_inputs_stay_finite(groups, settings, optimizer, fused, dtype):
    """Six steps with the probe, of images of all kinds and scales: weights, statistics, corrections, gradients."""
    for kind, scale in itertools.product(KINDS, SCALES):
        net = network(groups, settings).to(dtype, memory_format=torch.channels_last)
        if fused:
            fuse(net)
        net.train()
        statistics = BatchlessStatistics(net)
        natural = set(statistics.natural_parameters)
        stepper = optimizer([p for p in net.parameters() if p not in natural], lr=1e-3)
        for step in range(6):
            x = images_of(kind, scale, step).to(dtype)
            statistics.begin(N, 4 if natural else 0)
            with fold_once(folded_layers(net)):
                for part in x.split(3):
                    loss = nn.functional.cross_entropy(
                        net(part), torch.zeros(len(part), dtype=torch.long), reduction="sum"
                    )
                    ((loss + statistics.nll()) / N).backward()
            norm_of = nn.utils.clip_grad_norm_([p for p in net.parameters() if p not in natural], 1.0)
            assert bool(norm_of.isfinite()), (kind, scale, step)
            statistics.update(N)
            stepper.step()
            stepper.zero_grad()
            if natural:
                statistics.follow(lambda x=x, net=net: net(x[:4]))
            for name, value in net.state_dict().items():
                assert bool(value.isfinite().all()), (kind, scale, step, name)


@pytest.mark.filterwarnings("ignore:the statistics of")
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_what_the_probe_does_to_a_deviation_is_bounded(scale):
    """A channel that wakes gets at most a hundred times the deviation that is seen, one that dies keeps a hundredth of its own.

    Less where its own was too small: by as much as it was.
    """
    generator = torch.Generator().manual_seed(0)
    asleep, awake = torch.zeros(4, C, 60, 60), scale * torch.randn(4, C, 60, 60, generator=generator)
    for old, new in ((asleep, awake), (awake, asleep)):
        norm = BatchlessNorm2d(C)
        statistics = BatchlessStatistics(norm.train())
        statistics.begin(4, 4)
        ((norm(old).sum() + statistics.nll()) / 4).backward()
        statistics.update(4)
        std = norm.std.detach().clone()
        statistics.follow(lambda new=new, norm=norm: norm(new))
        shown = new.std((0, 2, 3), correction=0)
        assert bool((norm.std <= torch.maximum(101 * shown, 1.01 * std)).all())
        lag = (old.std((0, 2, 3), correction=0) / std).clamp(min=1)
        assert bool((norm.std >= std / lag / 101).all())
