"""Merging norms into convolutions for inference: what it keeps, and what it leaves alone (each docstring is a law)."""

import copy

import pytest
import torch
from helpers import tiny_recipe, trained
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bln_train.build.experiment import build_network
from bln_train.norm import BatchlessNorm1d, BatchlessNorm2d, StandardizedConv2d
from bln_train.norm.base import LikelihoodNorm
from bln_train.norm.convert.merge import ChannelMap, merge_norms

PLAIN = {"name": "batchless-plain", "probe_images": 6}
NOT_FROM_CONV = "its input does not come from a convolution or linear layer"


def perturb(model):
    """Give every norm statistics, scale and shift of its own, as training would."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2, generator=generator)
        elif tensor.is_floating_point() and (tensor.dim() == 1 or name.endswith("correction")):
            tensor += 0.3 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
    return model.eval()


@torch.no_grad()
def merged_difference(model, *shape, merge=merge_norms):
    """Largest difference of the outputs after merging, relative to the largest output; and the report."""
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    before = model(x)
    report = merge(model)
    return float((model(x) - before).abs().max() / before.abs().max()), report


@pytest.mark.parametrize(
    ("changes", "num_merged", "num_maps"),
    [
        ({}, 7, 0),
        ({"model": {"name": "resnet8", "shortcut": "B"}}, 9, 0),
        ({"model": {"name": "resnet8", "zero_init_residual": True}}, 7, 0),
        ({"norm": {"name": "batchless-paper-abs", "share": "layer"}}, 7, 0),
        ({"norm": {"name": "batchless-paper"}}, 7, 0),
        ({"norm": {"name": "batchless-paper-abs"}}, 7, 0),
        ({"norm": {"name": "batchless-paper-inv"}}, 7, 0),
        ({"norm": {"name": "batch"}}, 7, 0),
        ({"norm": {"name": "batch-frozen"}, "model": {"name": "resnet8", "shortcut": "B"}}, 9, 0),
        ({"norm": {"name": "none"}}, 0, 0),
        ({"model__name": "paper_cnn"}, 0, 5),
        ({"model__name": "paper_cnn", "norm": {"name": "batch"}}, 0, 5),
        ({"model__name": "wrn10_1"}, 3, 4),
        ({"model__name": "torchvision:mobilenet_v3_small", "norm": {"name": "batch"}}, 34, 0),
        ({"model__name": "torchvision:mobilenet_v3_small"}, 34, 0),
    ],
)
def test_merged_networks_compute_the_same(changes, num_merged, num_maps):
    """Law 5: with norms merged a network's eval outputs are the same (float64, 1e-10); only plain convolutions are left."""
    recipe = tiny_recipe(**{"norm": PLAIN, **changes})
    model = perturb(build_network(recipe, num_classes=10, image_size=32, initialize=False)[0])
    if changes.get("model", {}).get("zero_init_residual"):
        nn.init.zeros_(model.blocks[0].norm2.weight)  # no division by it
    names = [name for name, _ in model.named_modules()]
    difference, report = merged_difference(model, 3, 3, 32, 32)
    assert difference < 1e-10
    assert (len(report.merged), len(report.maps), report.kept) == (num_merged, num_maps, {})
    assert not any(isinstance(m, LikelihoodNorm | _BatchNorm | StandardizedConv2d) for m in model.modules())
    assert [name for name, _ in model.named_modules()] == names
    assert not any(m.training for m in model.modules())


def test_a_fused_training_network_is_merged_too():
    """The network of a run, folded for training, has merged the outputs that it had (float64, 1e-10)."""
    model = copy.deepcopy(trained(tiny_recipe(), 2).accumulation.model.eval())
    difference, report = merged_difference(model, 5, 3, 32, 32)
    assert difference < 1e-10
    assert len(report.merged) == 7


def test_norms_of_each_image_stay():
    """GroupNorm is no fixed map: it stays and is named with the reason; the outputs are the same."""
    model = perturb(
        build_network(tiny_recipe(norm={"name": "group"}), num_classes=10, image_size=32, initialize=False)[0]
    )
    difference, report = merged_difference(model, 2, 3, 32, 32)
    assert difference < 1e-10
    assert (report.merged, report.maps) == ((), {})
    assert set(report.kept.values()) == {"its statistics are those of each image"}
    assert len(report.kept) == 7


class Forward(nn.Module):
    """Modules and what to do with them."""

    def __init__(self, forward, **modules):
        super().__init__()
        self._forward = forward
        for name, module in modules.items():
            setattr(self, name, module.double())
        perturb(self)

    def forward(self, x):
        return self._forward(self, x)


class DoubledConv(nn.Conv2d):
    """A convolution that does not use its weight as it is."""

    def forward(self, x):
        return self._conv_forward(x, 2 * self.weight, self.bias)


def hooked(conv):
    conv.register_forward_hook(lambda module, args, out: 3 * out)
    return conv


def conv(**settings):
    return nn.Conv2d(3, 4, 3, **settings)


@pytest.mark.parametrize(
    ("model", "shape", "maps"),
    [
        (Forward(lambda s, x: s.norm(s.conv(x)), conv=conv(padding=1, padding_mode="reflect"), norm=BatchlessNorm2d(4)),
         (2, 3, 8, 8), None),
        (Forward(lambda s, x: s.norm(s.conv(x)), conv=conv(padding="same"), norm=nn.BatchNorm2d(4, affine=False)),
         (2, 3, 8, 8), None),
        (Forward(lambda s, x: s.norm(s.conv(x)), conv=nn.Conv1d(3, 4, 3), norm=BatchlessNorm1d(4)), (2, 3, 8), None),
        (Forward(lambda s, x: s.norm(s.conv(x)), conv=nn.Conv3d(3, 4, 3), norm=nn.BatchNorm3d(4)), (2, 3, 5, 5, 5), None),
        (Forward(lambda s, x: s.norm(s.linear(x)), linear=nn.Linear(3, 4), norm=BatchlessNorm1d(4)), (2, 3), None),
        (Forward(lambda s, x: s.norm(s.a(x)) + s.norm(s.b(x)), a=conv(), b=conv(), norm=BatchlessNorm2d(4)), (2, 3, 8, 8), None),
        (Forward(lambda s, x: s.norm(s.conv(x)) + s.norm(s.conv(-x)), conv=conv(), norm=BatchlessNorm2d(4)), (2, 3, 8, 8), None),
        (Forward(lambda s, x: s.norm(s.conv(x)) + s.conv(-x), conv=conv(), norm=BatchlessNorm2d(4)), (2, 3, 8, 8),
         "the Conv2d before it is used elsewhere too"),
        (Forward(lambda s, x: s.norm(s.conv(x)) + s.b(s.conv(x)), conv=conv(), norm=BatchlessNorm2d(4), b=nn.BatchNorm2d(4)),
         (2, 3, 8, 8), "the Conv2d before it is used elsewhere too"),
        (Forward(lambda s, x: s.norm(s.conv(x)) * s.conv.weight.sum(), conv=conv(), norm=BatchlessNorm2d(4)), (2, 3, 8, 8),
         "the Conv2d before it is used elsewhere too"),
        (Forward(lambda s, x: s.norm(s.norm(s.conv(x))), conv=conv(), norm=BatchlessNorm2d(4)), (2, 3, 8, 8),
         "its input comes from BatchlessNorm2d, not from a convolution or linear layer"),
        (Forward(lambda s, x: s.norm(s.conv(x).relu()), conv=conv(), norm=BatchlessNorm2d(4)), (2, 3, 8, 8), NOT_FROM_CONV),
        (Forward(lambda s, x: s.norm(s.conv(x)), conv=DoubledConv(3, 4, 3), norm=BatchlessNorm2d(4)), (2, 3, 8, 8),
         "its input comes from DoubledConv, not from a convolution or linear layer"),
        (Forward(lambda s, x: s.norm(s.conv(x)), conv=hooked(conv()), norm=BatchlessNorm2d(4)), (2, 3, 8, 8),
         "hooks belong to the Conv2d before it"),
        (Forward(lambda s, x: s.norm(s.conv(x)) if x.sum() > 0 else s.conv(x), conv=conv(), norm=BatchlessNorm2d(4)), (2, 3, 8, 8),
         "torch.fx cannot trace the network: TraceError: symbolically traced variables cannot be used as inputs to control flow"),
        (Forward(lambda s, x: s.norm(s.linear(x)), linear=nn.Linear(3, 5), norm=BatchlessNorm1d(4)), (2, 4, 3),
         "the Linear before it has 5 outputs, the norm 4 channels"),
    ],
    ids=["reflect", "same-not-affine", "1d", "3d", "linear", "norm-of-two", "conv-called-twice", "used-elsewhere", "two-norms",
         "weight-read", "norm-of-norm", "after-relu", "subclass", "hook", "not-traceable", "positions"],
)  # fmt: skip
def test_only_what_may_be_merged_is(model, shape, maps):
    """Every use of a norm keeps its function (1e-10): merged where nothing else sees the convolution, else a map, with why."""
    difference, report = merged_difference(model, *shape)
    assert difference < 1e-10
    assert not any(isinstance(m, LikelihoodNorm | _BatchNorm) for m in model.modules())
    if maps is None:
        assert report.merged == ("norm",)
        assert report.maps == {}
    else:
        assert report.merged == ()
        assert set(report.maps.values()) == {maps}
        assert isinstance(model.norm, ChannelMap)


def test_a_norm_on_another_axis_than_the_linear_layers_is_never_passed_over():
    """Where (N, C, features) has C = features the two cannot be told apart beforehand; such an input is then refused."""
    model = Forward(lambda s, x: s.norm(s.linear(x)), linear=nn.Linear(3, 4), norm=BatchlessNorm1d(4))
    merge_norms(model)
    with pytest.raises(ValueError, match=r"takes \(N, features\), not 3 dimensions"):
        model(torch.zeros(2, 4, 3, dtype=torch.float64))


def test_batchnorm_without_running_statistics_stays():
    """A BatchNorm that normalises by the batch in eval mode too is kept, with the reason."""
    model = Forward(lambda s, x: s.norm(s.conv(x)), conv=conv(), norm=nn.BatchNorm2d(4, track_running_stats=False))
    difference, report = merged_difference(model, 2, 3, 8, 8)
    assert difference < 1e-10
    assert report.kept == {"norm": "it keeps no running statistics, so its output depends on the batch"}
