"""What `fuse` folds and what it leaves alone: whatever it is, the fused network computes what the unfused one does (float64)."""

import contextlib
import copy
import io
import operator
import pickle
import random
import warnings

import numpy as np
import pytest
import torch
from helpers import largest_difference
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from bln_train.norm import (
    BatchlessNorm1d,
    BatchlessNorm2d,
    BatchlessStatistics,
    FoldedConvNorm,
    StandardizedConv2d,
    fold_once,
    folded_layers,
    fuse,
    unfuse,
)


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def drawn(model):
    """The model, with statistics, scales and a correction that show."""
    for module in model.modules():
        if isinstance(module, (BatchlessNorm1d, BatchlessNorm2d)):
            for tensor in (module.mean, module.raw_std, module.weight, module.bias, module.correction):
                if tensor is not None:
                    torch.nn.init.normal_(tensor.data, 0.3, 0.3)
    return model


def step(model, x, once):
    """Output, every gradient and the probe's output of one step."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    statistics = BatchlessStatistics(model)
    statistics.begin(len(x))
    with fold_once(folded_layers(model)) if once else contextlib.nullcontext():
        out = model(x)
        ((out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum() + statistics.nll()).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    statistics.discard()
    with torch.no_grad():
        return {**found, "x": x.detach() if x.grad is None else x.grad, "out": out.detach(), "probe": model(x)}


def report_of_equal(make, x):
    """Fuse, and compare with the unfused network, constants worked out once or not; the report."""
    torch.manual_seed(0)
    model = drawn(make())
    model(x)  # whatever is lazy
    for once in (False, True):
        unfuse(model)
        wanted = step(model, x, once)
        report = fuse(model)
        found = step(model, x, once)
        assert wanted.keys() == found.keys()
        assert largest_difference(wanted, found) < 1e-9
    return report


class Doubled(nn.Conv2d):
    """A convolution with a forward of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


class Halved(BatchlessNorm2d):
    def forward(self, x):
        return super().forward(x) / 2


class Lifted(nn.ReLU):
    def forward(self, x):
        return super().forward(x) + 1


def old_weight_norm(conv):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(conv)


def pruned(conv):
    return prune.l1_unstructured(conv, "weight", amount=0.5)


def hooked(module, how):
    hook = {
        "register_forward_hook": lambda m, args, out: out * 2,
        "register_forward_pre_hook": lambda m, args: (args[0] * 2,),
        "register_full_backward_hook": lambda m, grads, of_out: tuple(None if g is None else g * 2 for g in grads),
        "register_full_backward_pre_hook": lambda m, grads: tuple(g * 2 for g in grads),
    }[how]
    getattr(module, how)(hook)
    return module


def with_own_forward(module):
    original = module.forward
    module.forward = lambda x: original(x) * 2
    return module


def with_hook_on_weight(conv):
    conv.weight.register_hook(lambda grad: grad * 2)
    return conv


HOOKS = [
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
]
ADDED = {
    "subclass": (lambda conv: Doubled(3, 8, 3), "Doubled, a Conv2d that may do something else"),
    "weight norm": (parametrizations.weight_norm, "the convolution before it has parametrised weights"),
    "old weight norm": (old_weight_norm, "has hooks"),
    "pruned": (pruned, "has hooks"),
    "lazy": (lambda conv: nn.LazyConv2d(8, 3), ""),
    "own forward": (with_own_forward, "has a forward of its own"),
    "hook on the weight": (with_hook_on_weight, "has weights with hooks"),
    "transposed": (lambda conv: nn.ConvTranspose2d(3, 8, 3), "comes from ConvTranspose2d, not from a convolution"),
    **{how: (lambda conv, how=how: hooked(conv, how), "the convolution before it has hooks") for how in HOOKS},
}


@pytest.mark.parametrize("name", ADDED)
def test_a_convolution_that_is_not_plain_is_left_alone(name):
    """A type of its own, parametrised or pruned weights, hooks: the norm stays, with the reason."""
    change, reason = ADDED[name]
    report = report_of_equal(
        lambda: nn.Sequential(change(nn.Conv2d(3, 8, 3)), BatchlessNorm2d(8), nn.ReLU()), torch.randn(4, 3, 6, 6)
    )
    if reason:
        assert reason in report.kept["1"]
    else:  # what was lazy has become plain
        assert report.folded == ("1",)


@pytest.mark.parametrize("how", HOOKS)
def test_a_norm_with_hooks_or_of_a_type_of_its_own_is_left_alone(how):
    x = torch.randn(4, 3, 6, 6)
    report = report_of_equal(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), hooked(BatchlessNorm2d(8), how), nn.ReLU()), x)
    assert report.kept == {"1": "it has hooks"}
    report = report_of_equal(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), Halved(8), nn.ReLU()), x)
    assert report.kept == {"1": "Halved is a subclass of a batchless norm"}


@pytest.mark.parametrize("how", HOOKS)
def test_an_activation_that_is_not_plain_stays_behind_the_folded_norm(how):
    x = torch.randn(4, 3, 6, 6)
    for make in (lambda: hooked(nn.ReLU(), how), lambda: hooked(nn.LeakyReLU(0.1), how), Lifted):
        report = report_of_equal(lambda make=make: nn.Sequential(nn.Conv2d(3, 8, 3), BatchlessNorm2d(8), make()), x)
        assert report.folded == ("1",)

    def with_groups():
        groups = hooked(nn.GroupNorm(2, 8), how)
        return nn.Sequential(nn.Conv2d(3, 8, 3), BatchlessNorm2d(8, affine=False), groups, nn.ReLU())

    assert report_of_equal(with_groups, x).folded == ("1",)


@pytest.mark.parametrize("how", [*HOOKS, "own forward"])
def test_a_part_with_hooks_is_called_as_a_whole(how):
    """Hooks of a block would not be called if the network were traced through it."""

    def make():
        block = nn.Sequential(nn.Conv2d(3, 8, 3), BatchlessNorm2d(8), nn.ReLU())
        if how == "own forward":
            with_own_forward(block)
        else:
            hooked(block, how)
        return nn.Sequential(block, nn.Conv2d(8, 8, 3), BatchlessNorm2d(8))

    report = report_of_equal(make, torch.randn(2, 3, 6, 6))
    assert report.folded == ("2",)
    assert report.kept["0.1"].startswith("it is part of '0', which has ")


def test_a_network_with_a_forward_of_its_own_keeps_it():
    report = report_of_equal(
        lambda: with_own_forward(nn.Sequential(nn.Conv2d(3, 8, 3), BatchlessNorm2d(8))), torch.randn(2, 3, 6, 6)
    )
    assert report.kept == {"1": "the network has a forward of its own"}


def test_a_part_that_is_fused_stays_so():
    """Of a network with a fused part the rest is fused."""
    torch.manual_seed(0)
    part = drawn(nn.Sequential(nn.Conv2d(3, 8, 3), BatchlessNorm2d(8), nn.ReLU()))
    model = drawn(nn.Sequential(part, nn.Conv2d(8, 8, 3), BatchlessNorm2d(8)))
    x = torch.randn(2, 3, 6, 6)
    wanted = step(model, x, False)
    fuse(part)
    assert fuse(model).folded == ("2",)
    assert len(folded_layers(part)) == len(folded_layers(model)) == 1
    assert largest_difference(wanted, step(model, x, False)) < 1e-9


class OnAxes(nn.Module):
    """Linear + norm, where the norm's channels are axis 1."""

    def __init__(self, linear, num_features):
        super().__init__()
        self.linear, self.norm, self.last = linear, BatchlessNorm1d(num_features), nn.Linear(6, 2)

    def forward(self, x):
        return self.last(F.relu(self.norm(self.linear(x))))


class Added(nn.Module):
    """conv + norm + what `other` makes of the input and the output."""

    def __init__(self, other):
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(3, 3, 3, 1, 1), BatchlessNorm2d(3), other

    def forward(self, x):
        out = self.norm(self.conv(x.mean((2, 3), keepdim=True)))
        return F.relu(out + self.other(x))


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (
            lambda: OnAxes(nn.Linear(4, 6), 6),
            (5, 6, 4),
        ),  # as many channels as features: nothing but the result shows it
        (lambda: OnAxes(nn.Linear(4, 6), 6), (5, 4)),
        (lambda: Added(lambda x: x), (2, 3, 5, 5)),  # the residual is the larger one
        (lambda: Added(lambda x: x[:1]), (2, 3, 5, 5)),
        (lambda: Added(lambda x: x.shape[2]), (2, 3, 5, 5)),
        (lambda: Added(lambda x: x.mean((2, 3), keepdim=True).float()), (2, 3, 5, 5)),
        (lambda: Added(lambda x: x.mean()), (2, 3, 5, 5)),
    ],
)
def test_shapes_that_a_folded_layer_does_not_take_run_part_by_part(make, shape):
    """Seen when it runs: the norm is folded, and the parts are called where the shapes are others."""
    assert report_of_equal(make, torch.randn(shape)).folded == ("norm",)


def test_the_mixed_sum_has_the_larger_precision_still():
    torch.manual_seed(0)
    model = Added(lambda x: x.mean((2, 3), keepdim=True).double()).float()
    fuse(model)
    assert model(torch.randn(2, 3, 5, 5).float()).dtype == torch.float64


def test_an_empty_batch_is_refused_as_the_unfused_network_refuses_it():
    model = nn.Sequential(nn.Conv2d(3, 3, 3), BatchlessNorm2d(3))
    fuse(model)
    with pytest.raises(ValueError, match="not empty"):
        model(torch.zeros(0, 3, 5, 5))


def test_weights_and_statistics_of_two_precisions_are_not_folded():
    report = fuse(nn.Sequential(nn.Conv2d(3, 8, 3).float(), BatchlessNorm2d(8)))
    assert "the weights before it are torch.float32" in report.kept["1"]


def test_a_norm_that_cannot_take_the_output_is_not_folded():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), BatchlessNorm1d(8))
    assert fuse(model).kept == {"1": "BatchlessNorm1d does not take what Conv2d gives"}
    with pytest.raises(ValueError, match="2-dimensional or 3-dimensional"):
        model(torch.randn(2, 3, 5, 5))


class Shared(nn.Module):
    """Every part is used twice, the convolution once without a norm."""

    def __init__(self, conv):
        super().__init__()
        self.conv, self.norm1, self.norm2 = conv, BatchlessNorm2d(4), BatchlessNorm2d(4)

    def forward(self, x):
        x = F.relu(self.norm1(self.conv(x)))
        x = F.relu(self.norm2(self.conv(x)) + x)
        return self.conv(F.relu(self.norm2(self.conv(x))))


@pytest.mark.parametrize("kind", [nn.Conv2d, StandardizedConv2d])
def test_parts_that_are_used_twice_have_the_gradient_of_all_uses(kind):
    """Standardised filters, too, that are used with and without a norm inside `fold_once`."""
    report = report_of_equal(lambda: Shared(kind(4, 4, 3, 1, 1)), torch.randn(2, 4, 5, 5))
    assert set(report.folded) == {"norm1", "norm2"}


class Calls(nn.Module):
    """conv + norm, called in some way."""

    def __init__(self, how):
        super().__init__()
        self.conv, self.norm, self.last, self.how = nn.Conv2d(3, 3, 1), BatchlessNorm2d(3), nn.Conv2d(3, 3, 1), how

    def forward(self, x):
        return self.how(self, x.clone())


def overwritten(net, x):
    x = x.detach()
    out = net.norm(net.conv(x))
    with_more = x.mul_(2)  # the folded convolution must not run after it
    return F.relu(out + with_more)


def overwritten_before_the_norm(net, x):
    x = x.detach()
    y = net.conv(x)
    x.mul_(2)
    return net.norm(y) + x


def overwrites_the_output(net, x):
    y = net.norm(net.conv(x))
    y *= 2
    return net.last(y) + x


def other_name_is_overwritten(net, x):
    """A list holds the first addend, too."""
    maps = [x]
    x += net.norm(net.conv(F.relu(x)))
    return net.last(maps[0] * 2 + x)


def other_name_is_overwritten_by_a_method(net, x):
    half = x[:1]
    x.add_(net.norm(net.conv(F.relu(x))))
    return half * 2 + x


def residual_is_overwritten_before_the_activation(net, x):
    y = net.norm(net.conv(F.relu(x))) + x
    more = x.mul_(2)
    return F.relu(y) + more


CALLS = {
    "by keyword": lambda net, x: net.norm(net.conv(input=x)),
    "norm by keyword": lambda net, x: net.norm(x=net.conv(x)),
    "added to itself": lambda net, x: (lambda y: y + y)(net.norm(net.conv(x))),
    "scaled sum": lambda net, x: torch.add(net.norm(net.conv(x)), x, alpha=2),
    "second in the activation": lambda net, x: torch.maximum(x, net.norm(net.conv(x))),
    "overwritten": overwritten,
    "overwritten before the norm": overwritten_before_the_norm,
    "overwrites the output": overwrites_the_output,
    "written into the norm's": lambda net, x: operator.iadd(net.norm(net.conv(x)), x),
    "other name": other_name_is_overwritten,
    "other name, method": other_name_is_overwritten_by_a_method,
    "residual overwritten": residual_is_overwritten_before_the_activation,
    "a number with two names": lambda net, x: (lambda n: net.norm(net.conv(x)) * (operator.iadd(n, 1) * n))(x.shape[0]),
    "inplace silu": lambda net, x: net.last(F.silu(net.norm(net.conv(x)), inplace=True)),
}


@pytest.mark.parametrize("how", CALLS)
def test_however_the_layers_are_called_the_result_is_the_same(how):
    def make():
        net = Calls(CALLS[how])
        net.conv.requires_grad_("overwritten" not in how)  # else autograd itself refuses
        return net

    report = report_of_equal(make, torch.randn(2, 3, 5, 5))
    if "keyword" in how:
        assert "more than its input" in report.kept["norm"] or "does not come" in report.kept["norm"]


def test_a_forward_that_makes_constants_is_not_traced():
    """What it makes of a buffer while torch.fx traces would stay as it is then."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), BatchlessNorm2d(3)
            self.register_buffer("scale", torch.ones(()))

        def forward(self, x):
            return self.norm(self.conv(x)) * torch.tensor(2.0) * (self.scale + 1)

    model = Net()
    names = set(vars(model)) | set(dict(model.named_buffers()))
    report = fuse(model)
    assert "makes a tensor that depends on no input" in report.kept["norm"]
    assert set(vars(model)) | set(dict(model.named_buffers())) == names


def switched(switch):
    def features(net, x):
        with switch():
            x = F.relu(net.norm(net.conv(x)))
        return net.last(x)

    return features


def counts(net, x):
    net.num_calls = getattr(net, "num_calls", 0) + 1
    return net.norm(net.conv(x)) * min(1.0, net.num_calls / 10)


def remembers(net, x):
    net.seen.append(x)
    net.last.aux = x.mean()
    return net.norm(net.conv(x))


def draws(number):
    return lambda net, x: net.norm(net.conv(x)) if number() < 0.5 else net.last(net.norm(net.conv(x)))


NOT_IN_A_GRAPH = {
    "no_grad": (switched(torch.no_grad), "its forward switches gradients off in places"),
    "inference_mode": (switched(torch.inference_mode), "its forward switches gradients off in places"),
    "autocast": (
        switched(lambda: torch.autocast("cpu", enabled=False)),
        "its forward switches autocast on or off in places",
    ),
    "counter": (counts, "its forward changes the attribute 'num_calls' of Calls"),
    "attribute of a part": (remembers, "its forward changes the attribute 'aux' of Conv2d"),
    "list": (lambda net, x: net.seen.append(x) or net.norm(net.conv(x)), "its forward changes attributes of modules"),
    "torch's random": (draws(lambda: torch.rand(())), "its forward draws random numbers in Python"),
    "Python's random": (draws(random.random), "its forward draws random numbers in Python"),
    "numpy's random": (draws(np.random.rand), "its forward draws random numbers in Python"),
}


@pytest.mark.parametrize("around", [contextlib.nullcontext, torch.no_grad, lambda: torch.autocast("cpu")])
@pytest.mark.parametrize("how", NOT_IN_A_GRAPH)
def test_a_network_that_does_more_than_a_graph_knows_is_left_alone(how, around):
    """Attributes and random states are those before fusing, wherever fuse is called."""
    forward, reason = NOT_IN_A_GRAPH[how]
    model = Calls(forward)
    model.seen = []
    before = {module: dict(vars(module)) for module in model.modules()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    with around():
        assert fuse(model).kept == {"norm": reason}
    assert not folded_layers(model)
    assert {module: dict(vars(module)) for module in model.modules()} == before
    assert not model.seen
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert str(np.random.get_state()) == str(states[2])


def test_a_network_that_switches_nothing_is_fused_under_no_grad_and_autocast():
    for around in (torch.no_grad(), torch.autocast("cpu")):
        with around:
            assert fuse(Calls(lambda net, x: net.norm(net.conv(x)))).folded == ("norm",)


class Masked(nn.Module):
    """conv + norm, with arguments that have defaults."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), BatchlessNorm2d(3)

    def forward(self, x, mask=None, *more, double=False, **names):
        if isinstance(x, torch.Tensor):
            x = x - 0.5
        out = F.relu(self.norm(self.conv(x)))
        out = out if mask is None else out * mask
        return sum(more, out * 2 if double else out) + len(names)


@pytest.mark.parametrize(
    ("args", "kwargs", "is_folded"),
    [
        ((1,), {}, True),
        ((), {"x": 1}, True),
        ((1, None), {"double": False}, True),
        ((1, 2), {}, False),
        ((1,), {"mask": 2}, False),
        ((1,), {"double": True}, False),
        ((1, None, 3), {}, False),
        ((1,), {"other": 3}, False),
    ],
)
def test_arguments_other_than_the_traced_ones_run_the_networks_own_forward(monkeypatch, args, kwargs, is_folded):
    """Arguments with defaults are traced with these; numbers here are factors of an image."""
    x = torch.randn(2, 3, 5, 5)
    args = [x * value if isinstance(value, int) else value for value in args]
    kwargs = {name: x * value if type(value) is int else value for name, value in kwargs.items()}
    model = drawn(Masked())
    wanted = model(*args, **kwargs)
    assert fuse(model).folded == ("norm",)
    runs = []
    plain = FoldedConvNorm.apply_linear
    monkeypatch.setattr(FoldedConvNorm, "apply_linear", lambda self, *a: runs.append(1) or plain(self, *a))
    torch.testing.assert_close(model(*args, **kwargs), wanted, rtol=1e-9, atol=1e-9)
    assert bool(runs) == is_folded


def test_what_is_no_tensor_and_what_is_missing_are_the_networks_own_business():
    class First(OnAxes):
        def forward(self, x):
            return super().forward(x[0] if isinstance(x, tuple) else x)

    model = drawn(First(nn.Linear(4, 6), 6))
    x = torch.randn(3, 4)
    wanted = model(x)
    assert fuse(model).folded == ("norm",)
    for argument in (x, (x, "label")):
        torch.testing.assert_close(model(argument), wanted, rtol=1e-9, atol=1e-9)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        model()


def test_a_part_in_eval_mode_does_what_it_does_unfused():
    """Where a forward asks for its mode, the trace in training mode is of no use for a part in eval mode."""

    class Block(nn.Sequential):
        def forward(self, x):
            return F.dropout(super().forward(x), 0.5, training=self.training)

    torch.manual_seed(0)
    block = Block(nn.Conv2d(3, 8, 3), BatchlessNorm2d(8), nn.ReLU())
    model = nn.Sequential(block, StandardizedConv2d(8, 8, 3), BatchlessNorm2d(8))
    drawn(model)
    assert len(fuse(model).folded) == 2
    x = torch.randn(2, 3, 8, 8)
    block.eval()
    for once in (False, True):
        found = step(model, x, once)
        twin = copy.deepcopy(model)
        unfuse(twin)
        assert largest_difference(step(twin, x, once), found) < 1e-9


def sequential():
    torch.manual_seed(0)
    return drawn(
        nn.Sequential(
            StandardizedConv2d(3, 8, 3),
            BatchlessNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3),
            BatchlessNorm2d(8),
            nn.ReLU(),
        )
    )


def test_a_fused_network_has_the_modules_it_had():
    """Children, names, length, iteration, slices, parameters, state dict and print are those of the unfused one."""
    model = sequential()
    x = torch.randn(2, 3, 8, 8)
    before = (list(model.named_modules()), list(model.children()), list(model), repr(model), list(model.state_dict()))
    out, part = model.eval()(x), model[:2](x)
    assert len(fuse(model).folded) == 2
    assert before == (
        list(model.named_modules()), list(model.children()), list(model), repr(model), list(model.state_dict())
    )  # fmt: skip
    assert len(model) == 6
    torch.testing.assert_close(model(x), out, rtol=0, atol=0)
    torch.testing.assert_close(model[:2](x), part, rtol=0, atol=0)
    assert "Standardized" in repr(folded_layers(model)[0])


def saved(model, tmp_path):
    torch.save(model, tmp_path / "model.pt")
    return torch.load(tmp_path / "model.pt", weights_only=False)


def averaged(model, tmp_path):
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    return average.module


COPIES = {
    "deepcopy": lambda model, path: copy.deepcopy(model),
    "copy of a copy": lambda model, path: copy.deepcopy(copy.deepcopy(model)),
    "pickle": lambda model, path: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
    "AveragedModel": averaged,
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_fused_over_its_own_parts(how, tmp_path):
    """It trains as the original does, keeps as little for backward, and does not touch the original."""

    def kept(net):
        numbers = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: numbers.append(t.numel()) or t, lambda t: t):
            net(x)
        return sum(numbers)

    model = sequential()
    skipped = fuse(model)
    assert len(skipped.folded) == 2
    x = torch.randn(2, 3, 8, 8)
    wanted = step(model, x, True)
    twin = COPIES[how](model, tmp_path).train()
    assert kept(twin) == kept(model)
    for net in (model, twin):
        BatchlessStatistics(net).discard()
    assert {id(p) for p in twin.parameters()}.isdisjoint(id(p) for p in model.parameters())
    of_twin = {id(layer.linear) for layer in folded_layers(twin)} | {id(layer.norm) for layer in folded_layers(twin)}
    assert of_twin == {id(twin[n]) for n in (0, 1, 3, 4)}
    model.zero_grad()
    before = copy.deepcopy(model.state_dict())
    assert largest_difference(wanted, step(twin, x, True)) < 1e-12
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter += 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert largest_difference({"out": wanted["out"]}, {"out": step(model, x, False)["out"]}) < 1e-12
    unfuse(twin)
    assert not folded_layers(twin)
    assert len(folded_layers(model)) == 2


def test_a_state_dict_goes_from_fused_to_unfused_and_back():
    model, other = sequential(), sequential()
    fuse(model)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 1
    x = torch.randn(2, 3, 8, 8)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert largest_difference(step(model, x, False), step(other, x, False)) < 1e-9
    model.load_state_dict(other.state_dict())


def test_a_layer_that_is_replaced_after_fusing_is_the_one_that_runs():
    """Of layers that are not folded, a new head say."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), BatchlessNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    fuse(model)
    model[3] = nn.Conv2d(8, 5, 1)
    assert model(torch.randn(1, 3, 5, 5)).shape[1] == 5


# the check


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 4, 3), BatchlessNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 5, 3), BatchlessNorm2d(5)
        self.conv3, self.norm3 = nn.Conv2d(5, 6, 3), BatchlessNorm2d(6)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        return {"maps": self.norm3(self.conv3(self.drop(x))), "sum": x.sum()}


EXAMPLE = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def break_layers(monkeypatch, channels, change):
    """Folded layers of so many channels do something else."""
    plain = FoldedConvNorm.apply_linear

    def wrong(self, x, weight, bias):
        out = plain(self, x, weight, bias)
        return change(out) if self.norm.num_features in channels else out

    monkeypatch.setattr(FoldedConvNorm, "apply_linear", wrong)


def test_the_check_folds_what_is_equal_and_leaves_no_trace():
    """Random state, modes, parameters, gradients and buffers stay as they are, dropout and outputs of any structure included."""
    torch.manual_seed(3)
    model = drawn(Two()).float()
    model.drop.eval()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert len(fuse(model, check=EXAMPLE).folded) == 3
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert [m.training for m in (model, model.drop, model.norm1)] == [True, False, True]
    assert model.norm1.account.num_images == 0
    assert len(folded_layers(model)) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda out: out * (1 + 1e-4), "of its norm"),
        (lambda out: out * torch.nan, "differs by nan of its norm"),
        (lambda out: out[:, :, 1:], "folded, the network does not run: RuntimeError"),
    ],
)
@pytest.mark.parametrize("channels", [(4,), (5,), (4, 6)])
def test_norms_with_which_the_result_differs_stay_unfused(monkeypatch, channels, change, words):
    """Each is found, and its reason says what differs."""
    break_layers(monkeypatch, channels, change)
    model = Two()
    report = fuse(model, check=EXAMPLE)
    assert set(report.kept) == {f"norm{n - 3}" for n in channels}
    assert all("folded" in reason for reason in report.kept.values())
    assert any(words in reason for reason in report.kept.values())
    assert [layer.norm.num_features for layer in folded_layers(model)] == [n for n in (4, 5, 6) if n not in channels]


def test_a_difference_that_is_no_norms_alone_leaves_the_network_unfused(monkeypatch):
    """Only where two are folded together it differs: no norm is to blame, and none is folded."""
    calls = []

    def change(out):
        calls.append(out.shape[1])
        return out * 2 if {4, 6} <= set(calls[-3:]) else out

    break_layers(monkeypatch, (4, 5, 6), change)
    model = Two()
    report = fuse(model, check=EXAMPLE)
    assert not report.folded
    assert not folded_layers(model)
    assert all("which norm does it was not found" in reason for reason in report.kept.values())


def test_a_network_that_does_not_run_on_the_example_stays_unfused():
    report = fuse(Two(), check=torch.randn(1, 4, 12, 12))
    assert "the network could not be run on the example: RuntimeError" in report.kept["norm2"]
