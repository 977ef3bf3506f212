"""The layer against the authors' formulas, written once more from arXiv 2212.14729 in plain PyTorch; float64.

    a_hat = (a - sg(mu)) / sg(sigma)         sg: stop-gradient
    loss  = task loss + sum over layers of  mean over channels and positions, and over the batch, of
            log sigma + ((sg(a) - mu) / sigma)^2 / 2  -  gauge

sigma is |s| + eps (abs), exp s (log), 1 / s (inv). Nothing here is taken from bln_train but the layer under test; gradients
are autograd's alone.
"""

import math

import pytest
import torch
from torch import nn

from bln_train.norm import BatchlessStatistics
from bln_train.paper.layer import PaperNorm1d, PaperNorm2d

EPS = 0.05


class Published(nn.Module):
    """The published layer; `nll` is the last forward's likelihood, the mean over its batch."""

    def __init__(self, channels, form, *, share, affine, gauge, reduction, init_mean=0.0, init_std=1.0):
        super().__init__()
        entries = 1 if share == "layer" else channels
        stored = {
            "abs": init_std - EPS,
            "log": math.log(init_std),
            "inv": 1 / init_std,
        }
        self.form, self.gauge, self.reduction = form, gauge, reduction
        self.mu = nn.Parameter(torch.full((entries,), init_mean))
        self.s = nn.Parameter(torch.full((entries,), stored[form]))
        self.gamma = nn.Parameter(torch.ones(channels)) if affine else None
        self.beta = nn.Parameter(torch.zeros(channels)) if affine else None
        self.nll = None

    def sigma(self):
        if self.form == "abs":
            return torch.abs(self.s) + EPS
        if self.form == "log":
            return torch.exp(self.s)
        return 1 / self.s

    def forward(self, a):
        def over_channels(v):
            return v.reshape([1, -1] + [1] * (a.dim() - 2))

        mu, sigma = over_channels(self.mu), over_channels(self.sigma())
        surprise = torch.log(sigma) + ((a.detach() - mu) / sigma) ** 2 / 2
        if self.gauge:
            surprise = surprise - (torch.log(sigma).detach() + 0.5)
        per_channel = torch.stack([surprise[:, c].mean() for c in range(a.shape[1])])  # positions and batch
        self.nll = per_channel.mean() if self.reduction == "mean" else per_channel.sum()
        normal = (a - mu.detach()) / sigma.detach()
        return normal if self.gamma is None else over_channels(self.gamma) * normal + over_channels(self.beta)


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def pair(channels, dims, form, *, share, affine, gauge, reduction, **init):
    settings = {"share": share, "affine": affine, "gauge": gauge}
    kind = PaperNorm2d if dims == 2 else PaperNorm1d
    ours = kind(channels, parametrization=form, eps=EPS, nll_reduction=reduction, **settings, **init)
    return ours, Published(channels, form, reduction=reduction, **settings, **init)


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["abs", "log", "inv"])
@pytest.mark.parametrize("share", ["channel", "layer"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "bare"])
@pytest.mark.parametrize("gauge", [True, False], ids=["gauge", "plain"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("init_mean", "init_std"), [(0.0, 1.0), (-0.7, 2.5)])
def test_the_layer_is_the_papers(form, share, affine, gauge, reduction, init_mean, init_std):
    """Two layers and a loss over micro-batches of 1 and 3: values, gradients and statistics equal the whole batch's."""
    torch.manual_seed(0)
    settings = {"share": share, "affine": affine, "gauge": gauge, "reduction": reduction}
    init = {"init_mean": init_mean, "init_std": init_std}
    (first, paper_first), (last, paper_last) = (
        pair(3, 2, form, **settings, **init),
        pair(4, 1, form, **settings, **init),
    )
    for ours, papers in ((first, paper_first), (last, paper_last)):
        same(ours.mean.detach(), papers.mu.detach())
        same(ours.std.detach(), papers.sigma().detach())
        with torch.no_grad():  # away from where all channels are alike
            for mine, theirs in ((ours.mean, papers.mu), (ours.raw_std, papers.s), (ours.weight, papers.gamma),
                                 (ours.bias, papers.beta)):  # fmt: skip
                if mine is not None:
                    noise = 0.2 * torch.rand_like(mine)
                    mine.add_(noise)
                    theirs.add_(noise)
    linear = nn.Linear(3 * 5 * 2, 4)
    x, probe = 2 * torch.randn(4, 3, 5, 2) + 0.5, torch.randn(4, 4)

    def network(norm, end, x):
        return end(linear(torch.tanh(norm(x)).flatten(1)))

    whole = x.clone().requires_grad_()
    expected = network(paper_first, paper_last, whole)
    loss = (expected * probe).sum() / 4 + paper_first.nll + paper_last.nll
    loss.backward()
    expected_linear, linear.weight.grad = linear.weight.grad, None

    statistics = BatchlessStatistics(nn.ModuleList([first, last]))
    total, grads = 0.0, []
    for part, weights in zip(x.split((1, 3)), probe.split((1, 3)), strict=True):
        y = part.clone().requires_grad_()
        piece = ((network(first, last, y) * weights).sum() + statistics.nll()) / 4
        piece.backward()
        total, grads = total + piece.detach(), [*grads, y.grad]
    same(total, loss.detach())
    same(torch.cat(grads), whole.grad)
    same(linear.weight.grad, expected_linear)
    for ours, papers in ((first, paper_first), (last, paper_last)):
        same(ours.mean.grad, papers.mu.grad)
        same(ours.raw_std.grad, papers.s.grad)
        for mine, theirs in ((ours.weight, papers.gamma), (ours.bias, papers.beta)):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                same(mine.grad, theirs.grad)
    per_channel = 1 if reduction == "mean" else 1 / torch.tensor([3.0, 4.0])  # what is logged is the mean
    same(statistics.update(4), torch.stack([paper_first.nll, paper_last.nll]).detach() * per_channel)
    same(network(first.eval(), last.eval(), x).detach(), expected.detach())


@pytest.mark.parametrize("form", ["abs", "inv"])
def test_negative_stored_values_mean_their_size(form):
    """sigma depends on |s|, and its gradient has the sign of s, in ours and in the paper's formula."""
    ours, papers = pair(3, 2, form, share="channel", affine=False, gauge=True, reduction="mean")
    with torch.no_grad():
        ours.raw_std.neg_()
        papers.s.neg_()
    if form == "inv":  # the paper's 1/s is negative here, which its log could not take: it means 1/|s|
        papers.sigma = lambda: 1 / torch.abs(papers.s)
    x = torch.randn(4, 3, 5, 2)
    same(ours(x).detach(), papers(x).detach())
    ours.account.nll.div(4).backward()
    papers.nll.backward()
    same(ours.raw_std.grad, papers.s.grad)


def test_inv_is_the_papers_shifted_by_eps():
    """Ours stores s - eps, so that sigma stays below 1/eps: the same sigma for the same start, and the same gradient."""
    ours, papers = pair(2, 2, "inv", share="channel", affine=False, gauge=True, reduction="mean", init_std=4.0)
    same(ours.raw_std.detach() + EPS, papers.s.detach())
    with torch.no_grad():
        ours.raw_std.zero_()
    same(ours.std.detach(), torch.full((2,), 1 / EPS))
