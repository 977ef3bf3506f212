"""Law 10: frozen is frozen. Nothing in eval mode or without requires_grad moves, fused or not (float64)."""

import contextlib
import copy

import pytest
import torch
from helpers import largest_difference
from torch import nn

from bln_train.norm import BatchlessNorm2d, BatchlessStatistics, StandardizedConv2d, fold_once, folded_layers, fuse
from bln_train.norm.convert.layers import to_batch


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Block(nn.Module):
    def __init__(self, conv, *, affine=True):
        super().__init__()
        self.conv = conv
        self.norm = BatchlessNorm2d(conv.out_channels, affine=affine)
        self.groups = nn.GroupNorm(2, conv.out_channels) if not affine else nn.Identity()
        self.act, self.adds = nn.ReLU(), conv.in_channels == conv.out_channels

    def forward(self, x):
        out = self.groups(self.norm(self.conv(x)))
        return self.act(out + x if self.adds else out)


class Net(nn.Module):
    """Two chains of folded layers, standardised and not, with groups behind a norm and with a sum."""

    def __init__(self):
        super().__init__()
        self.first = Block(StandardizedConv2d(3, 8, 3, bias=False))
        self.second = Block(StandardizedConv2d(8, 8, 3, 1, 1), affine=False)
        self.third = nn.Sequential(nn.Conv2d(8, 8, 1), BatchlessNorm2d(8), nn.LeakyReLU(0.1))
        self.pool, self.last = nn.AvgPool2d(2), Block(nn.Conv2d(8, 4, 1))

    def forward(self, x):
        return self.last(self.pool(self.third(self.second(self.first(x)))))


def network(fused):
    torch.manual_seed(0)
    net = Net()
    for norm in norms(net):
        for tensor in (norm.mean, norm.raw_std, norm.correction):
            nn.init.normal_(tensor.data, 0.0, 0.3)
        if norm.affine:
            nn.init.normal_(norm.weight.data, 1.0, 0.3)
    net.train()
    if fused:
        assert len(fuse(net).folded) == 4
    return net


def norms(net):
    return [module for module in net.modules() if isinstance(module, BatchlessNorm2d)]


def freeze(*parameters):
    for parameter in parameters:
        parameter.requires_grad_(False)


def some(kind):
    """Do it to the first, the second or the third of the network, or to all."""
    return {f"{kind.__name__} {name}": (kind, name) for name in ("first", "second", "third", "all")}


def norm_eval(part):
    for norm in norms(part):
        norm.eval()


def part_eval(part):
    part.eval()


def statistics_frozen(part):
    freeze(*(p for norm in norms(part) for p in (norm.mean, norm.raw_std)))


def mean_frozen(part):
    freeze(*(norm.mean for norm in norms(part)))


def raw_std_frozen(part):
    freeze(*(norm.raw_std for norm in norms(part)))


def affine_frozen(part):
    freeze(*(p for norm in norms(part) for p in (norm.weight, norm.bias)))
    freeze(*(p for m in part.modules() if isinstance(m, nn.GroupNorm) for p in (m.weight, m.bias)))


def weight_frozen(part):
    freeze(*(norm.weight for norm in norms(part)))


def conv_frozen(part):
    freeze(*(m.weight for m in part.modules() if isinstance(m, nn.Conv2d)))


def part_frozen(part):
    freeze(*part.parameters())


HOWS = (norm_eval, part_eval, statistics_frozen, mean_frozen, raw_std_frozen, affine_frozen, weight_frozen, conv_frozen,
        part_frozen)  # fmt: skip
GRID = {name: case for how in HOWS for name, case in some(how).items()}
IMAGES = torch.randn(6, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def part_of(net, name):
    return net if name == "all" else net.get_submodule(name)


def frozen_names(net):
    """State that may not move: what needs no gradient, and all of the norms in eval mode."""
    fixed = {name for name, p in net.named_parameters() if not p.requires_grad}
    for prefix, module in net.named_modules():
        if isinstance(module, BatchlessNorm2d) and not module.training:
            own = module.state_dict().keys() - {"weight", "bias"}  # these learn, as a BatchNorm's in eval mode
            fixed |= {f"{prefix}.{name}" for name in own}
    return fixed


def train(net, num_steps, once):
    """Outputs, gradients of images and of parameters, and the state after whole steps, probe and optimizer included."""
    statistics = BatchlessStatistics(net)
    natural = set(statistics.natural_parameters)
    parameters = [p for p in net.parameters() if p not in natural]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)
    found = {}
    for number in range(num_steps):
        statistics.begin(len(IMAGES), 4)
        with fold_once(folded_layers(net)) if once else contextlib.nullcontext():
            for n, part in enumerate(IMAGES.split(2)):
                x = part.clone().requires_grad_()
                out = net(x)
                ((out.square().sum() + statistics.nll()) / len(IMAGES)).backward()
                found |= {f"{number}.{n}.out": out.detach(), f"{number}.{n}.x": x.grad}
        found |= {f"{number}.{n}": p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
        statistics.update(len(IMAGES))
        optimizer.step()
        optimizer.zero_grad()
        statistics.follow(lambda: net(IMAGES[:4]))
    end = {f"end.{n}": value.clone() for n, value in net.state_dict().items()}
    for name in (
        "end.first.conv.weight",
        "end.second.conv.weight",
    ):  # folded, filters that learn are centred: it is all the same
        end[name] -= end[name].mean((1, 2, 3), keepdim=True)
    return found | end


@pytest.mark.parametrize("name", GRID)
def test_law_10_frozen_is_frozen_fused_or_not(name):
    """Whatever is frozen: nothing of it moves in three steps, and fused, with constants once or not, is equal to unfused."""
    how, where = GRID[name]
    results = []
    for fused, once in ((False, False), (True, False), (True, True)):
        net = network(fused)
        how(part_of(net, where))
        before, fixed = copy.deepcopy(net.state_dict()), frozen_names(net)
        if all(not p.requires_grad for p in net.parameters()):
            return  # no gradient, no training: the unfused network refuses it
        results.append(train(net, 3, once))
        for key in fixed:
            assert torch.equal(before[key], net.state_dict()[key]), (key, fused, once)
        moved = {key for key, value in net.state_dict().items() if not torch.equal(value, before[key])}
        assert "last.norm.mean" in moved or where == "all"
    for fused in results[1:]:
        assert results[0].keys() == fused.keys()
        assert largest_difference(results[0], fused) < 1e-9


def test_what_is_half_frozen_moves_in_its_other_half():
    """With the mean frozen the standard deviation takes its natural step, and the other way round."""
    for frozen, free in (("mean", "raw_std"), ("raw_std", "mean")):
        for fused in (False, True):
            net = network(fused)
            freeze(*(getattr(norm, frozen) for norm in norms(net)))
            before = copy.deepcopy(net.state_dict())
            train(net, 1, fused)
            assert not torch.equal(before[f"third.1.{free}"], net.state_dict()[f"third.1.{free}"])


@pytest.mark.parametrize("fused", [False, True])
def test_a_norm_in_eval_mode_is_torchs_in_eval_mode(fused):
    """Output and gradients of the input, of scale and shift: those of nn.BatchNorm2d in eval mode; no likelihood, no correction."""
    net = network(fused)
    norm_eval(net)
    reference = network(False)
    for part in (reference.first, reference.second, reference.last):
        part.norm = to_batch(part.norm, eps=1e-9).eval()
    reference.third[1] = to_batch(reference.third[1], eps=1e-9).eval()
    grads = []
    for model in (reference, net):
        x = IMAGES.clone().requires_grad_()
        out = model(x)
        out.square().sum().backward()
        grads.append(
            {"out": out.detach(), "x": x.grad, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}
        )
    statistics = BatchlessStatistics(net)
    assert statistics.nll() == 0
    shared = {k: v for k, v in grads[1].items() if k in grads[0]}
    assert {"x", "out", "first.norm.weight", "third.1.bias", "first.conv.weight"} <= shared.keys()
    assert largest_difference({k: grads[0][k] for k in shared}, shared) < 1e-9


@pytest.mark.parametrize("when", ["before the update", "before the probe"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_norm_that_is_frozen_during_a_step_stays_from_there_on(fused, when):
    """Gradients and the probe's moments are there already, and move nothing."""
    for how in (norm_eval, statistics_frozen):
        net = network(fused)
        statistics = BatchlessStatistics(net)
        statistics.begin(len(IMAGES), 4)
        ((net(IMAGES).square().sum() + statistics.nll()) / len(IMAGES)).backward()
        if when == "before the update":
            how(net.first)
            before = copy.deepcopy(net.state_dict())
            statistics.update(len(IMAGES))
        else:
            statistics.update(len(IMAGES))
            how(net.first)
            before = copy.deepcopy(net.state_dict())
        with torch.no_grad():
            net.first.conv.weight += 0.1
            before["first.conv.weight"] += 0.1
        statistics.follow(lambda net=net: net(IMAGES[:4]))
        after = net.state_dict()
        kinds = ("mean", "raw_std") if how is statistics_frozen else ("mean", "raw_std", "correction")
        names = [name for name in after if name.startswith("first.") and name.rpartition(".")[2] in kinds]
        assert names
        for name in names:
            assert torch.equal(before[name], after[name]), name
