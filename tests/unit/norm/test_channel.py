"""Normalisation over groups of channels of each image behind a batchless norm (float64 where not said otherwise)."""

import contextlib
from functools import partial

import pytest
import torch
from helpers import ACTIVATIONS, advance, largest_difference, tiny_recipe
from torch import nn
from torch.nn import functional as F

from bln_train.build.experiment import build_experiment
from bln_train.experiments.sweep import measure_saved_bytes
from bln_train.models.build import build_model, norm_factory
from bln_train.norm import (
    BatchlessChannelNorm,
    BatchlessNorm2d,
    BatchlessStatistics,
    FoldedConvNorm,
    StandardizedConv2d,
    fold_once,
    folded_layers,
    fuse,
    unfuse,
)
from bln_train.norm.kernels.feedback import regression
from bln_train.norm.kernels.table import use_kernels
from bln_train.recipe.load import load_recipe
from bln_train.train.batches import EffectiveBatch


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    use_kernels(True)


def draw(module):
    """Away from where gradients vanish."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for norm in module.modules():
            if isinstance(norm, BatchlessNorm2d):
                for tensor in (norm.mean, norm.raw_std, norm.correction):
                    if tensor is not None:
                        tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
            elif isinstance(norm, nn.GroupNorm):
                norm.weight.copy_(torch.randn(norm.weight.shape, generator=generator))
                norm.bias.copy_(torch.randn(norm.bias.shape, generator=generator))
    return module


def gradients_of(holder, run, x, residual, inside=contextlib.nullcontext):
    """Output and every gradient of two micro-batches of one balanced batch."""
    statistics = BatchlessStatistics(holder)
    holder.zero_grad()
    statistics.begin(len(x) + 2, 2)
    generator = torch.Generator().manual_seed(2)
    found, inputs = [], []
    with inside():
        for part in (slice(0, 2), slice(2, None)):
            a = x[part].clone(memory_format=torch.preserve_format).requires_grad_()
            r = None if residual is None else residual[part].clone().requires_grad_()
            z = run(a, r)
            loss = (z * torch.randn(z.shape, generator=generator)).sum() + statistics.nll()
            (0.37 * loss).backward()
            found.append(z.detach())
            inputs += [a.grad] if r is None else [a.grad, r.grad]
    gradients = {name: p.grad.clone() for name, p in holder.named_parameters() if p.grad is not None}
    state = holder["norm"][0].feedback
    kept = {} if state is None else {"feedback": state.clone()}
    statistics.discard()
    return {"z": torch.cat(found), **kept, **gradients, **dict(enumerate(inputs))}


@pytest.mark.parametrize("recompute", [True, False], ids=["recompute", "keep"])
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "operators"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("channels", "groups"), [(8, 2), (8, 1), (16, 16), (6, 3)])
def test_law_3_folded_equals_its_parts(channels, groups, activation, residual, compiled, recompute):
    """Law 3 with groups: output, every gradient and the feedback of the batch, where torch.nn.GroupNorm is one of the parts."""
    use_kernels(compiled)
    for channels_last, once in ((True, True), (False, False)):
        torch.manual_seed(0)
        conv = StandardizedConv2d(4, channels, 3, 1, 1, bias=not once)
        norm = draw(BatchlessChannelNorm(channels, groups))
        x = torch.randn(5, 4, 7, 7)
        if channels_last:
            conv, x = conv.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
        r = torch.randn(5, channels, 7, 7) if residual else None
        layer = FoldedConvNorm(conv, norm[0], groups=norm[1], relu=activation == "relu", recompute=recompute)
        holder = nn.ModuleDict({"conv": conv, "norm": norm})

        def parts(a, r, conv=conv, norm=norm):
            v = norm(conv(a))
            return ACTIVATIONS[activation](v if r is None else v + r)

        plain = gradients_of(holder, parts, x, r)
        inside = partial(fold_once, [layer]) if once else contextlib.nullcontext
        folded = gradients_of(holder, layer, x, r, inside)
        assert plain.keys() == folded.keys()
        if groups == channels:  # h has nothing along 1 and xhat
            for name in ("norm.0.weight", "norm.0.bias"):
                assert max(plain.pop(name).abs().max(), folded.pop(name).abs().max()) < 1e-3
        assert largest_difference(plain, folded) < 1e-10
        with torch.no_grad():
            torch.testing.assert_close(layer(x, r), parts(x, r), rtol=1e-10, atol=1e-10)


def test_the_layer_is_its_formula_and_its_correction_that_of_xhat():
    """Against plain autograd: the output, and after a batch the correction is the regression of xhat's gradient on 1 and xhat."""
    torch.manual_seed(0)
    norm = BatchlessChannelNorm(6, 3, correction_rate=1.0)
    with torch.no_grad():
        norm[0].mean.normal_(0, 0.3), norm[0].raw_std.normal_(0, 0.3), norm[1].weight.normal_(), norm[1].bias.normal_()
    x, weight = torch.randn(4, 6, 5, 5), torch.randn(4, 6, 5, 5)
    inner = norm.batchless
    xhat = ((x - inner.mean.view(-1, 1, 1)) / inner.std.view(-1, 1, 1)).detach().requires_grad_()
    grouped = xhat.view(4, 3, -1)
    mean, variance = grouped.mean(2, keepdim=True), grouped.var(2, keepdim=True, correction=0)
    u = ((grouped - mean) / (variance + 1e-5).sqrt()).view(x.shape)
    out = u * norm.weight.view(-1, 1, 1) + norm[1].bias.view(-1, 1, 1)
    (out * weight).sum().backward()
    seen = [part.mean((0, 2, 3)) for part in (xhat.grad, xhat.grad * xhat.detach())]
    moments = [part.mean((0, 2, 3)).detach() for part in (xhat, xhat * xhat)]
    norm.zero_grad()

    statistic = BatchlessStatistics(norm)
    statistic.begin(4)
    found = norm(x)
    torch.testing.assert_close(found, out, rtol=1e-12, atol=1e-12)
    (((found * weight).sum() + statistic.nll()) / 4).backward()
    statistic.update(4)
    torch.testing.assert_close(inner.correction, regression(seen, moments), rtol=1e-10, atol=1e-12)


def test_scale_in_front_of_the_groups_stays_one():
    """It only gathers gradients: they are dropped after the step, no optimizer holds it, and nothing clips by it."""
    recipe = tiny_recipe(norm={"name": "batchless", "channel_groups": 4})
    experiment = build_experiment(recipe)
    advance(experiment.trainer, 3)
    inner = [module for module in experiment.model.modules() if isinstance(module, BatchlessNorm2d)]
    held = {id(p) for group in experiment.trainer.accumulation.optimizer.param_groups for p in group["params"]}
    assert inner
    assert all(isinstance(m, StandardizedConv2d) for m in experiment.model.modules() if isinstance(m, nn.Conv2d))
    for norm in inner:
        assert (norm.weight == 1).all()
        assert (norm.bias == 0).all()
        assert norm.weight.grad is None
        assert norm.bias.grad is None
        assert norm.correction.abs().max() > 0
        assert not {id(p) for p in norm.parameters()} & held


def resnet8(groups, **settings):
    torch.manual_seed(0)
    norm = norm_factory("batchless", channel_groups=groups)
    model = build_model("resnet8", 10, norm=norm, weight_standardization=True, **settings)
    model = model.to(memory_format=torch.channels_last)
    return model if settings.get("zero_init_residual") else draw(model)


@pytest.mark.parametrize("shortcut", ["A", "B", "A, blocks begin as identities"])
def test_fuse_takes_the_groups_along(shortcut):
    """fuse: every norm and its groups are folded, with the same gradients, and undone by unfuse."""
    model, x = resnet8(8, shortcut=shortcut[0], zero_init_residual=len(shortcut) > 1), torch.randn(3, 3, 32, 32)
    if len(shortcut) > 1:
        for block in model.blocks:
            assert (block.norm2.weight == 0).all()

    def gradients():
        statistics = BatchlessStatistics(model)
        model.train().zero_grad()
        statistics.begin(3, 2)
        with fold_once(folded_layers(model)):
            (F.cross_entropy(model(x), torch.arange(3), reduction="sum") + statistics.nll()).backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters()}
        statistics.discard()
        return found

    before = gradients()
    with torch.no_grad():
        out = model.eval()(x)
    report = fuse(model)
    assert not report.kept
    assert all(layer.parts.groups is not None for layer in folded_layers(model))
    assert "BatchlessNorm2d + GroupNorm + relu" in repr(folded_layers(model)[0])
    assert largest_difference(before, gradients()) < 1e-10
    with torch.no_grad():
        torch.testing.assert_close(model.train()(x), out, rtol=1e-9, atol=1e-9)  # what the probe runs
    unfuse(model)
    assert largest_difference(before, gradients()) < 1e-10


def test_groups_are_folded_behind_a_norm_without_scale_only():
    """A learned scale between the two, or groups that somebody else sees, are not what the folded layer computes."""
    for norm in (nn.Sequential(BatchlessNorm2d(8), nn.GroupNorm(2, 8)),
                 nn.Sequential(BatchlessNorm2d(8, affine=False), nn.GroupNorm(2, 8, affine=False))):  # fmt: skip
        model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU())
        fuse(model)
        assert [layer.parts.groups for layer in folded_layers(model)] == [None]
        with pytest.raises(ValueError, match="behind a norm without scale"):
            FoldedConvNorm(model[0], norm[0], groups=norm[1])


def test_it_saves_what_the_norm_without_groups_saves():
    """For backward: each layer's input and output, and no tensor of xhat."""
    saved = {}
    for name in ("batchless-plain", "batchless", "group"):
        experiment = build_experiment(tiny_recipe(norm={"name": name}, train__precision="fp32"))
        saved[name] = measure_saved_bytes(experiment.trainer.accumulation, experiment.data.train, 1)
    assert saved["batchless"] <= 1.02 * saved["batchless-plain"]
    assert saved["batchless"] < 0.75 * saved["group"]


def test_low_precision_is_close():
    """bfloat16 under autocast: gradients point where float32's do."""
    found = []
    for precision in ("fp32", "bf16"):
        recipe = tiny_recipe(norm={"name": "batchless"}, train__precision=precision)
        experiment = build_experiment(recipe)
        step = experiment.trainer.accumulation
        step.model.train()
        step.accumulate(EffectiveBatch(experiment.data.train, torch.arange(16), 0, 0))
        found.append(torch.cat([p.grad.flatten().float() for p in step.parameters]))
    assert F.cosine_similarity(*found, dim=0) > 0.99


def test_trained_weights_have_no_groups():
    """With model.init a network computes what it was trained to: auto has none."""
    recipe = load_recipe("finetune_resnet50")
    assert recipe.norm.name == "batchless"
    assert recipe.channel_groups == recipe.untrained().channel_groups == 0
    assert load_recipe("finetune_resnet50", ["norm=batch"]).untrained().with_norm("batchless").channel_groups == 0
    assert load_recipe("quickstart", ["norm=batch"]).untrained().with_norm("batchless").channel_groups == 8


@pytest.mark.parametrize(
    ("norm", "groups"),
    [
        ({}, 8),
        ({"channel_groups": 4}, 4),
        ({"name": "batchless-plain"}, 0),
        ({"name": "batchless-plain", "channel_groups": "auto"}, 0),
        ({"name": "batchless-plain", "channel_groups": 2}, 2),
        ({"name": "batchless-paper"}, 0),
        ({"name": "group"}, 0),
    ],
)
def test_auto_groups(norm, groups):
    """Eight wherever they can be."""
    recipe = tiny_recipe(norm={"name": "batchless", **norm})
    assert recipe.channel_groups == groups
    network = build_experiment(recipe).trainer.accumulation.model
    found = [m[1].num_groups for m in network.modules() if isinstance(m, BatchlessChannelNorm)]
    assert found == ([groups] * 7 if groups else [])


def test_groups_of_one_value_are_refused():
    """Normalised by itself a value is a constant: told where the layer is made, or where it meets one position, in every mode."""
    with pytest.raises(ValueError, match=r"8 groups of 8 channels without positions.*fewer groups"):
        BatchlessChannelNorm(8, 8, num_axes=0)
    with pytest.raises(ValueError, match="take fewer groups"):
        norm_factory("group", num_groups=8)(8, 0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 1), BatchlessChannelNorm(8, 8)

        def forward(self, x):
            return F.avg_pool2d(F.relu(self.norm(self.conv(x))), 1)

    net = Net()
    for fused in (False, True):
        if fused:
            fuse(net)
        for training in (False, True):
            net.train(training)
            with pytest.raises(ValueError, match=r"one value each here.*fewer groups, or larger images"):
                net(torch.randn(4, 3, 1, 1))
            assert net(torch.randn(4, 3, 2, 2)).std() > 0.1
    assert BatchlessChannelNorm(8, 4)(torch.randn(4, 8, 1, 1)).std() > 0.1
