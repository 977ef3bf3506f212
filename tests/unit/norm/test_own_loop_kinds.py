"""Loops that are right and unusual: skipped steps, frozen norms, branches, forwards that nobody trains with."""

import copy

import pytest
import torch
from test_own_loop import IMAGES, Loop, Net
from torch import nn

from bln_train.norm import BatchlessNorm2d, BatchlessStatistics, convert_batchnorm


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("what", ["a gradient", "an image"])
def test_a_step_that_is_not_finite_and_skipped_leaves_no_trace(fused, what):
    """As a gradient scaler skips it: statistics, corrections and the next steps are those of a loop without it."""
    ends = []
    for bad in (True, False):
        loop = Loop(fused=fused)
        loop.take()
        if bad:
            loop.statistics.begin(8, 4)
            images = IMAGES * torch.nan if what == "an image" else IMAGES
            for part in images.split(4):
                loss = loop.net(part).sum() * (1.0 if what == "an image" else torch.inf)
                ((loss + loop.statistics.nll()) / 8).backward()
            if what == "a gradient":  # and one that overflowed in the statistics too
                loop.net.features[1].mean.grad.fill_(torch.inf)
                loop.net.features[5].raw_std.grad.fill_(torch.nan)
            kept = [p.detach().clone() for p in (loop.net.features[1].mean, loop.net.features[5].raw_std)]
            loop.statistics.update(8)
            loop.optimizer.zero_grad()
            if what == "a gradient":
                assert torch.equal(loop.net.features[1].mean, kept[0])
                assert torch.equal(loop.net.features[5].raw_std, kept[1])
            loop.statistics.follow(lambda loop=loop, images=images: loop.net(images[:4]))
            assert all(bool(value.isfinite().all()) for value in loop.net.state_dict().values())
        for _ in range(3):
            loop.take()
        ends.append({name: value.clone() for name, value in loop.net.state_dict().items()})
        assert all(bool(value.isfinite().all()) for value in ends[-1].values())
    if what == "an image":
        for name, value in ends[0].items():
            torch.testing.assert_close(value, ends[1][name], msg=name)


def test_forwards_that_nobody_trains_with_switch_no_balance_off():
    """Two of them before the first batch are no second use of a layer."""
    loop = Loop()
    loop.loss()
    loop.loss()
    loop.take()
    assert not any(layer.is_reused for layer in loop.statistics.layers.values())


def test_a_copy_after_a_forward_is_a_network_of_its_own():
    """Its likelihood belongs to the original's graph."""
    loop = Loop()
    loop.loss()
    again = copy.deepcopy(loop.net)
    assert all(layer.account.nll is None for layer in BatchlessStatistics(again).layers.values())


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
def test_all_norms_frozen_in_eval_mode(fused):
    """The usual way to freeze BatchNorm: the loop runs, weights move, statistics do not."""
    loop = Loop(fused=fused)
    for layer in loop.statistics.layers.values():
        layer.eval()
    before = copy.deepcopy(loop.net.state_dict())
    for _ in range(2):
        loop.take()
    moved = {name for name, value in loop.net.state_dict().items() if not torch.equal(value, before[name])}
    assert "features.0.weight" in moved
    assert not any(name.endswith(("mean", "raw_std", "correction")) for name in moved)


class Routed(nn.Module):
    """Each image goes through one of two branches."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3), BatchlessNorm2d(4), nn.ReLU())
        self.branches = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 3), BatchlessNorm2d(4)) for _ in range(2))
        self.turned = False

    def forward(self, x):
        x = self.first(x)
        side = (torch.arange(len(x)) % 2).bool() ^ self.turned
        return torch.cat([branch(x[side == n]) for n, branch in enumerate(self.branches) if bool((side == n).any())])


@pytest.mark.filterwarnings("ignore:the statistics of")
def test_a_branch_that_some_images_take():
    """Nothing is refused where a branch saw fewer images; it does not follow images other than those that it watched."""
    torch.manual_seed(0)
    net = Routed()
    statistics = BatchlessStatistics(net)
    for turned in (False, True):
        statistics.begin(8, 5)
        for part in IMAGES.split(4):
            ((net(part).square().sum() + statistics.nll()) / 8).backward()
        statistics.update(8)
        net.zero_grad()
        net.turned = turned
        with torch.no_grad():
            net.first[0].weight *= 1.5
        norms = [net.first[1], *(branch[1] for branch in net.branches)]
        before = [norm.mean.detach().clone() for norm in norms]
        statistics.follow(lambda: net(IMAGES[:5]))
        assert [torch.equal(norm.mean, old) for norm, old in zip(norms, before, strict=True)] == [False, True, True]
        net.turned = False


def test_dropout_where_no_norm_trains_does_not_depend_on_the_split():
    """Masks go on from micro-batch to micro-batch also where there is no likelihood."""
    for net in (Net(between=lambda: nn.Dropout(0.5)), nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5))):
        convert_batchnorm(net).train()
        for layer in BatchlessStatistics(net).layers.values():
            layer.eval()
        found = []
        for size in (1, 8):
            torch.manual_seed(3)
            statistics, outputs = BatchlessStatistics(net), []
            statistics.begin(8)
            for part in IMAGES.split(size):
                outputs.append(net(part).detach())
                statistics.nll()
            found.append(torch.cat(outputs))
            statistics.discard()
        torch.testing.assert_close(*found)


def test_a_small_loss_scale_is_one():
    """A power of two above the number of images is no forgotten division."""
    loop = Loop()
    loop.statistics.begin(8)
    loop.backwards(weight=1024 / 8)
    for p in loop.net.parameters():
        p.grad /= 1024
    loop.statistics.update(8)
