"""Law 9: whatever the inputs, what the correction takes out never makes a batch's gradients longer than a stated factor.

    sum of w * mean h^2  <=  sum of w * mean (g - prior's part)^2 / (1 - LARGEST_SQUARE / HORIZON)
    |prior|^2  <=  14 * mean g^2 of earlier batches

with g the gradient of an image's xhat, h what is left of it, and w = (N - k + HORIZON) / (N + HORIZON); see kernels/feedback.py.
"""

import copy
import itertools

import pytest
import torch
from torch import nn

from bln_train.norm import BatchlessChannelNorm, BatchlessNorm2d, BatchlessStatistics, fold_once, folded_layers, fuse
from bln_train.norm.kernels.feedback import corrections, regression
from bln_train.norm.kernels.table import HORIZON, LARGEST_SQUARE, StateRow, use_kernels

N, C = 16, 16  # channels that the compiled kernels take
KINDS = ["normal", "zero", "one value", "a value for each channel", "far off", "wide, narrow, in turn"]
SCALES = [1e-6, 1e-3, 1.0, 30.0, 1e3, 1e6]
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2}


def images_of(kind, scale):
    """(N, C, 2, 2), in deviations."""
    x = torch.randn(N, C, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if kind == "zero":
        x.zero_()
    if kind == "one value":
        x = torch.ones_like(x)
    if kind == "a value for each channel":
        x = torch.randn(1, C, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64).expand(x.shape)
    if kind == "far off":
        x = x * 1e-3 + 1
    x = x * scale
    if kind == "wide, narrow, in turn":
        x[1::2] /= scale * scale
    return x.contiguous(memory_format=torch.channels_last)


@pytest.fixture(params=["alone", "folded", "folded, operators"])
def path(request):
    use_kernels(request.param != "folded, operators")
    yield request.param
    use_kernels(True)


class Net(nn.Module):
    """A convolution and a norm."""

    def __init__(self, conv, norm):
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, x):
        return self.norm(self.conv(x))


def network(path, groups, dtype):
    """A norm behind a convolution that changes nothing, so that the input's gradient is the norm's."""
    norm = BatchlessChannelNorm(C, 4) if groups else BatchlessNorm2d(C)
    conv = nn.Conv2d(C, C, 1, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.eye(C)[..., None, None])
    net = Net(conv, norm).to(torch.promote_types(dtype, torch.float32), memory_format=torch.channels_last)
    if path != "alone":
        fuse(net)
        assert len(folded_layers(net)) == 1
    return net.train(), norm.batchless if groups else norm


def gradients(net, x, of_out):
    """Gradients of xhat without a correction, (N, C, S), by autograd, and the mean square of what they are rounded from, (N, C)."""
    xhat, of_out = x.double().clone().requires_grad_(), of_out.double()
    out, entering = xhat, of_out.square().mean((2, 3))
    if isinstance(net.norm, nn.Sequential):
        groups = copy.deepcopy(net.norm[1]).double()
        out = groups(xhat)
        variance = x.double().reshape(N, groups.num_groups, -1).var(2, correction=0)
        entering = entering / (variance + groups.eps).repeat_interleave(C // groups.num_groups, 1)
    out.backward(of_out)
    return xhat.grad.flatten(2), entering


@pytest.mark.filterwarnings("ignore:the statistics of")  # they are held at 0 and 1
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("groups", [False, True], ids=["plain", "groups"])
@pytest.mark.parametrize("micro", [1, 5])
def test_no_input_makes_the_gradients_longer(path, micro, groups, dtype):
    """Three batches of each kind and scale, each with what the ones before left in the correction."""
    for kind, scale in itertools.product(KINDS, SCALES):
        net, norm = network(path, groups, dtype)
        statistics, longest = BatchlessStatistics(net), torch.zeros(C, dtype=torch.float64)
        x = images_of(kind, scale).to(dtype).to(norm.mean.dtype)
        for batch in range(3):
            # An image's gradient along 1 and xhat is as large as can be.
            of_out = torch.where(x == 0, 1.0, x.sign()) * (1 + batch) + 0.125
            norm.set_statistics(torch.zeros(C), torch.ones(C))
            prior = norm.correction.double().clone()
            assert bool((prior.square().sum(0) <= 14 * longest).all()), (kind, scale)
            inputs = x.clone().requires_grad_()
            statistics.begin(N)
            with fold_once(folded_layers(net)):
                for part, of_part in zip(inputs.split(micro), of_out.split(micro), strict=True):
                    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                        out = net.norm(part.to(dtype)) if path == "alone" else net(part)
                    (((out * of_part).sum() + statistics.nll()) / N).backward()
            h = inputs.grad.double().flatten(2) * N
            statistics.update(N)
            g, entering = gradients(net, x, of_out)
            xhat = x.double().flatten(2)
            damping = (LARGEST_SQUARE / (1 + xhat.square().mean(2))).clamp(max=1).sqrt()[..., None]
            rest = g - damping * (prior[0].view(-1, 1) + prior[1].view(-1, 1) * xhat)
            weights = ((N - torch.arange(N) + HORIZON) / (N + HORIZON)).double().view(-1, 1)
            found, most = ((weights * part.square().mean(2)).sum(0) for part in (h, rest))
            slack = ROUNDING[dtype] * (weights * entering).sum(0)
            assert bool((found <= most / (1 - LARGEST_SQUARE / HORIZON) + slack).all()), (kind, scale, batch)
            longest = torch.maximum(longest, g.square().mean((0, 2)) + ROUNDING[dtype] * entering.mean(0))


def test_what_is_left_never_grows_by_itself():
    """Images without a gradient make what is left smaller, however wide their channels, in any order."""
    generator = torch.Generator().manual_seed(0)
    running = torch.zeros(2, C, dtype=torch.float64)
    for scale in SCALES:
        xhat = scale * torch.randn(200, 50, C, generator=generator, dtype=torch.float64) + torch.randn(200, 1, C)
        state = torch.randn(len(StateRow), C, generator=generator, dtype=torch.float64)
        state[StateRow.TO_COME] = 200 + HORIZON
        sizes = []
        for image in xhat:
            moments = torch.stack((image.mean(0), image.square().mean(0)))[None]
            corrections(running, state, torch.zeros_like(moments), moments, torch.ones((), dtype=torch.float64))
            sizes.append(state[: StateRow.TO_COME].norm(dim=0))
        assert bool((torch.stack(sizes).diff(dim=0) <= 1e-12).all())


@pytest.mark.parametrize("scale", SCALES)
def test_a_regression_is_no_longer_than_its_gradient(scale):
    """A^2 <= 4 mean g^2 and B^2 <= 10 mean g^2, for any mean and deviation of xhat."""
    generator = torch.Generator().manual_seed(0)
    for offset in (0.0, 1.0, scale, 1e6):
        x = offset + scale * torch.randn(1000, C, generator=generator, dtype=torch.float64)
        for g in (torch.ones_like(x), x / x.abs().max(), (x - x.mean(0)).sign(), torch.randn_like(x)):
            shift, slope = regression((g.mean(0), (g * x).mean(0)), (x.mean(0), x.square().mean(0)))
            square = g.square().mean(0) * (1 + 1e-3)
            assert bool((shift.square() <= 4 * square).all())
            assert bool((slope.square() <= 10 * square).all())
