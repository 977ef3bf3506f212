"""Re-estimated statistics of trained norms: the function stays, to 1e-12 in float64; warnings are errors."""

import copy

import pytest
import torch
from helpers import tiny_recipe
from test_calibrate import Shared, conv, double, inputs_of, sample
from torch import nn

from bln_train.build.experiment import build_experiment
from bln_train.models.zoo import build_torchvision_model
from bln_train.norm import (
    BatchlessNorm1d,
    BatchlessNorm2d,
    BatchlessStatistics,
    fuse,
    layer_likelihoods,
    reestimate_statistics,
)

PARAMETRIZATIONS = ["log", "abs", "inv", "var"]


def trained(parametrization, share, **settings):
    """Three norms with statistics far from their inputs' and weights of every kind."""
    settings = {"parametrization": parametrization, "share": share, "eps": 1e-2, **settings}
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


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
@pytest.mark.parametrize("share", ["channel", "layer"])
@pytest.mark.parametrize("split", [1, 7])
def test_reestimation_keeps_the_function_and_takes_the_samples_statistics(parametrization, share, split):
    """Outputs and input gradients stay to 1e-12, also off the sample; statistics become the sample's."""
    net, x, other = trained(parametrization, share), sample(), torch.randn(5, 3, 6, 6, dtype=torch.float64)
    before = [results(net, x), results(net, other)]
    assert reestimate_statistics(net, lambda: x.split(split)) == ([], [])
    for old, new in zip(before, [results(net, x), results(net, other)], strict=True):
        for a, b in zip(old, new, strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=1e-12 * float(a.abs().max()))
    for name, (seen,) in inputs_of(net, x).items():
        norm = net.get_submodule(name)
        axes = [i for i in range(seen.dim()) if share == "layer" or i != 1]
        variance, mean = torch.var_mean(seen, axes, correction=0)
        torch.testing.assert_close(norm.mean.detach(), mean.reshape(-1), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(norm.std.detach(), variance.sqrt().reshape(-1), rtol=1e-10, atol=0)


def results(net, x):
    """Output in eval mode, and the input's gradient in training."""
    statistics, y = BatchlessStatistics(net), x.clone().requires_grad_()
    out = net.train()(y)
    ((out.sin().sum() + statistics.nll()) / len(x)).backward()
    statistics.discard()
    net.zero_grad()
    with torch.no_grad():
        return net.eval()(x), y.grad


@pytest.mark.parametrize("share", ["channel", "layer"])
def test_reestimation_keeps_what_the_correction_is(share):
    """A + B * xhat of given data is that of the same data under the new statistics."""
    net, x = trained("log", share), sample()
    norm, (seen,) = net[1], inputs_of(net, x)["1"]

    def line():
        xhat = (seen.movedim(1, -1) - norm.mean) / norm.std
        return (norm.correction[0] + norm.correction[1] * xhat).detach()

    norm.correction.copy_(torch.randn_like(norm.correction))
    before, line_before = norm.correction[1].clone(), line()
    reestimate_statistics(net, lambda: [x])
    torch.testing.assert_close(line(), line_before, rtol=1e-12, atol=1e-12)
    assert float((norm.correction[1] - before).abs().min()) > 0.01


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_reestimation_keeps_a_std_whose_channel_is_dead(parametrization):
    """A new standard deviation below eps is not taken: the channel keeps the old one to the bit, its layer is named."""
    net, x = trained(parametrization, "channel"), sample()
    nn.init.zeros_(net[0].weight[2].data)
    before, std = results(net, x), net[1].std[2].detach().clone()
    assert reestimate_statistics(net, lambda: x.split(7)).kept == ["1"]
    assert torch.equal(net[1].std[2], std)
    assert float(net[1].mean[2].detach().abs()) < 1e-15
    for a, b in zip(before, results(net, x), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-12 * float(a.abs().max()))


def test_reestimation_refuses_what_cannot_take_up_the_change():
    """No weight and bias, a tied one, an empty or infinite sample, a fused network: ValueError, and nothing has changed."""
    bare = double(nn.Sequential(conv(3, 4), BatchlessNorm2d(4), BatchlessNorm2d(4, affine=False, correction_rate=0)))
    tied = double(nn.Sequential(conv(3, 4), BatchlessNorm2d(4), BatchlessNorm2d(4)))
    tied[2].weight = tied[1].weight
    fine = double(nn.Sequential(conv(3, 4), BatchlessNorm2d(4)))
    fused = copy.deepcopy(fine)
    fuse(fused)
    for net, micro_batches, message in (
        (bare, [sample()], "nothing can take up a change of statistics: 2"),
        (tied, [sample()], "belongs to another module too, which would change with it: 1, 2"),
        (fine, [], "no images"),
        (fine, [sample() * float("inf")], "beyond all numbers: 1"),
        (fused, [sample()], "before fuse"),
    ):
        before = copy.deepcopy(net.state_dict())
        with pytest.raises(ValueError, match=message):
            reestimate_statistics(net, lambda micro_batches=micro_batches: micro_batches)
        assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_reestimation_leaves_alone_what_the_network_does_not_use():
    """A norm that no forward reaches is named and keeps its statistics."""
    net = double(Shared("itself"))
    net.forward = lambda x: net.norm(net.norm(net.a(x)))
    assert reestimate_statistics(net, lambda: [sample()]) == ([], ["other", "end"])
    assert torch.equal(net.end.mean, torch.zeros(4).double())


@pytest.mark.parametrize("gauge", [True, False])
@pytest.mark.parametrize("share", ["channel", "layer"])
def test_likelihood_at_inference_is_trainings(gauge, share):
    """Over the same images, each layer's nll in eval mode is what `update` reports of a training forward, for any split."""
    net, x = trained("abs", share, gauge=gauge), sample()
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


def test_a_recipe_measures_trained_statistics_anew(tmp_path):
    """With model.init and `norm.reestimate_images` the first step starts from the same function and other statistics."""
    torch.manual_seed(0)
    reference, _ = build_torchvision_model("resnet18", 10, norm=lambda c, axes=2: nn.BatchNorm2d(c), image_size=32)
    torch.save(reference.state_dict(), tmp_path / "trained.pth")
    model = {"name": "torchvision:resnet18", "init": str(tmp_path / "trained.pth")}
    norm = {"name": "batchless", "probe_images": 2, "eps": 1e-5}
    old = build_experiment(tiny_recipe(model=model, norm=norm))
    new = build_experiment(tiny_recipe(model=model, norm={**norm, "reestimate_images": 20}, train__micro_batch_size=2))
    assert any("measured anew on 20 images" in notice for notice in new.notices)
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected, found = old.model.eval()(x), new.model.eval()(x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))
    assert float((old.model.bn1.std - new.model.bn1.std).detach().abs().min()) > 1e-3
