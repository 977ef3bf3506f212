"""The correction of a folded norm where a relu hides its input (float64)."""

import math

import pytest
import torch
from test_fused import drawn_norm
from torch import nn

from bln_train.norm import BatchlessNorm2d, BatchlessStatistics
from bln_train.norm.balance import LARGEST_SQUARE
from bln_train.norm.fused.layer import FoldedConvNorm, fold_once
from bln_train.norm.kernels.epilogue import cut_off
from bln_train.norm.update import IMPUTATION_RATE


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_imputed_correction_is_its_formula():
    """Mode imputed: h, shifted and scaled by the norm's buffers, stands in for gamma * xhat; `cut_off` where the relu cut."""
    torch.manual_seed(0)
    linear = nn.Conv2d(4, 6, 3, 1, 1)
    norm = drawn_norm(BatchlessNorm2d, 6, correction_mode="imputed")
    norm.imputation.copy_(torch.stack((torch.rand(6), 0.2 + torch.rand(6))))
    layer = FoldedConvNorm(linear, norm, activation="relu")
    x, r = torch.randn(3, 4, 5, 5), torch.randn(3, 6, 5, 5)
    gz, p = torch.randn(3, 6, 5, 5), 0.37

    x1 = x.clone().requires_grad_()
    with fold_once([layer]):
        z = layer(x1, r)
        ((z * gz).sum() + BatchlessStatistics(norm).nll()).mul(p).backward()

    def c(tensor):
        return tensor.detach().view(-1, 1, 1)

    x2 = x.clone().requires_grad_()
    y = linear(x2)
    xhat = ((y - c(norm.mean)) / c(norm.std)).detach()
    v = c(norm.weight) * xhat + c(norm.bias) + r
    g = gz * p * (v > 0)
    h = torch.where(v > 0, c(norm.weight) * xhat, cut_off(r + c(norm.bias), c(norm.weight) ** 2 * 8 / math.pi))
    (a, b), (hidden, slope) = norm.correction, norm.imputation
    used = (h - c(hidden)) / (c(norm.weight) * c(slope))
    y.backward(c(norm.weight) / c(norm.std) * (g - p * (c(a) + c(b) * used)))
    torch.testing.assert_close(z, v.relu())
    torch.testing.assert_close(x1.grad, x2.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(norm.weight.grad, (g * xhat).sum((0, 2, 3)), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(norm.bias.grad, g.sum((0, 2, 3)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("channels", [6, 8])  # 8 are compiled
def test_imputation_is_measured_on_the_probe(channels):
    """update averages, over the watched images, the mean of h and its slope against gamma * xhat."""
    torch.manual_seed(0)
    linear, norm = nn.Conv2d(4, channels, 3, 1, 1), drawn_norm(BatchlessNorm2d, channels, correction_mode="imputed")
    layer = FoldedConvNorm(linear, norm, activation="relu")
    statistics = BatchlessStatistics(norm)
    x, r = (torch.randn(9, c, 6, 6).to(memory_format=torch.channels_last) for c in (4, channels))
    r *= 0.2
    shown = norm.eval()(linear(x[:5])).detach()
    norm.train()
    start = norm.imputation.clone()
    torch.testing.assert_close(start[:, 0], torch.tensor([0.0, 0.5 + 1 / math.pi]))
    statistics.begin(9, 5)
    for part in (slice(0, 3), slice(3, 7), slice(7, 9)):
        (layer(x[part], r[part]).sum() + statistics.nll()).div(9).backward()
    assert torch.equal(norm.imputation, start)
    statistics.update(9)
    gamma, beta = (p.detach().view(-1, 1, 1) for p in (norm.weight, norm.bias))
    h = torch.where(shown + r[:5] > 0, shown - beta, cut_off(r[:5] + beta, gamma**2 * 8 / math.pi))
    centred = shown - shown.mean((0, 2, 3), keepdim=True)
    slope = (h * centred).sum((0, 2, 3)) / (centred * centred).sum((0, 2, 3))
    assert (slope > 0.1).any()
    expected = torch.stack((h.mean((0, 2, 3)), slope.clamp(min=0.1)))
    torch.testing.assert_close(norm.imputation, start + IMPUTATION_RATE * (expected - start))


@pytest.mark.parametrize("mode", ["imputed", "exact"])
@pytest.mark.parametrize("channels", [6, 8])  # 8 are compiled
def test_correction_at_its_fixed_point_moves_neither_mean_nor_scale(mode, channels, monkeypatch):
    """With true statistics, and A, B and imputation those of the batch, the input gradient's sums with 1 and xhat are 0.

    Also where xhat is far from normal and a residual follows it: what is left over would move the scale always one way. No image is
    so wide that its correction is scaled down.
    """
    monkeypatch.setattr("bln_train.norm.update.IMPUTATION_RATE", 1.0)
    torch.manual_seed(0)
    x = (0.5 * torch.randn(40, channels, 5, 5)).exp().to(memory_format=torch.channels_last)
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    norm = BatchlessNorm2d(channels, correction_rate=1.0, correction_mode=mode)
    norm.set_statistics(mean, variance.sqrt())
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.uniform_(-0.5, 0.5)
    linear = nn.Conv2d(channels, channels, 1, bias=False)
    linear.weight.data.copy_(torch.eye(channels)[..., None, None])
    layer, statistics = FoldedConvNorm(linear, norm, activation="relu"), BatchlessStatistics(norm)
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


def test_what_a_relu_cut_off_is_expected_of_a_normal():
    """`cut_off` against -s * phi(b/s) / Phi(-b/s): exact at b = 0 and far out, within 0.23 s between."""
    b, s = torch.linspace(-40, 8, 2000), 0.7
    normal = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    exact = -s * (normal.log_prob(b / s) - torch.special.log_ndtr(-b / s)).exp()
    difference = cut_off(b, torch.full_like(b, 8 / math.pi * s * s)) - exact
    assert difference.abs().max() < 0.23 * s
    assert difference.abs()[[0, -1]].max() < 0.05 * s
    zero = cut_off(torch.zeros(1), torch.full((1,), 8 / math.pi * s * s))
    torch.testing.assert_close(zero, torch.tensor([-s * math.sqrt(2 / math.pi)]))
