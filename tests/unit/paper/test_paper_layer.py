"""The published layer against numbers worked out one at a time in NumPy, and in the hands of whatever handles norms."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import tiny_recipe
from torch import nn

from bln_train.build.experiment import build_experiment
from bln_train.norm import (
    BatchlessNorm2d,
    BatchlessStatistics,
    FoldedConvNorm,
    convert_to_batchnorm,
    fuse,
    initialize_statistics,
    layer_likelihoods,
    merge_norms,
)
from bln_train.norm.base import LikelihoodNorm
from bln_train.norm.convert.layers import copy_batchnorm
from bln_train.paper.layer import PaperNorm, PaperNorm1d, PaperNorm2d, raw_from_std, std_from_raw, std_slope
from bln_train.train.health import layer_health, layer_records

FORMS = ["log", "abs", "inv"]
SHARES = ["channel", "layer"]
EPS = 0.05


def drawn(channels=3, *, kind=PaperNorm2d, seed=0, **settings):
    """A float64 layer with parameters of every kind, a negative stored value among them where its sign means nothing."""
    torch.manual_seed(seed)
    norm = kind(channels, **{"eps": EPS, **settings}).double()
    with torch.no_grad():
        norm.mean.copy_(torch.randn_like(norm.mean))
        norm.raw_std.copy_(0.3 + torch.rand_like(norm.raw_std))
        if norm.parametrization != "log":
            norm.raw_std[-1].neg_()
        for parameter in (norm.weight, norm.bias):
            if parameter is not None:
                parameter.copy_(torch.randn_like(parameter))
    return norm


# The oracle: loops over single numbers, nothing of bln_train's.


def sigma_of(s, form):
    return {"log": lambda: math.exp(s), "abs": lambda: abs(s) + EPS, "inv": lambda: 1 / (abs(s) + EPS)}[form]()


def numbers_of(norm):
    """The layer's settings and parameters, as numbers."""
    parameters = {name: parameter.tolist() for name, parameter in norm.state_dict().items()}
    settings = {key: getattr(norm, key) for key in ("parametrization", "gauge", "nll_weight", "nll_reduction")}
    return SimpleNamespace(**{"weight": None, "bias": None, **parameters, **settings})


def likelihood_of(x, mean, raw, norm):
    """The loss term of one micro-batch, (N, C, S), gauged at the layer's own standard deviation."""
    total = 0.0
    for n, c, s in np.ndindex(x.shape):
        k = c if len(mean) > 1 else 0
        sigma, own = sigma_of(raw[k], norm.parametrization), sigma_of(norm.raw_std[k], norm.parametrization)
        term = math.log(sigma) + ((x[n, c, s] - mean[k]) / sigma) ** 2 / 2
        term -= math.log(own) + 0.5 if norm.gauge else 0.0
        total += term / x.shape[2] / (x.shape[1] if norm.nll_reduction == "mean" else 1)
    return norm.nll_weight * total


def slopes_of(x, norm, step=1e-5):
    """Derivatives of the likelihood with respect to mean and raw_std, by central differences."""
    values = {"mean": np.array(norm.mean), "raw": np.array(norm.raw_std)}
    found = []
    for name in ("mean", "raw"):
        slopes = []
        for k in range(len(values[name])):
            ends = []
            for sign in (1, -1):
                moved = {key: value.copy() for key, value in values.items()}
                moved[name][k] += sign * step
                ends.append(likelihood_of(x, moved["mean"], moved["raw"], norm))
            slopes.append((ends[0] - ends[1]) / (2 * step))
        found.append(slopes)
    return found


def task_of(x, grad, norm):
    """Output, and gradients of input, weight and bias, from the gradient of the output; all (N, C, S)."""
    out, grad_x = np.zeros_like(x), np.zeros_like(x)
    grad_weight, grad_bias = np.zeros(x.shape[1]), np.zeros(x.shape[1])
    for n, c, s in np.ndindex(x.shape):
        k = c if len(norm.mean) > 1 else 0
        sigma = sigma_of(norm.raw_std[k], norm.parametrization)
        gamma, beta = (1.0, 0.0) if norm.weight is None else (norm.weight[c], norm.bias[c])
        normal = (x[n, c, s] - norm.mean[k]) / sigma
        out[n, c, s] = gamma * normal + beta
        grad_x[n, c, s] = grad[n, c, s] * gamma / sigma
        grad_weight[c] += grad[n, c, s] * normal
        grad_bias[c] += grad[n, c, s]
    return out, grad_x, grad_weight, grad_bias


def close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(
        found.detach(), torch.as_tensor(expected).reshape(found.shape), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "bare"])
@pytest.mark.parametrize(
    "options", [{}, {"nll_weight": 0.7, "nll_reduction": "sum", "gauge": False}], ids=["published", "sum"]
)
@pytest.mark.parametrize("kind", [PaperNorm1d, PaperNorm2d])
def test_every_number_is_the_oracles(form, share, affine, options, kind):
    """Output, likelihood and all gradients: 1e-12, those of the statistics 1e-8, as exact as central differences are."""
    norm = drawn(kind=kind, parametrization=form, share=share, affine=affine, **options)
    shape = (4, 3, 2, 3) if kind is PaperNorm2d else (4, 3)
    x = (2 * torch.randn(shape, dtype=torch.float64) + 0.5).requires_grad_()
    grad = torch.randn(shape, dtype=torch.float64)
    flat = x.detach().reshape(4, 3, -1).numpy()
    out = norm(x)
    nll = BatchlessStatistics(norm).nll()
    ((out * grad).sum() + nll).backward()

    own = numbers_of(norm)
    expected = task_of(flat, grad.reshape(4, 3, -1).numpy(), own)
    close(nll, likelihood_of(flat, own.mean, own.raw_std, own))
    close(out, expected[0])
    close(x.grad, expected[1])
    if affine:
        close(norm.weight.grad, expected[2])
        close(norm.bias.grad, expected[3])
    of_mean, of_raw = slopes_of(flat, own)
    close(norm.mean.grad, of_mean, 1e-8)
    close(norm.raw_std.grad, of_raw, 1e-8)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("share", SHARES)
def test_update_says_what_the_batch_was_and_moves_nothing(form, share):
    """Means of xhat, of xhat^2 and the nll are the batch's, over micro-batches; the gradients stay for the optimizer."""
    norm = drawn(parametrization=form, share=share, gauge=False, nll_weight=3.0, nll_reduction="sum")
    statistics, x = BatchlessStatistics(norm), 3 * torch.randn(5, 3, 2, 2, dtype=torch.float64)
    assert statistics.natural_parameters == []
    assert [id(p) for p in statistics.gradient_parameters] == [id(norm.mean), id(norm.raw_std)]
    before = copy.deepcopy(norm.state_dict())
    statistics.begin(5)
    for part in x.split((1, 3, 1)):
        ((norm(part).sum() + statistics.nll()) / 5).backward()
    kept = norm.mean.grad.clone()
    nll = statistics.update(5)
    axes = (0, 2, 3) if share == "channel" else (0, 1, 2, 3)
    xhat = (x - norm.mean.detach().view(-1, 1, 1)) / norm.std.detach().view(-1, 1, 1)
    close(norm.first_moment, xhat.mean(axes))
    close(norm.second_moment, xhat.square().mean(axes))
    close(nll[0], (norm.std.log() + xhat.square().mean(axes) / 2).mean().detach())
    assert torch.equal(norm.mean.grad, kept)
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())
    assert statistics.update(5).isnan().all()  # it saw no image


def test_frozen_statistics_get_no_gradient():
    """Without requires_grad, or in eval mode, nothing of them is known and nothing moves; the task's gradient is the same."""
    norm, x = drawn(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    norm(x).sum().backward()
    expected = norm.weight.grad.clone()
    frozen = drawn()
    for parameter in (frozen.mean, frozen.raw_std):
        parameter.requires_grad_(False)
    statistics = BatchlessStatistics(frozen)
    ((frozen(x).sum() + statistics.nll()) / 2).backward()
    assert torch.equal(frozen.weight.grad * 2, expected)
    assert statistics.update(2).isnan().all()
    frozen.eval()(x)
    assert statistics.nll() == 0.0


def test_a_stored_value_of_zero_is_no_trap():
    """At s = 0 the derivative of |s| counts as 1, or the parameter would stay there for good."""
    for form in ("abs", "inv"):
        raw = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        std = std_from_raw(raw, form, EPS)
        std.sum().backward()
        assert float(raw.grad) != 0
        close(std_slope(raw.detach(), std.detach(), form), raw.grad)


@pytest.mark.parametrize("form", FORMS)
def test_parametrizations_round_trip(form):
    std = torch.tensor([EPS, 0.3, 1.0, 7.0], dtype=torch.float64)
    close(std_from_raw(raw_from_std(std, form, EPS), form, EPS), std)


def small_network(share="channel", **settings):
    """Two convolutions and a dense layer, each with its norm, in float64."""
    torch.manual_seed(1)
    kinds = {"share": share, "eps": EPS, **settings}
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), PaperNorm2d(4, **kinds), nn.ReLU(), nn.Conv2d(4, 5, 3, bias=False),
        PaperNorm2d(5, **kinds), nn.Flatten(), nn.Linear(20, 6), PaperNorm1d(6, **kinds),
    ).double()  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("passes", [1, 2], ids=["streamed", "two-pass"])
@pytest.mark.parametrize("split", [1, 3, 8])
def test_initialization_is_the_samples_layer_by_layer(form, share, passes, split):
    """Mean and standard deviation are those of what enters each norm, the norms before it being set: streamed or in two passes."""
    net = small_network(share, parametrization=form)
    x = 2 * torch.randn(8, 3, 6, 6, dtype=torch.float64) + 1
    assert initialize_statistics(net, lambda: x.split(split), passes=passes) == []
    a = x
    for layer in net:
        if isinstance(layer, PaperNorm):
            axes = [n for n in range(a.dim()) if n != 1 or share == "layer"]
            variance, mean = torch.var_mean(a, axes, correction=0)
            close(layer.mean, mean, 1e-11)
            close(layer.std, variance.sqrt(), 1e-11)
        a = layer.eval()(a).detach()


def test_a_channel_without_variance_is_floored_and_named():
    net = nn.Sequential(PaperNorm2d(2, eps=EPS).double())
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    x[:, 1] = 3.0
    assert initialize_statistics(net, lambda: [x]) == ["0"]
    assert float(net[0].std.detach()[1]) == pytest.approx(EPS)


@pytest.mark.parametrize("share", SHARES)
def test_what_handles_norms_handles_this_one(share):
    """Likelihood at inference, merging, BatchNorm with the same function, health and records; it is never folded for training."""
    net = small_network(share, parametrization="abs", gauge=False)
    x = torch.randn(8, 3, 6, 6, dtype=torch.float64)
    initialize_statistics(net, lambda: [x + 1])
    folded = copy.deepcopy(net)
    fuse(folded)
    assert not any(isinstance(module, FoldedConvNorm) for module in folded.modules())
    expected = net.eval()(x)
    with layer_likelihoods(net) as found:
        net(x)
    statistics = BatchlessStatistics(net.train())
    ((net(x).sum() + statistics.nll()) / 8).backward()
    assert found == pytest.approx(dict(zip(statistics.layers, statistics.update(8).tolist(), strict=True)), rel=1e-10)
    assert layer_records(statistics.layers).keys() == {"1", "4", "7"}
    for layer in statistics.layers.values():
        assert layer_health(layer, layer.std.detach() * 2e3).shrunk == layer.mean.numel()

    batch, merged = convert_to_batchnorm(copy.deepcopy(net)).eval(), copy.deepcopy(net)
    assert [type(batch[n]) for n in (1, 4, 7)] == [nn.BatchNorm2d, nn.BatchNorm2d, nn.BatchNorm1d]
    torch.testing.assert_close(batch(x), expected, rtol=1e-10, atol=1e-10)
    assert len(merge_norms(merged).merged) == 3
    torch.testing.assert_close(merged(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_a_trained_batchnorm_keeps_its_function(form):
    """Its statistics become the layer's; a standard deviation that the layer cannot store, or one pair for all, is refused."""
    batch = nn.BatchNorm2d(3).double()
    for tensor in (*batch.parameters(), batch.running_mean):
        nn.init.normal_(tensor)
    batch.running_var.copy_(torch.tensor([0.5, 2.0, 3.0]))
    norm, x = (
        PaperNorm2d(3, parametrization=form, eps=EPS).double().eval(),
        torch.randn(2, 3, 4, 4, dtype=torch.float64),
    )
    copy_batchnorm(batch, norm)
    torch.testing.assert_close(norm(x), batch.eval()(x), rtol=1e-12, atol=1e-12)
    for variance, settings, what in (
        (1e-6, {}, "norm.eps is 0.05, above a trained"),
        (500.0, {"parametrization": "inv"}, "norm.eps is 0.05, which bounds standard deviations by 20"),
        (1.0, {"share": "layer"}, "norm.share: a trained BatchNorm"),
    ):
        batch.running_var.fill_(variance)
        with pytest.raises(ValueError, match=what):
            copy_batchnorm(batch, PaperNorm2d(3, eps=EPS, **settings).double())


def test_both_layers_in_one_network():
    """Each gets its own update: the product's moves itself and follows the probe, the published one waits for the optimizer."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), PaperNorm2d(4), nn.Conv2d(4, 4, 3), BatchlessNorm2d(4)).double()
    statistics, x = BatchlessStatistics(net), torch.randn(4, 3, 6, 6, dtype=torch.float64)
    initialize_statistics(net, lambda: [x])
    before = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.SGD(statistics.gradient_parameters, lr=0.1)
    statistics.begin(4, 2)
    for part in x.split(2):
        ((net(part).sin().sum() + statistics.nll()) / 4).backward()
    assert statistics.update(4).isfinite().all()
    assert torch.equal(net[1].mean.detach(), before["1.mean"])
    optimizer.step()
    net.zero_grad()
    statistics.follow(lambda: net(x[:2]))
    net(x)
    with pytest.raises(RuntimeError, match=r"likelihood of layer '1' was not added"):
        statistics.update(4)


def test_low_precision_input_keeps_statistics_in_float32():
    """bfloat16 activations: the output is bfloat16, likelihood and gradients of parameters are float32 and close to exact."""
    x = torch.randn(16, 4, 8, 8)
    exact, low = PaperNorm2d(4), PaperNorm2d(4)
    for norm, a in ((exact, x), (low, x.bfloat16())):
        out = norm(a)
        assert out.dtype == a.dtype
        ((out.float().square().sum() + BatchlessStatistics(norm).nll()) / 16).backward()
    for a, b in zip(exact.parameters(), low.parameters(), strict=True):
        assert b.grad.dtype == torch.float32
        torch.testing.assert_close(a.grad, b.grad, rtol=0.02, atol=0.02)


def test_eval_is_the_affine_map():
    """Eval mode, and training mode without gradients, compute what training does, in any memory format."""
    norm, a = drawn(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    want = norm(a).detach()
    norm.discard()
    last = norm.eval()(a.contiguous(memory_format=torch.channels_last))
    close(last, want)
    with torch.no_grad():
        close(norm.train()(a), want)


def test_arguments_and_shapes_are_checked():
    """ValueError names what came and what is wanted."""
    for settings, what in (
        ({"eps": 0.0}, "eps"), ({"init_std": 1e-6}, "init_std"), ({"parametrization": "inv", "eps": 0.9, "init_std": 2}, "below"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=what):
            PaperNorm2d(3, **settings)
    with pytest.raises(ValueError, match="at least one channel"):
        PaperNorm2d(0)
    for x in (torch.zeros(2, 3), torch.zeros(2, 4, 5, 5), torch.zeros(0, 3, 5, 5)):
        with pytest.raises(ValueError, match=r"PaperNorm2d\(3\) takes 4-dimensional input"):
            PaperNorm2d(3)(x)
    with pytest.raises(RuntimeError, match=r"nn\.DataParallel cannot share the statistics of PaperNorm2d"):
        PaperNorm2d(3)._replicate_for_data_parallel()
    assert "3, parametrization=inv, share=layer" in repr(PaperNorm2d(3, parametrization="inv", share="layer"))


@pytest.mark.parametrize(("name", "form"), [("", "log"), ("-abs", "abs"), ("-inv", "inv")])
def test_recipes_build_it(name, form):
    """`batchless-paper` and its other names are this layer, with a rate of their own for mean and standard deviation."""
    recipe = tiny_recipe(norm={"name": f"batchless-paper{name}", "statistics_rate": 0.02, "share": "layer"})
    step = build_experiment(recipe).trainer.accumulation
    norms = [module for module in step.model.modules() if isinstance(module, LikelihoodNorm)]
    assert {type(norm) for norm in norms} == {PaperNorm2d}
    assert {(norm.parametrization, norm.share, norm.eps) for norm in norms} == {(form, "layer", 1e-5)}
    assert (step.probe_images, step.folded, step.statistics.natural_parameters) == (0, [], [])
    (group,) = [group for group in step.optimizer.param_groups if group["name"] == "statistics"]
    assert (group["peak_lr"], len(group["params"])) == (0.02, 2 * len(norms))
