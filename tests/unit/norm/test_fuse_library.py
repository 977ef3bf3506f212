"""Law 3 on networks of torchvision and timm of different structure: fused, the gradients are those of the unfused network.

benchmarks/fuse_all.py compares all of them.
"""

import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_recipe
from torch import nn

from bln_train.build.experiment import build_experiment
from bln_train.norm import FoldedConvNorm, convert_batchnorm, folded_layers, fuse

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
import fuse_all


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# Name, and how many norms are folded and kept: a change there is a change in memory.
NETWORKS = {
    "torchvision:resnet18": (20, 0),
    "torchvision:mobilenet_v3_small": (34, 0),  # squeeze-excitation, hardswish
    "torchvision:shufflenet_v2_x0_5": (56, 0),  # channels shuffled and split
    "torchvision:mnasnet0_5": (52, 0),
    "torchvision:regnet_y_400mf": (53, 0),  # groups, squeeze-excitation
    "torchvision:googlenet": (59, 0),  # auxiliary heads, several outputs
    "timm:tf_mobilenetv3_small_minimal_100": (29, 5),  # paddings that depend on the image
    "timm:repvgg_a0": (44, 17),  # identity branches that are norms
    "timm:dla46_c": (48, 0),  # aggregated trees
    "timm:ghostnet_050": (80, 0),
    "timm:skresnet18": (36, 0),  # selective kernels
    "timm:xcit_nano_12_p16_224": (4, 12),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NETWORKS)
def test_law_3_holds_for_networks_of_the_libraries(name, monkeypatch, float64):
    monkeypatch.setattr(fuse_all, "SIZES", (32, 64, 224))
    result = fuse_all.compare(name)
    assert result.outcome == "equal"
    num_folded, num_kept = NETWORKS[name]
    assert f"folded {num_folded:3d}  kept {num_kept:3d}" in result.text


@pytest.mark.filterwarnings("ignore")
def test_a_network_that_pads_by_the_images_size_trains_and_evaluates_as_one(float64):
    """timm's Conv2dSame: fused in training mode the forward is that of eval mode, at odd and even sizes."""
    model = fuse_all.build("timm:tf_mobilenetv3_small_minimal_100")
    fuse_all.give_statistics(model, torch.randn(2, 3, 64, 64))
    convert_batchnorm(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert len(fuse(model).folded) == 29
    for size in (63, 64):
        x = torch.randn(2, 3, size, size)
        with torch.no_grad():
            torch.testing.assert_close(model.train()(x), model.eval()(x), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(model.train()(x), model.eval()(x), rtol=1e-9, atol=1e-9)


def test_a_recipes_foreign_network_is_checked_and_ours_is_not(monkeypatch):
    """A fused norm that differs on one random image stays unfused, and a notice names it; our own networks are tested here."""
    plain = FoldedConvNorm.apply_linear

    def wrong(self, x, weight, bias):
        out = plain(self, x, weight, bias)
        return out * 1.001 if self.linear.in_channels == 3 else out

    monkeypatch.setattr(FoldedConvNorm, "apply_linear", wrong)
    recipe = tiny_recipe(
        model={"name": "torchvision:mobilenet_v3_small"}, norm={"name": "batchless"}, train__precision="fp32"
    )
    experiment = build_experiment(recipe)
    assert len(folded_layers(experiment.model)) == 33
    (notice,) = [text for text in experiment.notices if "not folded" in text]
    assert "1 of 34 norms are not folded into a convolution and keep a tensor of their own: features.0.1" in notice
    assert "of its norm" in notice
    checked = []
    monkeypatch.setattr(
        sys.modules["bln_train.norm.fused.network"], "why_different", lambda *args: checked.append(args) or {}
    )
    assert len(folded_layers(build_experiment(tiny_recipe()).model)) == 7
    assert not checked
