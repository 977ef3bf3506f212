"""The batchless layer against its formulas: float64, warnings are errors."""

import copy

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from bln_train.norm import (
    BatchlessNorm1d,
    BatchlessNorm2d,
    BatchlessStatistics,
    StandardizedConv2d,
    batchless_norm,
    convert_batchnorm,
    convert_to_batchnorm,
    initialize_statistics,
    standardize_once,
    standardize_weight,
)
from bln_train.norm.functional import raw_from_std

PARAMETRIZATIONS = ["log", "abs", "inv", "var"]
torch.set_default_dtype(torch.float32)


def inputs(shape=(5, 6, 4, 3), layout="nchw", seed=0):
    g = torch.Generator().manual_seed(seed)
    a = 1.5 * torch.randn(shape, generator=g, dtype=torch.float64) + 0.3
    if layout == "channels_last":
        a = a.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        a = (
            torch.cat([a, a], 1)[:, ::2][:, : shape[1] // 2]
            .repeat_interleave(2, 1)
            .movedim(1, -1)
            .contiguous()
            .movedim(-1, 1)
        )
    mean = 0.5 * torch.randn(shape[1], generator=g, dtype=torch.float64)
    raw = 0.5 + torch.rand(shape[1], generator=g, dtype=torch.float64)
    weight = torch.randn(shape[1], generator=g, dtype=torch.float64)
    bias = torch.randn(shape[1], generator=g, dtype=torch.float64)
    return [t.requires_grad_() for t in (a.detach(), mean, raw, weight, bias)]


def reference(a, mean, raw, weight, bias):
    """The formulas of the paper in plain autograd operations."""
    shape = (1, -1, *([1] * (a.dim() - 2)))
    std = raw.exp()
    xhat = (a - mean.detach().view(shape)) / std.detach().view(shape)
    out = xhat if weight is None else weight.view(shape) * xhat + bias.view(shape)
    gauge = std.log().detach().view(shape) + 0.5
    per_element = std.log().view(shape) + ((a.detach() - mean.view(shape)) / std.view(shape)) ** 2 / 2 - gauge
    return out, per_element.expand_as(a).mean() * a.shape[0]


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((5, 6, 4, 3), "nchw"),
        ((5, 6, 4, 3), "channels_last"),
        ((5, 6, 4, 3), "transposed"),
        ((5, 6, 7), "nchw"),
        ((5, 6, 7), "transposed"),
        ((5, 6), "nchw"),
        ((1, 6, 1, 1), "channels_last"),
    ],
)
def test_law_3_equals_plain_autograd(shape, layout):
    """Law 3: value and every gradient equal those of the formulas written with stop-gradients in plain autograd."""
    found, expected = inputs(shape, layout), inputs(shape, layout)
    out, nll, sum_xhat, sum_sq = batchless_norm(*found)
    ref_out, ref_nll = reference(*expected)
    torch.testing.assert_close(out, ref_out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(nll, ref_nll, rtol=1e-12, atol=1e-12)
    assert not sum_xhat.requires_grad
    assert not sum_sq.requires_grad
    probe = torch.randn(shape, dtype=torch.float64)
    ((out * probe).sum() + 0.3 * nll).backward()
    ((ref_out * probe).sum() + 0.3 * ref_nll).backward()
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-11, atol=1e-12)


def test_law_3_gradcheck():
    """Law 3: each differentiable path passes gradcheck: out with respect to a, weight, bias; nll to mean and raw_std."""
    a, mean, raw, weight, bias = inputs((3, 4, 2, 2))

    def out(a, weight, bias):
        return batchless_norm(a, mean.detach(), raw.detach(), weight, bias).out

    def nll(mean, raw):
        # As reported it is shifted by what has no gradient: finite differences want the likelihood itself.
        likelihood = batchless_norm(a.detach(), mean, raw, weight.detach(), bias.detach()).nll
        return likelihood + len(a) * raw.detach().mean()

    assert torch.autograd.gradcheck(out, (a, weight, bias))
    assert torch.autograd.gradcheck(nll, (mean, raw))
    assert torch.autograd.gradcheck(nll, (mean, (-raw).detach().requires_grad_()))


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("gamma", [1.0, 0.0, -0.7])
def test_law_3_correction(layout, gamma):
    """Law 3: with a correction the input gradient is (weight/std) (g - p (A + B xhat)); weight and bias keep theirs."""
    a, mean, raw, weight, bias = inputs(layout=layout)
    weight = (weight.detach() * gamma).requires_grad_()
    correction = torch.randn(2, 6, dtype=torch.float64)
    out, nll, *_ = batchless_norm(a, mean, raw, weight, bias, correction=correction)
    g, p = torch.randn(out.shape, dtype=torch.float64), 1 / 7
    ((out * g).sum() + p * nll).backward()
    shape = (1, -1, 1, 1)
    std = raw.exp().view(shape)
    xhat = (a - mean.view(shape)) / std
    offset, slope = correction
    want = weight.view(shape) / std * (g - p * (offset.view(shape) + slope.view(shape) * xhat))
    torch.testing.assert_close(a.grad, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weight.grad, (g * xhat).sum((0, 2, 3)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(bias.grad, g.sum((0, 2, 3)), rtol=1e-12, atol=1e-12)


def test_correction_at_its_fixed_point_is_batchnorms_backward():
    """With true statistics and A = E[g], B = E[g xhat] per position, the input gradient is BatchNorm's."""
    a, *_, weight, bias = inputs((8, 6, 5, 5))
    num_images, positions = 8, 25
    variance, mean = torch.var_mean(a.detach(), (0, 2, 3), correction=0)
    g = torch.randn(a.shape, dtype=torch.float64)
    batch = a.detach().clone().requires_grad_()
    (
        torch.nn.functional.batch_norm(batch, None, None, weight.detach(), bias.detach(), True, 0.0, 1e-12) * g
    ).sum().backward()
    xhat = (a.detach() - mean.view(1, -1, 1, 1)) / variance.sqrt().view(1, -1, 1, 1)
    # `correction` is for a loss that weighs each image with 1; here that weight is 1/N.
    seen = torch.stack((g.sum((0, 2, 3)), (g * xhat).sum((0, 2, 3)))) / positions
    out, nll, *_ = batchless_norm(a, mean, variance.sqrt().log().requires_grad_(), weight, bias, correction=seen)
    ((out * g).sum() + nll / num_images).backward()
    torch.testing.assert_close(a.grad, batch.grad, rtol=1e-9, atol=1e-11)


def test_the_stored_parameter_and_the_deviation_determine_each_other():
    """raw_std is log std, floored at eps."""
    std = torch.tensor([1e-4, 1e-3, 0.5, 30.0], dtype=torch.float64)
    torch.testing.assert_close(raw_from_std(std, 1e-3).exp(), std.clamp(min=1e-3), rtol=1e-12, atol=0)


def test_gauged_nll_is_zero_for_matching_input():
    """The gauged likelihood is 0 for inputs of exactly the layer's mean and variance, and grows with any mismatch."""
    x = torch.randn(64, 3, 8, 8, dtype=torch.float64)
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    norm = BatchlessNorm2d(3, dtype=torch.float64)
    norm.set_statistics(mean, variance.sqrt())
    statistics = BatchlessStatistics(norm)
    norm(x)
    assert abs(float(statistics.nll().detach())) < 1e-9
    norm(2 * x)
    assert float(statistics.nll().detach()) / 64 > 1


def accumulate(norm, x, loss=lambda out: out.square().sum()):
    """Gradients of one effective batch of a single layer."""
    statistics = BatchlessStatistics(norm)
    statistics.begin(None)
    ((loss(norm(x)) + statistics.nll()) / len(x)).backward()
    return statistics


def test_natural_step_is_an_exact_moving_average():
    """mean += rate (E[a] - mean) and std^2 += rate (E[(a - mean)^2] - std^2)."""
    x, axes = 2 * torch.randn(9, 4, 3, 3, dtype=torch.float64) + 1, (0, 2, 3)
    norm = BatchlessNorm2d(4, statistics_rate=0.3, init_mean=0.2, init_std=1.7, dtype=torch.float64)
    mean = 0.2 + 0.3 * (x.mean(axes) - 0.2)
    variance = 1.7**2 + 0.3 * ((x - 0.2).square().mean(axes) - 1.7**2)
    accumulate(norm, x).update(9)
    torch.testing.assert_close(norm.mean.detach(), mean.reshape(-1), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(norm.std.detach().square(), variance.reshape(-1), rtol=1e-10, atol=1e-10)
    assert norm.mean.grad is None


@pytest.mark.filterwarnings("ignore:the statistics of")  # they are far off
def test_natural_step_counts_a_layer_used_twice_once():
    """A layer that a network calls twice gets the mean of both inputs' statistics, not their sum."""
    norm = BatchlessNorm1d(3, statistics_rate=1.0, dtype=torch.float64)
    x, y = torch.randn(50, 3, dtype=torch.float64), 3 + torch.randn(50, 3, dtype=torch.float64)
    statistics = BatchlessStatistics(norm)
    statistics.begin(50)
    ((norm(x).sum() + norm(y).sum() + statistics.nll()) / 50).backward()
    statistics.update(50)
    torch.testing.assert_close(norm.mean.detach(), torch.cat((x, y)).mean(0), rtol=1e-9, atol=1e-9)


def test_correction_means_do_not_depend_on_the_batch_size():
    """The running means A, B are per position and for a summed loss: a ragged last batch means the same."""
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    small, large = (BatchlessNorm2d(3, correction_rate=0.5, dtype=torch.float64) for _ in range(2))
    accumulate(small, x).update(4)
    accumulate(large, torch.cat([x, x, x])).update(12)
    assert small.correction.abs().max() > 0.1
    torch.testing.assert_close(small.correction, large.correction, rtol=1e-10, atol=1e-12)


def test_constant_input_cannot_blow_up():
    """A dead channel drives std to its floor, not to 0, and the layer recovers when the channel does."""
    norm = BatchlessNorm2d(2, eps=1e-3, dtype=torch.float64)
    for _ in range(300):
        accumulate(norm, torch.zeros(4, 2, 3, 3, dtype=torch.float64)).update(4)
    assert torch.equal(norm.std, torch.full((2,), 1e-3).double()) or torch.allclose(
        norm.std, torch.tensor(1e-3).double()
    )
    x = torch.randn(64, 2, 3, 3, dtype=torch.float64)
    for _ in range(200):
        accumulate(norm, x).update(64)
    torch.testing.assert_close(norm.std.detach(), x.std((0, 2, 3), correction=0), rtol=1e-6, atol=0)


def watch(statistics, net, x):
    """Training forwards of a batch that begins with x, in ragged micro-batches, and the update after them."""
    statistics.begin(None, len(x))  # without backwards
    batch = torch.cat((x, torch.randn_like(x)))
    for part in batch.split(4):
        net(part)
        statistics.nll()
    statistics.update(len(batch))


def test_probe_follows_an_affine_change_of_the_input():
    """If new weights map every input a to 3a + 2, mean moves by what the images' mean moves by, log std by log 3."""
    norm = BatchlessNorm2d(4, init_mean=0.3, init_std=2.0, dtype=torch.float64)
    x = torch.randn(6, 4, 5, 5, dtype=torch.float64)
    statistics = BatchlessStatistics(norm)
    watch(statistics, lambda part: norm(part), x)
    statistics.follow(lambda: norm(3 * x + 2))
    axes = (0, 2, 3)
    torch.testing.assert_close(norm.mean.detach(), (0.3 + 2 * x.mean(axes) + 2).reshape(-1), rtol=1e-9, atol=1e-9)
    var = x.var(axes, correction=0).reshape(-1)
    guard = 4 * (1e-4 + 1 / 150)  # of std^2 = 4: the share of one in 6 * 5 * 5 positions
    expected = 2 * ((9 * var + guard) / (var + guard)).sqrt()
    torch.testing.assert_close(norm.std.detach(), expected, rtol=1e-9, atol=0)
    before = copy.deepcopy(norm.state_dict())
    statistics.follow(lambda: norm(x))  # nothing watched since: nothing to follow
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())


def test_probe_of_two_values_that_all_but_agree_moves_the_deviation_little():
    """A dense layer has two values of two images. By chance they agree, and their ratio would be 100 a step, each step."""
    norm = BatchlessNorm1d(1, dtype=torch.float64)
    statistics = BatchlessStatistics(norm)
    watch(statistics, lambda part: norm(part), torch.tensor([[0.5], [0.51]], dtype=torch.float64))
    statistics.follow(lambda: norm(torch.tensor([[0.0], [1.0]], dtype=torch.float64)))
    assert 1 < float(norm.std.detach()) < 1.3  # sqrt((0.25 + 0.5) / 0.5)


def test_probe_without_change_is_the_identity_also_for_a_layer_used_twice():
    """With the same weights on both sides nothing moves, however often the network uses the layer."""
    norm = BatchlessNorm1d(3, dtype=torch.float64)
    x = torch.randn(6, 3, dtype=torch.float64)

    def net(part):
        return norm(5 * norm(part) + 1)

    statistics = BatchlessStatistics(norm)
    watch(statistics, net, x)
    before = copy.deepcopy(norm.state_dict())
    statistics.follow(lambda: net(x))
    for key, value in norm.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=1e-12, atol=1e-12)


def test_frozen_statistics_keep_correction_and_account():
    """With mean and std frozen, the correction still learns, the account is emptied, and the layer reports NaN."""
    norm = BatchlessNorm2d(3, dtype=torch.float64).requires_grad_(False)
    norm.weight.requires_grad_(True)
    norm.bias.requires_grad_(True)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    value = accumulate(norm, x).update(4)
    assert bool(value.isnan().all())
    assert norm.correction.abs().max() > 0
    assert norm.account.num_images == 0
    assert torch.equal(norm.mean, torch.zeros(3).double())


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_is_refused(reentrant):
    """It would run forwards again behind the account's back: an error at the update, not frozen statistics."""
    net = nn.Sequential(nn.Conv2d(3, 3, 1), BatchlessNorm2d(3), nn.ReLU())
    statistics = BatchlessStatistics(net)
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    out = torch.utils.checkpoint.checkpoint(net, x, use_reentrant=reentrant)
    ((out.sum() + statistics.nll()) / 4).backward()
    with pytest.raises(RuntimeError, match="Activation checkpointing"):
        statistics.update(4)


def test_eval_is_the_affine_map_in_both_layouts():
    """Eval, no_grad training mode, and any memory format compute the same function, and keep format and dtype."""
    norm = BatchlessNorm2d(6, init_mean=0.4, init_std=1.5, dtype=torch.float64)
    a = inputs()[0].detach()
    want = norm(a).detach()
    last = norm.eval()(a.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last.detach(), want, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(norm.train()(a), want, rtol=1e-12, atol=1e-12)
    assert norm.float()(a.bfloat16()).dtype == torch.bfloat16


def test_low_precision_input_keeps_statistics_in_float32():
    """bf16 activations, float32 sums: outputs are bf16, gradients of the parameters float32 and close to exact."""
    x = torch.randn(16, 4, 8, 8)
    exact, low = BatchlessNorm2d(4), BatchlessNorm2d(4)
    accumulate(exact, x)
    accumulate(low, x.bfloat16(), loss=lambda out: out.float().square().sum())
    for a, b in zip(exact.parameters(), low.parameters(), strict=True):
        assert b.grad.dtype == torch.float32
        torch.testing.assert_close(a.grad, b.grad, rtol=0.02, atol=0.02)


def test_arguments_and_shapes_are_checked():
    """ValueError names what came and what is wanted."""
    for settings in (
        {"statistics_rate": 0},
        {"correction_rate": 2},
        {"init_std": 0},
        {"eps": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(settings))):
            BatchlessNorm2d(3, **settings)
    with pytest.raises(ValueError, match="3 channels on axis 1, got shape"):
        BatchlessNorm2d(3)(torch.zeros(1, 4, 2, 2))
    with pytest.raises(ValueError, match="2-dimensional or 3-dimensional"):
        BatchlessNorm1d(3)(torch.zeros(1, 3, 2, 2))
    assert "4, eps=0.001, statistics_rate=0.1" in repr(BatchlessNorm2d(4))


def test_weight_standardization():
    """Rows have mean 0 and sum of squares 1, the gradient passes gradcheck, the layer is a Conv2d to everybody else."""
    weight = torch.randn(5, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    flat = standardize_weight(weight).detach().flatten(1)
    torch.testing.assert_close(flat.mean(1), torch.zeros(5).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(flat.square().sum(1), torch.ones(5).double(), rtol=1e-3, atol=0)
    assert torch.autograd.gradcheck(lambda w: standardize_weight(w, eps=0.5), (weight,))
    conv = StandardizedConv2d(3, 5, 3, padding=1, stride=2)
    assert conv.state_dict().keys() == nn.Conv2d(3, 5, 3).state_dict().keys()
    assert conv(torch.randn(2, 3, 8, 8)).shape == (2, 5, 4, 4)


def test_standardizing_once_gives_the_same_gradient():
    """One standardisation for many forwards: equal gradients, the weight's own, and nothing left behind."""
    conv = StandardizedConv2d(3, 5, 3).double()
    x = torch.randn(6, 3, 5, 5, dtype=torch.float64)
    conv(x).square().sum().backward()
    expected, conv.weight.grad = conv.weight.grad, None
    with standardize_once([conv]):
        for image in x.split(1):
            conv(image).square().sum().backward()
    torch.testing.assert_close(conv.weight.grad, expected, rtol=1e-12, atol=1e-12)
    assert conv.shared_weight is None
    with pytest.raises(RuntimeError, match="stop"), standardize_once([conv]):
        raise RuntimeError("stop")
    assert conv.shared_weight is None


def bn_net():
    torch.manual_seed(0)
    shared = nn.BatchNorm2d(4)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), shared, nn.ReLU(), shared, nn.Flatten(), nn.LazyLinear(5), nn.BatchNorm1d(5),
                        nn.Sequential(nn.ReLU(), nn.BatchNorm1d(5, affine=False))).double()  # fmt: skip
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    net.train()(x)
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_var.mul_(torch.rand_like(m.running_var) + 0.5)
            m.running_mean.add_(torch.randn_like(m.running_mean))
            if m.affine:
                nn.init.normal_(m.weight)
                nn.init.normal_(m.bias)
    return net.eval(), x


def test_law_5_conversion_is_exact_forward_and_back():
    """Law 5: a converted network equals the original in eval mode, outputs and gradients, and converts back."""
    net, x = bn_net()
    converted = convert_batchnorm(copy.deepcopy(net))
    assert not [m for m in converted.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert converted[1] is converted[3]
    back = convert_to_batchnorm(copy.deepcopy(converted))
    gradients = []
    for model in (net, converted, back):
        y = x.clone().requires_grad_()
        out = model(y)
        torch.testing.assert_close(out, net(x), rtol=1e-10, atol=1e-10)
        out.square().sum().backward()
        gradients.append([y.grad, model[0].weight.grad, model[1].weight.grad, model[1].bias.grad])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_conversion_refuses_what_it_cannot_do():
    """No statistics, no counterpart, a standard deviation too small: ValueError with the reason."""
    with pytest.raises(ValueError, match="no running statistics"):
        convert_batchnorm(nn.BatchNorm2d(3, track_running_stats=False))
    dead = nn.BatchNorm2d(2)
    dead.running_var.zero_()
    assert torch.allclose(convert_to_batchnorm(convert_batchnorm(dead)).running_var, torch.zeros(2), atol=1e-11)
    with pytest.raises(ValueError, match="below sqrt"):
        convert_to_batchnorm(BatchlessNorm2d(3, init_std=1e-4, eps=1e-5))


@pytest.mark.parametrize("split", [1, 7, 30])
def test_initialization_normalizes_layer_by_layer_for_any_split(split):
    """After initialisation every norm's output over the sample has mean 0 and variance 1, whatever the micro-batches."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), BatchlessNorm2d(4), nn.ReLU(), nn.Dropout(0.5),
                        nn.Conv2d(4, 5, 3), BatchlessNorm2d(5), nn.Flatten(), nn.LazyLinear(3),
                        BatchlessNorm1d(3)).double()  # fmt: skip
    x = 5 + 3 * torch.randn(30, 3, 8, 8, dtype=torch.float64)
    net(x[:1])
    net.train()
    assert initialize_statistics(net, lambda: x.split(split)) == []
    assert net.training
    outputs = {}
    for name, module in net.named_modules():
        if hasattr(module, "raw_std"):
            module.register_forward_hook(lambda m, a, out, name=name: outputs.__setitem__(name, out))
    net.eval()(x)
    assert len(outputs) == 3
    for out in outputs.values():
        axes = tuple(i for i in range(out.dim()) if i != 1)
        variance, mean = torch.var_mean(out, axes, correction=0)
        torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-9)
        torch.testing.assert_close(variance, torch.ones_like(variance), rtol=1e-9, atol=0)


def test_initialization_floors_and_names_constant_channels():
    """A constant channel gets std = eps, and its layer is named."""
    net = nn.Sequential(nn.Conv2d(3, 2, 1), BatchlessNorm2d(2))
    nn.init.zeros_(net[0].weight)
    assert initialize_statistics(net, lambda: [torch.randn(4, 3, 5, 5)]) == ["1"]
    assert torch.allclose(net[1].std, torch.tensor(1e-3))


def test_without_images_evaluation_gives_an_empty_output():
    """As nn.BatchNorm2d: nothing in, nothing out; training, whose likelihood is a mean over positions, refuses it."""
    norm, empty = BatchlessNorm2d(4), torch.zeros(0, 4, 2, 2)
    assert norm.eval()(empty).shape == empty.shape
    with torch.no_grad():
        assert norm.train()(empty).shape == empty.shape
    for x in (empty, torch.zeros(2, 4, 0, 2)):
        with pytest.raises(ValueError, match="not empty"):
            norm.train()(x)
    with pytest.raises(ValueError, match="not empty"):
        norm.eval()(torch.zeros(2, 4, 0, 2))
