"""The way from BatchNorm and back: layers, networks, state dicts, files, the command, and what is refused."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from bln_train.norm import BatchlessNorm, BatchlessNorm3d, BatchlessStatistics, convert_batchnorm, convert_to_batchnorm
from bln_train.norm.convert import NormAct, is_batchnorm
from bln_train.norm.convert_state import state_to_batch, state_to_batchless

timm = pytest.importorskip("timm")


def disturb(model, seed=1):
    """Statistics, scales and shifts of every BatchNorm far from their defaults; in float64 and eval mode."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    for norm in model.modules():
        if is_batchnorm(norm) and norm.running_mean is not None:
            for tensor, low in (
                (norm.running_mean, -0.5),
                (norm.running_var, 0.5),
                (norm.weight, 0.5),
                (norm.bias, -0.5),
            ):
                if tensor is not None:
                    tensor.data.copy_(low + torch.rand(tensor.shape, generator=generator))
    return model


def difference(out, reference):
    return float(((out - reference).abs().max() / reference.abs().max()).detach())


@torch.no_grad()
def there_and_back(model, x):
    """Largest relative differences of the outputs after migration and after going back."""
    reference = model(x)
    model = convert_batchnorm(model)
    assert not any(is_batchnorm(m) for m in model.modules())
    there = difference(model(x), reference)
    return there, difference(convert_to_batchnorm(model)(x), reference)


# layers and networks

LAYERS = {
    "1d": (nn.BatchNorm1d(4), (3, 4)),
    "1d, a sequence": (nn.BatchNorm1d(4), (3, 4, 5)),
    "2d": (nn.BatchNorm2d(4), (3, 4, 5, 5)),
    "3d": (nn.BatchNorm3d(4), (3, 4, 2, 5, 5)),
    "sync": (nn.SyncBatchNorm(4), (3, 4, 5, 5)),
    "not affine": (nn.BatchNorm2d(4, affine=False), (3, 4, 5, 5)),
    "no bias": (nn.BatchNorm2d(4, bias=False), (3, 4, 5, 5)),
    "momentum None": (nn.BatchNorm2d(4, momentum=None), (3, 4, 5, 5)),
    "another eps": (nn.BatchNorm2d(4, eps=1e-2), (3, 4, 5, 5)),
    "torchvision, frozen": (torchvision.ops.FrozenBatchNorm2d(4), (3, 4, 5, 5)),
    "timm, relu inside": (timm.layers.BatchNormAct2d(4), (3, 4, 5, 5)),
    "timm, silu inside": (timm.layers.BatchNormAct2d(4, act_layer=nn.SiLU), (3, 4, 5, 5)),
    "timm, sync": (timm.layers.convert_sync_batchnorm(timm.layers.BatchNormAct2d(4)), (3, 4, 5, 5)),
    "timm, frozen": (timm.layers.FrozenBatchNormAct2d(4), (3, 4, 5, 5)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("parametrization", ["log", "abs", "inv", "var"])
def test_every_batchnorm_keeps_its_function(kind, parametrization):
    """Law 5: each class of BatchNorm, whatever is inside it, computes the same after migration, and after going back."""
    norm, shape = copy.deepcopy(LAYERS[kind])
    norm = disturb(norm)
    x = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.3
    reference = norm(x.clone())
    layer = convert_batchnorm(norm, parametrization=parametrization)
    assert difference(layer(x.clone()), reference) < 1e-12
    assert isinstance(layer, NormAct) == ("timm" in kind)
    assert difference(convert_to_batchnorm(layer)(x.clone()), reference) < 1e-12


def test_a_small_trained_variance_is_kept_exactly():
    """A standard deviation below the layer's default eps lowers it; a given eps that excludes it is refused, nothing changed."""
    net = nn.Sequential(nn.BatchNorm2d(2, eps=1e-9), nn.BatchNorm2d(2)).double().eval()
    net[0].running_var[0] = 0.0
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^0: norm.eps is 0.001, above a trained standard deviation, 3.16e-05"):
        convert_batchnorm(net, eps=1e-3)
    assert all(type(norm) is nn.BatchNorm2d for norm in net)
    reference = net(x)
    assert difference(convert_batchnorm(net)(x), reference) < 1e-12


@pytest.mark.parametrize("layer", [BatchlessNorm3d(3), BatchlessNorm(3)])
def test_volumes_train(layer):
    """Law 1 for (N, C, D, H, W): gradients of the parts sum to that of the whole."""
    layer = layer.double().train()
    x = torch.randn(4, 3, 2, 3, 3, dtype=torch.float64)
    found = []
    for parts in ([x], x.split(1)):
        layer.zero_grad()
        for part in parts:
            (layer(part).pow(3).sum() + BatchlessStatistics(layer).nll()).backward()
        found.append([p.grad.clone() for p in layer.parameters()])
    layer.discard()
    for whole, summed in zip(*found, strict=True):
        torch.testing.assert_close(whole, summed, rtol=1e-12, atol=1e-12)


ARCHITECTURES = [
    ("torchvision", "shufflenet_v2_x0_5"),
    ("torchvision", "mnasnet0_5"),
    ("timm", "resnet10t"),
    ("timm", "regnetx_002"),
    ("timm", "levit_128s"),
    ("timm", "test_efficientnet"),
]


def network(library, name, num_classes=5):
    torch.manual_seed(0)
    if library == "timm":
        return disturb(timm.create_model(name, num_classes=num_classes))
    return disturb(torchvision.models.get_model(name, weights=None, num_classes=num_classes))


def images(name, number=1):
    side = 224 if "levit" in name else 64
    return torch.randn(number, 3, side, side, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize(("library", "name"), ARCHITECTURES)
def test_law_5_networks_of_other_libraries(library, name):
    """Law 5: families of both libraries, outputs there and back to 1e-10."""
    assert max(there_and_back(network(library, name), images(name))) < 1e-10


def test_all_layers_at_fault_are_named_and_none_is_replaced():
    """Untracked statistics, a forward of its own, a broken variance: one error, the network as it was."""

    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    net = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False), Own(3), nn.LazyBatchNorm2d(),
                        nn.BatchNorm2d(3))  # fmt: skip
    net[4].running_var[1] = -1
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text follows
        convert_batchnorm(net)
    assert str(caught.value).splitlines() == [
        "1: BatchNorm2d has no batchless counterpart: it keeps no running statistics; they can be taken from data",
        "2: Own has no batchless counterpart: its forward is its own, and may do something else than normalise",
        "3: LazyBatchNorm2d has no batchless counterpart: it has not seen any input yet",
        "4: BatchNorm2d has no batchless counterpart: its statistics are not finite, or a variance + eps is not positive",
    ]
    assert isinstance(net[0], nn.BatchNorm2d)


# state dicts


@pytest.mark.parametrize(("library", "name"), [("torchvision", "shufflenet_v2_x0_5"), ("timm", "resnet10t")])
def test_a_state_dict_becomes_that_of_the_converted_network(library, name):
    """A migrated state dict has the keys and values of the migrated network's, and gives back the original's."""
    model = network(library, name)
    original = copy.deepcopy(model.state_dict())
    eps = {key: m.eps for key, m in model.named_modules() if is_batchnorm(m)}
    there, changes = state_to_batchless(original, eps)
    converted = convert_batchnorm(model)
    assert [change.layer for change in changes] == list(eps)
    assert {k: v.shape for k, v in converted.state_dict().items()} == {k: v.shape for k, v in there.items()}
    converted.load_state_dict(there)
    for key, tensor in convert_batchnorm(network(library, name)).state_dict().items():
        torch.testing.assert_close(there[key], tensor, rtol=1e-14, atol=1e-14)
    back, _ = state_to_batch(there, eps)
    assert list(back) == list(original)
    for key, tensor in original.items():
        if "num_batches" not in key:
            torch.testing.assert_close(back[key], tensor, rtol=1e-12, atol=1e-12)


def test_broken_layers_of_a_state_dict_are_all_named():
    state = {
        "a.running_mean": torch.zeros(3), "a.running_var": torch.ones(3), "b.running_mean": torch.zeros(3),
        "c.running_mean": torch.zeros(3), "c.running_var": torch.ones(4), "d.running_mean": torch.zeros(3),
        "d.running_var": torch.full((3,), -1.0), "e.running_mean": torch.zeros(3), "e.running_var": torch.tensor(1.0),
        "f.running_mean": torch.full((3,), torch.nan), "f.running_var": torch.ones(3),
    }  # fmt: skip
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text follows
        state_to_batchless(state, dict.fromkeys("abcdef", 1e-5))
    assert str(caught.value).splitlines() == [
        "b: it has only one of mean and variance",
        "c: its tensors differ in shape",
        "d: its variance + eps is not positive and finite",
        "e: its tensors differ in shape",
        "f: its statistics are not finite",
    ]
    small = {"a.mean": torch.zeros(2), "a.raw_std": torch.tensor([0.0, -9.0])}
    with pytest.raises(ValueError, match=r"a: a standard deviation of 0.000123, below sqrt\(eps\) = 0.00316"):
        state_to_batch(small, {"a": 1e-5})
    assert set(state_to_batch(small, {"a": 1e-9})[0]) == {"a.running_mean", "a.running_var", "a.num_batches_tracked"}
