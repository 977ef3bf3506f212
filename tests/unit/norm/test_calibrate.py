"""Initialisation by levels: against the whole sample in float64; warnings are errors."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bln_train.norm import (
    BatchlessNorm1d,
    BatchlessNorm2d,
    BatchlessStatistics,
    fuse,
    initialize_statistics,
    layer_likelihoods,
)
from bln_train.norm.calibrate.levels import find_levels
from bln_train.norm.calibrate.moments import Moments


def conv(cin, cout):
    return nn.Conv2d(cin, cout, 3, padding=1, bias=False)


def unit(cin, cout):
    return nn.Sequential(conv(cin, cout), BatchlessNorm2d(cout), nn.ReLU(inplace=True))


class Branches(nn.Module):
    """Inception, DenseNet and downsample branches, in-place sums, and a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = unit(3, 4), nn.Sequential(unit(4, 3), unit(3, 3)), unit(4, 3)
        self.dense = unit(10, 6)
        self.down = nn.Sequential(conv(4, 6), BatchlessNorm2d(6))
        self.head, self.last = nn.Linear(6, 5, bias=False), BatchlessNorm1d(5)

    def forward(self, x):
        x = self.stem(x)
        y = torch.cat((self.left(x), self.right(x), x), 1)
        y = self.dense(y)
        y += self.down(x)
        return self.last(self.head(F.relu(y).mean((2, 3))))


BRANCH_LEVELS = [["stem.1"], ["left.0.1", "right.1", "down.1"], ["left.1.1"], ["dense.1"], ["last"]]


class Shared(nn.Module):
    """One norm at two places: independent of each other, or the second behind the first."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.a, self.b = kind, conv(3, 4), conv(3, 4)
        self.norm, self.other, self.end = BatchlessNorm2d(4), BatchlessNorm2d(4), BatchlessNorm2d(4)

    def forward(self, x):
        p, q = self.a(x), 3 * self.b(x) + 1
        if self.kind == "parallel":
            y = self.norm(p) * self.norm(q)
        elif self.kind == "later":  # the second use needs `other`, which runs after the first
            y = self.norm(p)
            y = y + self.norm(2 * F.relu(self.other(q)))
        elif self.kind == "itself":
            y = self.norm(2 * F.relu(self.norm(p)) + 1) + self.other(q)
        elif self.kind == "circle":  # each one's second use behind the other's first
            y, z = self.norm(p), self.other(q)
            y = y + self.other(2 * F.relu(y) + 1) + self.norm(z.exp())
        return self.end(F.relu(y))


def double(net, seed=0):
    torch.manual_seed(seed)
    net = net.double()
    for parameter in net.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.4)
    return net


def sample(num=30):
    return 2 + 3 * torch.randn(num, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def named_levels(net, x):
    names = {module: name for name, module in net.named_modules()}
    norms = [m for m in names if isinstance(m, BatchlessNorm1d | BatchlessNorm2d)]
    return [[names[n] for n in level] for level in find_levels(net.eval(), norms, x)]


def inputs_of(net, x):
    """What enters each norm, use by use, with the statistics as they are."""
    found = {}
    hooks = [
        m.register_forward_pre_hook(lambda m, args, name=name: found.setdefault(name, []).append(args[0]))
        for name, m in net.named_modules()
        if isinstance(m, BatchlessNorm1d | BatchlessNorm2d)
    ]
    with torch.no_grad():
        net.eval()(x)
    for hook in hooks:
        hook.remove()
    return found


def check_statistics(net, x, only_first=()):
    """Each norm has the moments of what now enters it over the whole sample."""
    for name, uses in inputs_of(net, x).items():
        norm = net.get_submodule(name)
        seen = torch.cat(uses[:1] if name in only_first else uses)
        variance, mean = torch.var_mean(seen, [i for i in range(seen.dim()) if i != 1], correction=0)
        torch.testing.assert_close(norm.mean.detach(), mean, rtol=1e-12, atol=1e-12, msg=name)
        torch.testing.assert_close(norm.std.detach(), variance.sqrt(), rtol=1e-12, atol=0, msg=name)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("split", [1, 7, 64])
def test_branches_are_observed_together_and_equal_the_whole_sample(split, passes):
    """Parallel branches are one level; statistics are the whole sample's to 1e-12 for any split and passes."""
    net, x = double(Branches()), sample()
    assert named_levels(net, x[:1]) == BRANCH_LEVELS
    net.train()
    assert initialize_statistics(net, lambda: x.split(split), passes=passes) == []
    assert net.training
    check_statistics(net, x)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("kind", ["parallel", "later", "itself", "circle"])
def test_a_norm_at_several_places_sees_all_inputs_that_do_not_need_it(kind, passes):
    """All uses count where they can; where the output comes back into the norm, those whose inputs are settled."""
    net, x = double(Shared(kind)), sample()
    initialize_statistics(net, lambda: x.split(7), passes=passes)
    check_statistics(net, x, {"itself": ("norm",), "circle": ("norm",)}.get(kind, ()))


class Escapes(nn.Module):
    """Dependencies that no tensor shows: a number read off one, an index, a buffer written in place."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third, self.fourth = (BatchlessNorm2d(3) for _ in range(4))

    def forward(self, x):
        room = torch.zeros_like(x)
        torch._foreach_add_([room[:, 1:]], [self.second(x)[:, 1:]])  # returns nothing
        early = self.fourth(room)
        scale = float(self.first(x).abs().max())
        return self.third(x * scale) + early


def test_dependencies_through_numbers_and_in_place_writes_are_seen():
    """A number read off a norm's output makes what follows depend on it; a view written in place marks its base."""
    net = double(Escapes())
    assert named_levels(net, sample(1)) == [["second", "first"], ["fourth", "third"]]
    net.second.forward = lambda x: x.mul_(2)
    net.forward = lambda x: (net.first(x), net.second(x), net.third(x))
    assert named_levels(net, sample(1)) == [["first", "second"], ["third"]]


def test_forwards_end_at_the_level():
    """A forward ends at its level's last norm."""
    net, x = double(Branches()), sample(8)
    images = dict.fromkeys(("stem.0", "left.1.0", "dense.0", "head"), 0)

    def count(name, args):
        images[name] += len(args[0])

    for name in images:
        net.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: count(name, args))
    initialize_statistics(net, lambda: x.split(3))
    # `down` of the second level runs last; it, the third, fourth and fifth run the stem
    expected = {"stem.0": 40, "left.1.0": 32, "dense.0": 24, "head": 8}
    assert images == {name: number + 1 for name, number in expected.items()}  # one image shows the levels


@pytest.mark.parametrize("where", ["network", "sample", "interrupt"])
def test_failures_leave_no_hook(where):
    """Whatever a forward or the sample raises comes out; hooks and modes are as before."""
    net, calls = double(Branches()), 0

    def fail(*_):
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt if where == "interrupt" else ValueError("stop here")

    def micro_batches():
        for n, x in enumerate(sample(6).split(2)):
            if where == "sample" and n == 2:
                raise ValueError("stop here")
            yield x

    if where != "sample":
        net.dense.register_forward_pre_hook(fail)
    net.left.eval()
    with pytest.raises(KeyboardInterrupt if where == "interrupt" else ValueError):
        initialize_statistics(net, micro_batches)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules() if m is not net.dense)
    assert net.training
    assert not net.left.training


def test_two_passes_are_the_stable_ones():
    """Where a channel's mean is 1e9 standard deviations, two passes keep twelve digits of the variance."""
    x = torch.randn(400, 2, 3, 3, dtype=torch.float64)
    x = x + torch.linspace(-5, 5, 400, dtype=torch.float64)[:, None, None, None]
    x = (x * 1024).round() / 1024  # so that 2^30 can be added exactly
    moments, shifted = Moments(), 2.0**30 + x
    moments.add(shifted)
    moments.recentre()
    moments.add(shifted)
    mean, variance = moments.read()
    torch.testing.assert_close(variance, torch.var(x, (0, 2, 3), correction=0), rtol=1e-12, atol=0)
    torch.testing.assert_close(mean - 2.0**30, x.mean((0, 2, 3)), rtol=0, atol=1e-6)


def test_what_cannot_be_initialised_is_refused():
    """An empty sample, a fused network and an untracked BatchNorm: ValueError with the reason."""
    with pytest.raises(ValueError, match="no images"):
        initialize_statistics(double(Branches()), list)
    with pytest.raises(ValueError, match="without running statistics has none to set: 0"):
        initialize_statistics(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), lambda: [sample()])
    net = nn.Sequential(nn.Conv2d(3, 4, 3), BatchlessNorm2d(4))
    fuse(net)
    with pytest.raises(ValueError, match="before fuse"):
        initialize_statistics(net, lambda: [torch.randn(2, 3, 5, 5)])


def test_constant_channels_are_floored_and_named():
    """A channel without variance gets std = eps, its layer is named; BatchNorm's gets variance 0."""
    net = nn.Sequential(nn.Conv2d(3, 2, 1), BatchlessNorm2d(2), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    nn.init.zeros_(net[0].weight)
    assert initialize_statistics(net, lambda: [torch.randn(4, 3, 5, 5)]) == ["1", "3"]
    assert torch.allclose(net[1].std, torch.tensor(1e-3))
    assert float(net[3].running_var.max()) == 0


def trained(**settings):
    """Three norms with statistics far from their inputs' and weights of every kind."""
    settings = {"eps": 1e-2, **settings}
    net = double(
        nn.Sequential(conv(3, 6), BatchlessNorm2d(6, **settings), nn.ReLU(), conv(6, 6), BatchlessNorm2d(6, **settings),
                      nn.Flatten(), nn.Linear(216, 4, bias=False), BatchlessNorm1d(4, **settings))
    )  # fmt: skip
    for norm in (net[1], net[4], net[7]):
        norm.set_statistics(torch.randn_like(norm.mean), 0.3 + torch.rand_like(norm.mean))
        for tensor in (norm.weight, norm.bias):
            nn.init.normal_(tensor)
        norm.weight.data[0] = 0.0
        norm.weight.data[1] = -1e-9
    return net


def test_likelihood_at_inference_is_trainings():
    """Over the same images, each layer's nll in eval mode is what `update` reports of a training forward, for any split."""
    net, x = trained(), sample()
    kept = copy.deepcopy(net.state_dict())
    with layer_likelihoods(net.eval()) as found:
        for part in x.split(7):
            net(part)
    assert all(torch.equal(kept[key], value) for key, value in net.state_dict().items())
    statistics = BatchlessStatistics(net)
    statistics.begin(None)
    ((net.train()(x).sum() + statistics.nll()) / len(x)).backward()
    expected = dict(zip(statistics.layers, statistics.update(len(x)).tolist(), strict=True))
    assert found == pytest.approx(expected, rel=1e-10)
