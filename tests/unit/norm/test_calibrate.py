"""Initialisation by strata: against the whole sample in float64; warnings are errors."""

import copy
import threading

import pytest
import torch
from helpers import TINY, tiny_recipe
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

from bln_train.build.experiment import build_experiment
from bln_train.errors import UsageError
from bln_train.norm import BatchlessNorm1d, BatchlessNorm2d, fuse, initialize_statistics
from bln_train.norm.calibrate.moments import Moments
from bln_train.norm.calibrate.paused import PausedForward
from bln_train.norm.calibrate.strata import find_strata
from bln_train.recipe.recipe import Recipe

WAYS = [(1, False), (2, False), (1, True), (2, True)]


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


BRANCH_STRATA = [["stem.1"], ["left.0.1", "right.1", "down.1"], ["left.1.1"], ["dense.1"], ["last"]]


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


def named_strata(net, x):
    names = {module: name for name, module in net.named_modules()}
    norms = [m for m in names if isinstance(m, BatchlessNorm1d | BatchlessNorm2d)]
    return [[names[n] for n in stratum] for stratum in find_strata(net.eval(), norms, x).strata]


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


@pytest.mark.parametrize(("passes", "cache"), WAYS)
@pytest.mark.parametrize("split", [1, 7, 64])
def test_branches_are_observed_together_and_equal_the_whole_sample(split, passes, cache):
    """Parallel branches are one stratum; statistics are the whole sample's to 1e-12 for any split, passes and cache."""
    net, x = double(Branches()), sample()
    assert named_strata(net, x[:1]) == BRANCH_STRATA
    net.train()
    assert initialize_statistics(net, lambda: x.split(split), passes=passes, cache=cache) == []
    assert net.training
    check_statistics(net, x)


@pytest.mark.parametrize(("passes", "cache"), WAYS)
@pytest.mark.parametrize("kind", ["parallel", "later", "itself", "circle"])
def test_a_norm_at_several_places_sees_all_inputs_that_do_not_need_it(kind, passes, cache):
    """All uses count where they can; where the output comes back into the norm, those whose inputs are settled."""
    net, x = double(Shared(kind)), sample()
    initialize_statistics(net, lambda: x.split(7), passes=passes, cache=cache)
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
    assert named_strata(net, sample(1)) == [["second", "first"], ["fourth", "third"]]
    net.second.forward = lambda x: x.mul_(2)
    net.forward = lambda x: (net.first(x), net.second(x), net.third(x))
    assert named_strata(net, sample(1)) == [["first", "second"], ["third"]]


@pytest.mark.parametrize("cache", [False, True])
def test_forwards_end_at_the_stratum(cache):
    """Without cache a forward ends at its stratum's last norm; with it, no module runs twice on an image."""
    net, x = double(Branches()), sample(8)
    images = dict.fromkeys(("stem.0", "left.1.0", "dense.0", "head"), 0)

    def count(name, args):
        images[name] += len(args[0])

    for name in images:
        net.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: count(name, args))
    initialize_statistics(net, lambda: x.split(3), cache=cache)
    expected = {"stem.0": 8, "left.1.0": 8, "dense.0": 8, "head": 8}
    if not cache:  # `down` of the second stratum runs last; it, the third, fourth and fifth run the stem
        expected = {"stem.0": 40, "left.1.0": 32, "dense.0": 24, "head": 8}
    assert images == {name: number + 1 for name, number in expected.items()}  # one image shows the strata


@pytest.mark.parametrize("where", ["network", "sample", "interrupt"])
def test_failures_leave_no_thread_and_no_hook(where):
    """Whatever a forward or the sample raises comes out; threads are joined, hooks and modes are as before."""
    net, calls, threads = double(Branches()), 0, threading.enumerate()

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
        initialize_statistics(net, micro_batches, cache=True) or initialize_statistics(net, micro_batches, cache=True)
    assert threading.enumerate() == threads
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules() if m is not net.dense)
    assert net.training
    assert not net.left.training


def test_micro_batches_that_part_ways_are_refused_with_cache():
    """Cached forwards must wait at the same norm: RuntimeError names the way out."""
    net, threads = double(Shared("parallel")), threading.enumerate()
    net.forward = lambda x: net.norm(net.a(x)) if len(x) > 1 else net.other(net.b(x))
    with pytest.raises(RuntimeError, match="cache=False"):
        initialize_statistics(net, lambda: sample(4).split(3), cache=True)
    assert threading.enumerate() == threads


def test_more_waiting_forwards_than_threads_are_refused(monkeypatch):
    """A thread for each micro-batch and OpenMP helper, up to a bound; beyond it ValueError, and none is left."""
    threads = threading.enumerate()
    monkeypatch.setattr("bln_train.norm.calibrate.initialize.MAX_THREADS", 3)
    with pytest.raises(ValueError, match="use larger micro-batches"):
        initialize_statistics(double(Branches()), lambda: sample(4).split(1), cache=True)
    assert threading.enumerate() == threads
    with pytest.raises(UsageError, match="use larger micro-batches"):
        build_experiment(tiny_recipe(norm={**TINY["norm"], "init_cache": True}, train__eval_batch_size=1))


def test_waiting_forwards_leave_the_device_and_come_back():
    """Moved out and back, storages and the views of them are the same; weights and the caller's input never move."""
    net, x = double(Branches()), sample(3)
    with torch.no_grad():
        expected = net.eval()(x)
    outputs = []
    forward = PausedForward(lambda y: outputs.append(net(y)), x)
    net.dense.register_forward_pre_hook(lambda m, args: forward.wait(m, args[0]))
    try:
        forward.resume()
        assert forward.norm is net.dense
        held = forward.input
        forward.to_host()
        assert held.untyped_storage().nbytes() == 0
        assert x.untyped_storage().nbytes()
        assert all(p.untyped_storage().nbytes() for p in net.parameters())
        forward.to_device()
        forward.resume()
        assert forward.norm is None
    finally:
        forward.end()
    assert torch.equal(outputs[0], expected)


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


@pytest.mark.parametrize("cache", [False, True])
def test_constant_channels_are_floored_and_named(cache):
    """A channel without variance gets std = eps, its layer is named; BatchNorm's gets variance 0."""
    net = nn.Sequential(nn.Conv2d(3, 2, 1), BatchlessNorm2d(2), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    nn.init.zeros_(net[0].weight)
    assert initialize_statistics(net, lambda: [torch.randn(4, 3, 5, 5)], cache=cache) == ["1", "3"]
    assert torch.allclose(net[1].std, torch.tensor(1e-3))
    assert float(net[3].running_var.max()) == 0


def test_autocast_reaches_waiting_forwards():
    """Under autocast the cached and the plain way see the same, lower precision."""
    x = sample().float()
    nets = [double(Branches()).float() for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        for net, cache in zip(nets, (False, True), strict=True):
            initialize_statistics(net, lambda: x.split(7), cache=cache)
    plain, cached = (net.state_dict() for net in nets)
    assert all(torch.equal(plain[key], cached[key]) for key in plain)
    exact = copy.deepcopy(nets[0])
    initialize_statistics(exact, lambda: x.split(7))
    assert not torch.equal(exact.stem[1].mean, nets[0].stem[1].mean)


def test_a_recipe_initialises_in_one_evaluation_the_same_to_the_bit():
    """`norm.init_cache` changes the work, not the result."""
    norm = {**TINY["norm"], "init_images": 20}
    plain, cached = (
        build_experiment(tiny_recipe(norm={**norm, "init_cache": cache}, train__micro_batch_size=2)).model.state_dict()
        for cache in (False, True)
    )
    assert all(torch.equal(plain[key], cached[key]) for key in plain)


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        ({"reestimate_images": 8}, "set model.init"),
        ({"init_cache": True, "init_images": 0}, "nothing to initialise"),
    ],
)
def test_a_recipe_refuses_what_would_do_nothing(norm, message):
    """Every setting acts, or is an error."""
    with pytest.raises(ValidationError, match=message):
        tiny_recipe(norm={"name": "batchless", **norm})
    model = {"name": "torchvision:resnet18", "init": "x.pth"}
    with pytest.raises(ValidationError, match="nothing is initialised from images"):
        tiny_recipe(model=model, norm={"name": "batchless", "init_cache": True})
    recipe = tiny_recipe(model=model, norm={"name": "batchless", "reestimate_images": 8})
    assert Recipe.model_validate(recipe.untrained().model_dump()).norm.reestimate_images == 0
