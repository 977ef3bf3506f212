"""Law 3 for the folded operation, and what it keeps (float64 where not said otherwise)."""

import contextlib
import copy

import pytest
import torch
from helpers import ACTIVATIONS, largest_difference, tiny_recipe
from torch import nn
from torch.nn import functional as F

from bln_train.build.experiment import build_experiment
from bln_train.experiments.sweep import measure_saved_bytes
from bln_train.models.build import build_model, norm_factory
from bln_train.norm import BatchlessNorm1d, BatchlessNorm2d, BatchlessStatistics, convert_batchnorm
from bln_train.norm.dropout import InstanceDropout
from bln_train.norm.fused.layer import FoldedConvNorm, fold_once
from bln_train.norm.fused.network import folded_layers, fuse, unfuse
from bln_train.norm.kernels.table import LARGEST_SQUARE
from bln_train.norm.standardize import StandardizedConv2d


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def linears():
    yield "plain", lambda conv: conv(4, 6, 3, 1, 1)
    yield "as many channels as compiled kernels take", lambda conv: conv(4, 8, 3, 1, 1)
    yield "no bias", lambda conv: conv(4, 6, 3, 1, 1, bias=False)
    yield "strided, grouped", lambda conv: conv(4, 6, 3, 2, 1, groups=2, bias=False)
    yield "dilated, depthwise", lambda conv: conv(6, 6, 3, 1, 2, dilation=2, groups=6)
    yield "1x1", lambda conv: conv(4, 6, 1)
    yield "valid, not square", lambda conv: conv(4, 6, (3, 2), (2, 1), (0, 1))


def drawn_norm(kind, num_features, **settings):
    generator = torch.Generator().manual_seed(1)
    norm = kind(num_features, **settings)
    with torch.no_grad():
        for name, tensor in norm.state_dict().items():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * (0.3 if name == "raw_std" else 1))
    return norm


def both_ways(linear, norm, x, *, activation="relu", residual=False, once=False, recompute=True, weight=0.37):
    """Output and every gradient: of the parts one by one, and folded."""
    layer = FoldedConvNorm(linear, norm, relu=activation == "relu", recompute=recompute)
    holder = nn.ModuleDict({"linear": linear, "norm": norm})
    statistics = BatchlessStatistics(holder)
    with torch.no_grad():
        shape = linear(x).shape
    found = []
    for folded in (False, True):
        holder.zero_grad()
        generator = torch.Generator().manual_seed(2)
        a = x.clone(memory_format=torch.preserve_format).requires_grad_()
        r = torch.randn(shape, generator=generator).requires_grad_() if residual else None
        with fold_once([layer]) if once and folded else contextlib.nullcontext():
            if folded:
                z = layer(a, r)
            else:
                v = norm(linear(a))
                z = ACTIVATIONS[activation](v if r is None else v + r)
            loss = (z * torch.randn(shape, generator=generator)).sum() + statistics.nll()
            (loss * weight).backward()
        gradients = {n: p.grad.clone() for n, p in holder.named_parameters() if p.grad is not None}
        found.append({"out": z.detach(), "x": a.grad, **({} if r is None else {"residual": r.grad}), **gradients})
        statistics.discard()
    return found


@pytest.mark.parametrize("recompute", [True, False], ids=["recompute", "keep"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", list(linears()), ids=lambda s: s[0])
def test_law_3_folded_equals_unfolded_for_every_shape(shape, activation, residual, recompute):
    """Law 3: output and gradients to 1e-10, standardised or not, channels-last or not, once or not."""
    for conv in (nn.Conv2d, StandardizedConv2d):
        for channels_last in (False, True):
            torch.manual_seed(0)
            linear = shape[1](conv)
            x = torch.randn(3, linear.in_channels, 7, 7)
            if channels_last:
                linear, x = linear.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
            if linear.weight[0].numel() == 1:
                continue
            norm = drawn_norm(BatchlessNorm2d, linear.out_channels)
            for once in (False, True):
                plain, folded = both_ways(
                    linear, norm, x, activation=activation, residual=residual, recompute=recompute, once=once
                )
                assert plain.keys() == folded.keys()
                assert largest_difference(plain, folded) < 1e-10, (conv, channels_last, once)


@pytest.mark.parametrize("gamma", ["zero", "one zero", "negative", "none", "tiny"])
def test_law_3_holds_for_every_gamma(gamma):
    """Law 3 with gamma 0, where nothing of xhat shows in the output, below 0, tiny, and without gamma at all."""
    affine = gamma != "none"
    torch.manual_seed(0)
    linear = StandardizedConv2d(4, 6, 3, 1, 1, bias=False)
    for activation in ACTIVATIONS:
        norm = drawn_norm(BatchlessNorm2d, 6, affine=affine, correction_rate=0.1 * affine)
        with torch.no_grad():
            if gamma == "zero":
                norm.weight.zero_()
            elif gamma == "one zero":
                norm.weight[2] = 0
            elif gamma == "negative":
                norm.weight.abs_().neg_()
            elif gamma == "tiny":
                norm.weight.mul_(1e-14)
        plain, folded = both_ways(linear, norm, torch.randn(2, 4, 5, 5), activation=activation, once=True)
        assert plain.keys() == folded.keys()
        assert largest_difference(plain, folded) < 1e-10


@pytest.mark.parametrize("once", [True, False])
def test_law_3_holds_for_dense_and_one_dimensional_layers(once):
    """Linear + BatchlessNorm1d on (N, C), Conv1d + BatchlessNorm1d on (N, C, L)."""
    torch.manual_seed(0)
    for linear, x in ((nn.Linear(5, 6), torch.randn(4, 5)), (nn.Conv1d(4, 6, 3, 2, 1), torch.randn(3, 4, 9))):
        for residual in (False, True):
            plain, folded = both_ways(linear, drawn_norm(BatchlessNorm1d, 6), x, residual=residual, once=once)
            assert largest_difference(plain, folded) < 1e-10


def gradients(model, x, once):
    statistics = BatchlessStatistics(model)
    model.train()
    model.zero_grad()
    with fold_once(folded_layers(model)) if once else contextlib.nullcontext():
        labels = torch.arange(len(x)) % 10
        (F.cross_entropy(model(x), labels, reduction="sum") + statistics.nll()).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    statistics.discard()
    return found


def own(name, **settings):
    return build_model(
        name, 10, norm=norm_factory("batchless"), weight_standardization=True, **settings
    ).to(memory_format=torch.channels_last)  # fmt: skip


def foreign(name):
    from torchvision.models import get_model

    return convert_batchnorm(get_model(name, weights=None, num_classes=10))


@pytest.mark.parametrize(
    ("make", "num_folded", "num_kept"),
    [
        (lambda: own("resnet8"), 7, 0),
        (lambda: own("resnet8", shortcut="B"), 9, 0),
        (lambda: own("resnet18"), 20, 0),
        (lambda: own("wrn10_1"), 3, 4),  # norms before the convolution, but for the blocks' second
        (lambda: foreign("resnet18"), 20, 0),
        (lambda: foreign("mobilenet_v3_small"), 34, 0),  # depthwise, hardswish, squeeze-excitation
    ],
    ids=["resnet8", "resnet8 B", "resnet18", "wrn10_1", "torchvision resnet18", "torchvision mobilenet_v3_small"],
)
def test_fuse_changes_nothing_but_what_is_kept(make, num_folded, num_kept):
    """fuse: same state dict, same gradients, same eval forward; unfuse undoes it; a copy is a network of its own."""
    torch.manual_seed(0)
    model = make()
    for m in model.modules():
        if isinstance(m, InstanceDropout):
            m.p = 0.0
        if isinstance(m, BatchlessNorm2d):
            m.correction.normal_(0, 0.1)
    x = torch.randn(3, 3, 32, 32)
    keys, before = list(model.state_dict()), gradients(model, x, False)
    with torch.no_grad():
        out = model.eval()(x)
    report = fuse(model)
    assert (len(report.folded), len(report.kept)) == (num_folded, num_kept)
    assert all(report.kept.values())
    assert list(model.state_dict()) == keys
    for once in (False, True):
        assert largest_difference(before, gradients(model, x, once)) < 1e-10
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), out)
        torch.testing.assert_close(model.train()(x), out, rtol=1e-9, atol=1e-9)  # what the probe runs
    twin = copy.deepcopy(model)
    assert largest_difference(before, gradients(twin, x, True)) < 1e-10
    assert {id(p) for p in twin.parameters()}.isdisjoint(id(p) for p in model.parameters())
    with pytest.raises(ValueError, match="already"):
        fuse(model)
    unfuse(model)
    assert not folded_layers(model)
    assert largest_difference(before, gradients(model, x, False)) < 1e-12


@pytest.mark.parametrize("channels", [6, 8])  # 8 are compiled
@pytest.mark.parametrize("recompute", [True, False], ids=["recompute", "keep"])
@pytest.mark.parametrize("once", [True, False])
def test_backward_leaves_what_is_not_its_own(channels, once, recompute):
    """A gradient that others hold keeps its bits, and a graph that is kept gives the same gradients again."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, channels, 3, 1, 1).to(memory_format=torch.channels_last)
    norm = drawn_norm(BatchlessNorm2d, channels)
    layer = FoldedConvNorm(conv, norm, relu=True, recompute=recompute)
    statistics = BatchlessStatistics(norm)
    x = torch.randn(3, 4, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    held = torch.randn(3, channels, 5, 5).to(memory_format=torch.channels_last)
    before = held.clone(memory_format=torch.preserve_format)
    found = []
    with fold_once([layer]) if once else contextlib.nullcontext():
        z, nll = layer(x), statistics.nll()
        for keep in (True, False):
            torch.autograd.backward([z, nll], [held, torch.tensor(0.3)], retain_graph=keep)
            assert torch.equal(held, before)
            found.append({"x": x.grad.clone(), "weight": conv.weight.grad.clone()})
    for name, first in found[0].items():
        torch.testing.assert_close(found[1][name], 2 * first, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("channels", [6, 8])  # 8 are compiled
def test_a_residual_that_is_broadcast_gets_its_own_shape_back(channels):
    """Squeezed branches, (N, C, 1, 1), added to maps: outside the chain's layers, and one of them."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.squeeze, self.wide = nn.Conv2d(4, channels, 5), nn.Conv2d(4, channels, 3, 1, 1)
            self.norm1, self.norm2, self.norm3 = (drawn_norm(BatchlessNorm2d, channels) for _ in range(3))
            self.last = nn.Conv2d(channels, channels, 1)

        def forward(self, x):
            small = F.relu(self.norm1(self.squeeze(x)))
            out = F.relu(self.norm2(self.wide(x)) + small)
            return self.norm3(self.last(out)) + x.mean((1, 2, 3), keepdim=True)

    torch.manual_seed(0)
    net = Net().to(memory_format=torch.channels_last)
    x = torch.randn(3, 4, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    statistics, found = BatchlessStatistics(net), []
    for folded in (False, True):
        net.zero_grad()
        x.grad = None
        if folded:
            assert len(fuse(net).folded) == 3
        (net(x).square().sum() + statistics.nll()).backward()
        found.append({n: p.grad.clone() for n, p in net.named_parameters()} | {"x": x.grad})
        with torch.no_grad():
            found[-1]["probe"] = net(x)
        statistics.discard()
    assert largest_difference(*found) < 1e-10


def test_fuse_says_why_a_norm_stays():
    """Every reason: no convolution before, its output used twice, reflecting padding, an untraceable forward."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.twice, self.reflect = (BatchlessNorm2d(4) for _ in range(3))
            self.conv1 = nn.Conv2d(4, 4, 3, 1, 1)
            self.conv2 = nn.Conv2d(4, 4, 3, 1, 1, padding_mode="reflect")

        def forward(self, x):
            x = self.first(x)
            y = self.conv1(x)
            return self.reflect(self.conv2(self.twice(y) + y))

    report = fuse(Net())
    assert not report.folded
    assert "does not come from" in report.kept["first"]
    assert "used elsewhere" in report.kept["twice"]
    assert "reflect" in report.kept["reflect"]

    class Branches(Net):
        def forward(self, x):
            return self.first(x) if x.sum() > 0 else x

    assert "cannot trace" in fuse(Branches()).kept["first"]


@pytest.mark.parametrize("recompute", [True, False], ids=["recompute", "keep"])
def test_bfloat16_autocast_stays_close(recompute):
    """Under autocast the folded step is the float32 one up to bfloat16's rounding, with float32 gradients and sums."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    model = build_model("resnet8", 10, norm=norm_factory("batchless"), weight_standardization=True)
    fuse(model)
    for layer in folded_layers(model):
        layer.recompute = recompute
    x = torch.randn(4, 3, 32, 32)
    full = gradients(model, x, True)
    with torch.autocast("cpu", torch.bfloat16):
        low = gradients(model, x, True)
    for name, gradient in full.items():
        assert low[name].dtype == torch.float32
        cosine = F.cosine_similarity(low[name].flatten(), gradient.flatten(), 0)
        assert cosine > 0.98, name


@pytest.mark.parametrize("name", ["resnet20", "resnet18"])
def test_saved_bytes_are_those_of_a_network_without_norm(name):
    """Must show of the design: at most 1.02 times what `none` keeps for backward, at most 0.55 times what `batch` keeps."""
    torch.set_default_dtype(torch.float32)
    saved = {}
    for norm in ("none", "batch", "batchless"):
        recipe = tiny_recipe(model__name=name, norm={"name": norm}, train__precision="fp32")
        experiment = build_experiment(recipe)
        trainer = experiment.trainer
        saved[norm] = measure_saved_bytes(trainer.accumulation, trainer.data.train, 2)
    assert saved["batchless"] <= 1.02 * saved["none"]
    assert saved["batchless"] <= 0.55 * saved["batch"]


@pytest.mark.parametrize("recompute", [True, False], ids=["recompute", "keep"])
@pytest.mark.parametrize("channels", [6, 8])  # 8 are compiled
def test_correction_at_its_fixed_point_moves_neither_mean_nor_scale(recompute, channels):
    """With true statistics, and A and B those of the batch, the input gradient's sums with 1 and xhat are 0.

    Also where xhat is far from normal and a residual follows it: what is left over would move the scale always one way. No image is
    so wide that its correction is scaled down.
    """
    torch.manual_seed(0)
    x = (0.5 * torch.randn(40, channels, 5, 5)).exp().to(memory_format=torch.channels_last)
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    norm = BatchlessNorm2d(channels, correction_rate=1.0)
    norm.set_statistics(mean, variance.sqrt())
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.uniform_(-0.5, 0.5)
    linear = nn.Conv2d(channels, channels, 1, bias=False)
    linear.weight.data.copy_(torch.eye(channels)[..., None, None])
    layer, statistics = FoldedConvNorm(linear, norm, relu=True, recompute=recompute), BatchlessStatistics(norm)
    xhat = (x - mean.view(-1, 1, 1)) / variance.sqrt().view(-1, 1, 1)
    assert (1 + xhat.square().mean((2, 3))).max() < LARGEST_SQUARE
    residual, gz = 0.6 * xhat.abs() + 0.3 * torch.randn_like(x), torch.randn_like(x) - 0.5 * xhat + 0.2
    for _ in range(2):  # the second has what the first measured
        inputs = x.clone().requires_grad_()
        statistics.begin(None, 40)
        ((layer(inputs, residual) * gz).sum() + statistics.nll()).div(40).backward()
        statistics.update(40)
        norm.zero_grad()
    assert norm.correction[1].abs().min() > 0.05
    for along in (torch.ones_like(x), xhat):
        left = (inputs.grad * along).mean((0, 2, 3)) * 40
        assert (left / norm.correction[1]).abs().max() < 1e-9
