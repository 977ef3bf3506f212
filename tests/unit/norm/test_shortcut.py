"""The shortcut without parameters, as part of a folded layer."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bln_train.models.build import build_model, norm_factory
from bln_train.models.layers import ShortcutA
from bln_train.norm import BatchlessStatistics
from bln_train.norm.fused.network import folded_layers, fuse


@pytest.mark.parametrize("recompute", [True, False])
def test_a_shortcut_without_parameters_is_part_of_the_chain(recompute):
    """ResNet-8 with shortcut A is one operation; backward runs each convolution again, or none where their outputs are kept."""
    norm = norm_factory("batchless")
    model = build_model("resnet8", 10, norm=norm, weight_standardization=True)
    fuse(model)
    for layer in folded_layers(model):
        layer.recompute = recompute
    assert [layer.shortcut is not None for layer in folded_layers(model)].count(True) == 2
    x = torch.randn(2, 3, 32, 32)
    loss = model(x).square().sum() + BatchlessStatistics(model).nll()
    convolutions = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.convolution.default:
                convolutions.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        loss.backward()
    assert len(convolutions) == (7 if recompute else 0)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_adjoint_of_a_shortcut_is_its_gradient(memory_format):
    """<shortcut(x), g> = <x, adjoint(g)>, for odd sides and an odd number of missing channels too."""
    shortcut = ShortcutA(4, 7, 2)
    x = torch.randn(2, 4, 5, 6).contiguous(memory_format=memory_format).requires_grad_()
    out = shortcut(x)
    g = torch.randn_like(out)
    (wanted,) = torch.autograd.grad(out, x, g)
    assert torch.equal(shortcut.adjoint(g, x.shape), wanted)
