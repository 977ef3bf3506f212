"""A state dict of a network with BatchNorm, loaded after the network was converted (docstrings are laws; float64)."""

import copy

import pytest
import torch
from torch import nn

from bln_train.norm import BatchlessChannelNorm, convert_batchnorm, fuse


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def network(eps=1e-5, affine=True):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=eps, affine=affine), nn.ReLU())


def trained(**settings):
    """A network with statistics of its own, one of them tiny."""
    torch.manual_seed(1)
    net = network(**settings)
    for tensor in (*net.parameters(), net[1].running_mean):
        tensor.data.normal_()
    net[1].running_var.uniform_(0.5, 2)
    net[1].running_var[0] = 1e-9
    return net


@pytest.mark.parametrize("settings", [{}, {"eps": 1e-3}, {"affine": False}], ids=str)
@pytest.mark.parametrize("without", [(), ("num_batches_tracked",)], ids=str)
@pytest.mark.parametrize("strict", [True, False])
def test_a_batchnorm_state_dict_is_converted(settings, without, strict):
    """Loaded after conversion it gives what converting after loading gives, every tensor and eps, in a fused network too."""
    source = trained(**settings)
    expected, net = convert_batchnorm(copy.deepcopy(source)), convert_batchnorm(network(**settings))
    for tensor in net.state_dict().values():
        tensor.normal_()  # nothing of before stays
    fuse(net)
    state = {name: tensor for name, tensor in source.state_dict().items() if not name.endswith(without or "?")}
    before = dict(state)
    assert not any(net.load_state_dict(state, strict=strict))
    assert state.keys() == before.keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(net.state_dict()[name], tensor), name
    assert net[1].eps == expected[1].eps
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(expected.eval()(x), source.eval()(x), rtol=1e-9, atol=1e-9)


def test_inside_a_larger_network_with_a_prefix():
    """A checkpoint's prefix changes nothing, and a missing entry is still missed."""
    source, net = nn.ModuleDict({"net": trained()}), nn.ModuleDict({"net": convert_batchnorm(network())})
    state = source.state_dict()
    net.load_state_dict(state)
    assert torch.equal(net["net"][1].mean, source["net"][1].running_mean)
    del state["net.1.running_var"]
    with pytest.raises(RuntimeError, match=r"net\.1\.raw_std"):
        net.load_state_dict(state)


def test_of_a_norm_with_an_activation_inside():
    """timm's BatchNormAct2d has its entries where the converted one has those of a part."""
    timm_norms = pytest.importorskip("timm.layers.norm_act")
    source = nn.Sequential(timm_norms.BatchNormAct2d(4))
    source[0].running_mean.normal_()
    net = convert_batchnorm(nn.Sequential(timm_norms.BatchNormAct2d(4)))
    net.load_state_dict(source.state_dict())
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(net.eval()(x), source.eval()(x), rtol=1e-9, atol=1e-9)


def test_its_own_state_dict_is_loaded_as_ever():
    net, again = convert_batchnorm(trained()), convert_batchnorm(network())
    net[1].correction.normal_()
    again.load_state_dict(net.state_dict())
    assert all(torch.equal(own, again.state_dict()[name]) for name, own in net.state_dict().items())


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: BatchlessChannelNorm(8, 4), "has groups of channels"),
    ],
    ids=str,
)
@pytest.mark.parametrize("strict", [True, False])
def test_what_cannot_be_taken_is_refused_with_the_way_out(layer, message, strict):
    """Also where missing entries are allowed: the norm would keep statistics of other weights."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), layer())
    with pytest.raises(RuntimeError, match=f"'1.*{message}.*convert_batchnorm"):
        net.load_state_dict(trained().state_dict(), strict=strict)


def test_broken_statistics_are_refused():
    state = trained().state_dict()
    state["1.running_var"][0] = -1
    with pytest.raises(RuntimeError, match="not finite, or a variance"):
        convert_batchnorm(network()).load_state_dict(state)
