"""The way from BatchNorm and back: layers, networks, state dicts, files, the command, and what is refused."""

import copy
import json
import os
from inspect import signature

import pytest
import torch
import torchvision
from helpers import advance, gradients, largest_difference, perturb, tiny_recipe
from torch import nn
from typer.testing import CliRunner

from bln_train.build.experiment import build_experiment
from bln_train.build.first_statistics import calibration_sample
from bln_train.cli.app import app, main
from bln_train.errors import CheckpointError, UsageError
from bln_train.experiments.run import run
from bln_train.export.migrate import migrate
from bln_train.models.build import build_model, norm_factory
from bln_train.models.pretrained import read_weights, write_state
from bln_train.norm import BatchlessNorm, BatchlessNorm3d, BatchlessStatistics, convert_batchnorm, convert_to_batchnorm
from bln_train.norm.convert.layers import NormAct, is_batchnorm
from bln_train.norm.convert.state_dicts import (
    batchless_layers,
    groups_as_one_layer,
    layers_with_groups,
    state_to_batch,
    state_to_batchless,
)
from bln_train.recipe.load import load_recipe
from bln_train.runs.checkpoint import load_checkpoint
from bln_train.runs.folder import RunFolder

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
    "momentum None": (nn.BatchNorm2d(4, momentum=None), (3, 4, 5, 5)),
    "another eps": (nn.BatchNorm2d(4, eps=1e-2), (3, 4, 5, 5)),
    "torchvision, frozen": (torchvision.ops.FrozenBatchNorm2d(4), (3, 4, 5, 5)),
    "timm, relu inside": (timm.layers.BatchNormAct2d(4), (3, 4, 5, 5)),
    "timm, silu inside": (timm.layers.BatchNormAct2d(4, act_layer=nn.SiLU), (3, 4, 5, 5)),
    "timm, sync": (timm.layers.convert_sync_batchnorm(timm.layers.BatchNormAct2d(4)), (3, 4, 5, 5)),
    "timm, frozen": (timm.layers.FrozenBatchNormAct2d(4), (3, 4, 5, 5)),
}
if "bias" in signature(nn.BatchNorm2d).parameters:  # PyTorch 2.11 has no such
    LAYERS["no bias"] = (nn.BatchNorm2d(4, bias=False), (3, 4, 5, 5))


@pytest.mark.parametrize("kind", LAYERS)
def test_every_batchnorm_keeps_its_function(kind):
    """Law 5: each class of BatchNorm, whatever is inside it, computes the same after migration, and after going back."""
    norm, shape = copy.deepcopy(LAYERS[kind])
    norm = disturb(norm)
    x = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.3
    reference = norm(x.clone())
    layer = convert_batchnorm(norm)
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


# files, runs, and recipes that start from them


def migrated(*arguments):
    """The command's JSON document."""
    result = CliRunner().invoke(app, ["migrate", *map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    return json.loads(result.stdout)


def starting_from(init, name="timm:test_efficientnet", norm="batchless", **changes):
    """The tiny recipe started from a file: the network in eval mode, before any step."""
    norm = norm if isinstance(norm, dict) else {"name": norm}
    recipe = tiny_recipe(model={"name": name, "init": str(init)}, norm=norm, **changes)
    assert not recipe.weight_standardization
    return build_experiment(recipe)


@pytest.fixture(scope="module")
def trained_network():
    return network("timm", "test_efficientnet", 10)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_state_dict_file_there_and_back(suffix, trained_network, tmp_path):
    """Every layer is listed; a recipe starts from either file with the same outputs; the way back fits the original strictly."""
    write_state(trained_network.state_dict(), tmp_path / f"old{suffix}")
    there, back = tmp_path / f"there{suffix}", tmp_path / f"back{suffix}"
    document = migrated(tmp_path / f"old{suffix}", "-o", there)
    norms = {name: m.num_features for name, m in trained_network.named_modules() if is_batchnorm(m)}
    assert {c["layer"]: c["num_channels"] for c in document["changes"]} == norms
    assert "1e-05 is taken" in document["notices"][0]
    reference, x = trained_network(images("")), images("")
    for norm in ("batchless", "batch", "batch-frozen"):
        for file in (tmp_path / f"old{suffix}", there):
            assert difference(starting_from(file, norm=norm).model.eval()(x), reference) < 1e-10
    migrated(there, "-o", back, "--to", "batch")
    again = timm.create_model("test_efficientnet", num_classes=10).double().eval()
    again.load_state_dict(read_weights(back))
    assert difference(again(x), reference) < 1e-10
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{n}{suffix}" for n in ("old", "there", "back"))


def finished_run(tmp_path, **changes):
    """The folder of a run of two steps, images, and what its network makes of them."""
    recipe, folder = tiny_recipe(**changes, train__max_steps=2), RunFolder(tmp_path / "run")
    run(recipe, folder, name="x")
    experiment = build_experiment(recipe, initialize=False)
    experiment.trainer.load_state_dict(load_checkpoint(folder.checkpoint))
    x = images("", 3)[..., :32, :32]
    return folder, x, experiment.model.eval()(x)


@pytest.mark.parametrize(
    "form", [{"name": "batch"}, {"name": "batchless-plain"}, {"name": "batchless-paper-abs", "share": "layer"}]
)
def test_a_run_of_ours_there_and_back(form, tmp_path):
    """A run with BatchNorm or batchless, standardised or not, becomes a plain file, from which both norms start as it ended."""
    folder, x, reference = finished_run(tmp_path, norm=form)
    changes = {c["before"] for c in migrated(folder.path, "-o", tmp_path / "there.pt")["changes"]}
    assert changes == {
        "batch": {"BatchNorm2d"}, "batchless-plain": {"standardised Conv2d"}, "batchless-paper-abs": {"batchless, abs, per layer"},
    }[form["name"]]  # fmt: skip
    assert difference(starting_from(tmp_path / "there.pt", "resnet8").model.eval()(x), reference) < 1e-10
    if form["name"] != "batch":
        with pytest.raises(CheckpointError, match=r"model.init: .* is a run's checkpoint"):
            starting_from(folder.checkpoint, "resnet8")
        migrated(folder.path, "-o", tmp_path / "back.pt", "--to", "batch")
        assert difference(starting_from(tmp_path / "back.pt", "resnet8", "batch").model.eval()(x), reference) < 1e-10


@pytest.mark.parametrize("name", ["resnet8", "timm:test_efficientnet"])
def test_a_run_with_groups_of_channels_goes_on_with_them(name, tmp_path):
    """What `batchless` trained becomes a plain file, from which the same norm starts with its outputs; other norms say why not."""
    folder, x, reference = finished_run(tmp_path, model={"name": name})
    notices = migrated(folder.path, "-o", tmp_path / "there.safetensors")["notices"]
    assert notices == ["Its norms have 8 groups of channels behind them: go on with norm.channel_groups=8."]
    groups = {"name": "batchless", "channel_groups": 8}
    found = starting_from(tmp_path / "there.safetensors", name, norm=groups)
    assert difference(found.model.eval()(x), reference) < 1e-10
    advance(found.trainer, 1)
    for norm in ("batchless", "batchless-plain", "batch", {**groups, "channel_groups": 4}):
        with pytest.raises(
            UsageError, match=r"have 8 groups of channels behind them; use norm.name=batchless and norm.channel_"
        ):
            starting_from(tmp_path / "there.safetensors", name, norm=norm)


@pytest.mark.parametrize("turn", [list, reversed])
def test_groups_become_one_layer_in_any_order_of_the_keys(turn):
    """The weight in front of the groups is none of the file's, wherever it stands; what else ends in `num_groups` stays."""
    own = {"mean": 1.0, "raw_std": 2.0, "weight": 3.0, "bias": 4.0, "correction": 5.0}
    state = {f"a.0.{key}": torch.full((2,), value) for key, value in own.items()}
    state |= {"a.1.weight": torch.full((2,), 6.0), "a.1.bias": torch.full((2,), 7.0), "b.num_groups": torch.ones(3)}
    found = groups_as_one_layer({key: state[key] for key in turn(list(state))}, 8)
    expected = {
        "a.mean": 1,
        "a.raw_std": 2,
        "a.correction": 5,
        "a.weight": 6,
        "a.bias": 7,
        "a.num_groups": 8,
        "b.num_groups": 1,
    }
    assert {key: float(tensor.flatten()[0]) for key, tensor in found.items()} == expected
    assert layers_with_groups(found) == {"a": 8}
    with pytest.raises(ValueError, match="a: it has no groups of channels"):
        groups_as_one_layer({key: tensor for key, tensor in state.items() if key != "a.1.bias"}, 8)


def test_groups_are_not_added_to_trained_weights(tmp_path):
    """A network that was trained without groups does not get them: it would compute something else."""
    torch.save(disturb(build_model("resnet8", 10, norm=norm_factory("batch"))).state_dict(), tmp_path / "old.pt")
    with pytest.raises(UsageError, match=r"have no groups of channels behind them; use .* norm.channel_groups=0"):
        starting_from(tmp_path / "old.pt", "resnet8", norm={"name": "batchless", "channel_groups": 8})


def test_fine_tuning_at_micro_batch_1_starts_with_the_trained_weights_and_a_new_head(tmp_path):
    """Our own networks too: another number of classes starts the head afresh, everything else is as trained; steps move it."""
    torch.manual_seed(0)
    original = disturb(build_model("resnet8", 7, norm=norm_factory("batch")))
    torch.save(original.state_dict(), tmp_path / "seven.pt")
    migrated(tmp_path / "seven.pt", "-o", tmp_path / "new.safetensors")
    experiment = starting_from(tmp_path / "new.safetensors", "resnet8", train__micro_batch_size=1, train__max_steps=1)
    (said,) = [text for text in experiment.notices if "classifier" in text]
    assert said.startswith("new.safetensors has a classifier for 7 classes, the data have 10: `fc`")
    model = experiment.model
    assert model.fc.weight.shape == (10, 64)
    norm, old = model.norm, original.norm
    torch.testing.assert_close(norm.mean.detach(), old.running_mean, rtol=0, atol=0)
    torch.testing.assert_close(norm.std.detach(), (old.running_var + old.eps).sqrt(), rtol=1e-12, atol=0)
    assert torch.equal(model.stem.weight, original.stem.weight)
    advance(experiment.trainer)
    assert not torch.equal(norm.mean.detach(), old.running_mean)
    assert not torch.equal(model.stem.weight, original.stem.weight)


def test_timm_runs_at_any_split():
    """Law 1 for a network of timm's, activations inside its BatchNorms and standardised convolutions included."""
    recipe = tiny_recipe(model={"name": "timm:test_efficientnet"}, norm={"name": "batchless", "init_images": 4})
    experiment = build_experiment(recipe)
    assert any(isinstance(m, NormAct) for m in experiment.model.modules())
    perturb(experiment.model)
    whole = gradients(experiment, 4, 4)
    assert largest_difference(whole, gradients(experiment, 1, 4)) < 1e-11


def test_untracked_statistics_come_from_images(trained_network, tmp_path):
    """Of a state dict without some running statistics only those are taken from the recipe's images; the rest stays."""
    state = trained_network.state_dict()
    lacking = {k: v for k, v in state.items() if not (k.startswith("blocks.2.0.bn1.") and "run" in k)}
    torch.save(lacking, tmp_path / "lacking.pt")
    text = migrated(tmp_path / "lacking.pt", "-o", tmp_path / "without.pt")["notices"][1]
    assert text.startswith("1 layers have a scale per channel and no running statistics, and stay: blocks.2.0.bn1.")
    (tmp_path / "r.yaml").write_text(RECIPE)
    document = migrated(tmp_path / "lacking.pt", "-o", tmp_path / "new.pt", "--calibrate", tmp_path / "r.yaml",
                        "--set", "norm.init_images=6")  # fmt: skip
    assert "Statistics of 1 norms are those of 6 training images" in document["notices"][0]
    new = torch.load(tmp_path / "new.pt")
    new, _ = state_to_batch(new, dict.fromkeys(batchless_layers(new), trained_network.bn1.eps))
    experiment = build_experiment(load_recipe(tmp_path / "r.yaml", ["model.init=" + str(tmp_path / "new.pt")]))
    recipe = load_recipe(tmp_path / "r.yaml", ["norm.init_images=6"])
    seen, (sample, number, _) = [], calibration_sample(recipe)
    folded = dict(experiment.model.named_modules())["blocks.2.0.bn1"].norm
    hook = folded.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for part in sample():
            experiment.model.eval()(part)
    hook.remove()
    inputs = torch.cat(seen)
    assert (number, len(inputs)) == (6, 6)
    torch.testing.assert_close(new["blocks.2.0.bn1.running_mean"], inputs.mean((0, 2, 3)), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        new["blocks.2.0.bn1.running_var"], inputs.var((0, 2, 3), correction=0), rtol=1e-9, atol=1e-9
    )
    others = [k for k in state if "running" in k and "blocks.2.0.bn1." not in k]
    assert all(torch.allclose(new[k], state[k], rtol=1e-12, atol=1e-12) for k in others)


# what is refused, and then writes nothing

RECIPE = """\
data: {name: shapes, num_train: 20, num_test: 10}
model: {name: 'timm:test_efficientnet'}
norm: {name: batchless}
train: {epochs: 1, micro_batch_size: 2, precision: fp64}
optimizer: {name: sgd, lr: 0.1}
"""


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def write_sources(folder):
    small = {"a.weight": torch.ones(3), "a.running_mean": torch.zeros(3), "a.running_var": torch.ones(3)}
    good = folder / "good.pt"
    torch.save(small, good)
    torch.save({**small, "a.running_var": -torch.ones(3), "b.running_var": torch.ones(2)}, folder / "broken.pt")
    torch.save({"model": Evil()}, folder / "evil.pt")
    torch.save({"model": Evil()}, folder / "evil_old.pt", _use_new_zipfile_serialization=False)
    (folder / "cut.pt").write_bytes(good.read_bytes()[:300])
    write_state(small, folder / "cut.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "cut.safetensors").read_bytes()[:60])
    (folder / "pickled.safetensors").write_bytes((folder / "evil.pt").read_bytes())
    torch.save({"a.weight": torch.ones(3)}, folder / "none.pt")
    torch.save({"a.mean": torch.zeros(1), "a.raw_std": torch.full((1,), -9.0)}, folder / "small.pt")
    torch.save({"bln_train_format": 1, "step": 0, "recipe": "data: 3", "model": small}, folder / "run.pt")
    channels = {
        "a.mean": torch.zeros(2),
        "a.raw_std": torch.zeros(2),
        "a.weight": torch.ones(2),
        "a.bias": torch.ones(2),
    }
    torch.save({**channels, "a.num_groups": torch.tensor(8)}, folder / "groups.pt")
    torch.save({**channels, "a.num_groups": torch.tensor([8, 8])}, folder / "many.pt")
    (folder / "r.yaml").write_text(RECIPE)
    (folder / "empty").mkdir()


@pytest.mark.parametrize(
    ("arguments", "code", "fragments"),
    [
        ("broken.pt", 1, ["nothing was written", "a: its variance + eps is not", "b: it has only one of mean and variance"]),
        ("evil.pt", 1, ["evil.pt cannot be read as a state dict: it holds something other than tensors"]),
        ("evil_old.pt", 1, ["it holds something other than tensors"]),
        ("cut.pt", 1, ["cut.pt cannot be read as a state dict"]),
        ("cut.safetensors", 1, ["cut.safetensors cannot be read as a state dict"]),
        ("pickled.safetensors", 1, ["pickled.safetensors cannot be read as a state dict"]),
        ("none.pt", 1, ["none.pt has no BatchNorm with running statistics", "--calibrate RECIPE"]),
        ("good.pt --to batch", 1, ["good.pt has no batchless layer"]),
        ("small.pt", 1, ["small.pt is batchless already", "--to batch"]),
        ("small.pt --to batch", 1, ["a: a standard deviation of 0.000123, below sqrt(eps) = 0.00316", "lower eps"]),
        ("run.pt", 1, ["run.pt carries a damaged recipe"]),
        ("groups.pt", 1, ["groups.pt is batchless already"]),
        ("many.pt", 1, ["many.pt is damaged", "a: its num_groups is no positive integer"]),
        ("groups.pt --to batch", 1, ["groups of channels behind its norms", "bln-train export"]),
        ("empty", 1, ["empty is no run folder"]),
        ("missing.pt", 2, ["missing.pt does not exist", "torchvision:<name>"]),
        ("torchvision:swin_t", 2, ["it has no BatchNorm to replace"]),
        ("timm:resnet10x", 2, ["timm has no such model; did you mean resnet10"]),
        ("good.pt --to group", 2, ["--to: 'group' is neither batchless nor batch"]),
        ("good.pt --eps 0", 2, ["--eps: 0 is not between 0 and 1"]),
        ("good.pt --set train.epochs=2", 2, ["--set changes the recipe of --calibrate"]),
        ("good.pt --calibrate r.yaml --to batch", 2, ["--calibrate is for a state dict that becomes batchless"]),
        ("none.pt --calibrate r.yaml", 1, ["no classifier"]),
    ],
)  # fmt: skip
def test_refusals_write_nothing(arguments, code, fragments, tmp_path, monkeypatch, capfd):
    """Each source or option that cannot be is an error with its reason and exit code; no file appears, nothing is executed."""
    monkeypatch.chdir(tmp_path)
    write_sources(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("sys.argv", ["bln-train", "migrate", *arguments.split(), "-o", "out.pt"])
    with pytest.raises(SystemExit) as caught:
        main()
    said = capfd.readouterr()
    assert caught.value.code == code
    assert said.out == ""
    assert [f for f in fragments if f not in said.err] == []
    assert sorted(tmp_path.rglob("*")) == before


def test_an_existing_file_is_kept_unless_forced(tmp_path):
    write_sources(tmp_path)
    out = tmp_path / "out.pt"
    out.write_bytes(b"mine")
    for force, expected in ((False, 1), (True, 0)):
        arguments = ["migrate", str(tmp_path / "good.pt"), "-o", str(out), *(["--force"] if force else [])]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == expected
        assert (out.read_bytes() == b"mine") != force
    for name in ("out.bin", "no/folder/out.pt", "empty"):
        with pytest.raises(UsageError):
            migrate(str(tmp_path / "good.pt"), tmp_path / name)
