"""Torchvision's networks: every norm in place of BatchNorm, the laws, trained weights, and what is refused."""

import copy
import os
import urllib.error
from pathlib import Path

import pytest
import torch
import torchvision
from helpers import advance, gradients, largest_difference, perturb, tiny_recipe
from PIL import Image
from torch import nn

from bln_train.build.experiment import build_experiment
from bln_train.build.trained_run import evaluate_checkpoint
from bln_train.errors import EXIT_FAILED, EXIT_USAGE, CheckpointError, RecipeError, UsageError
from bln_train.experiments.run import run
from bln_train.models.build import norm_factory
from bln_train.models.library_models import build_torchvision_model
from bln_train.norm import BatchlessNorm2d, BatchlessStatistics
from bln_train.norm.convert.layers import to_batchless
from bln_train.norm.dropout import InstanceDropout, InstanceStochasticDepth, set_instance_seeds
from bln_train.norm.standardize import StandardizedConv2d
from bln_train.recipe.load import load_recipe, parse_recipe
from bln_train.recipe.recipe import Recipe
from bln_train.runs.checkpoint import load_checkpoint
from bln_train.runs.folder import RunFolder

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def recipe_of(name="resnet18", init=None, **changes):
    """The tiny recipe (drawn shapes of 32x32, 10 classes) with a torchvision model."""
    images = {} if init else {"init_images": 4}
    changes.setdefault("norm", {"name": "batchless", "probe_images": 2, **images})
    return tiny_recipe(model={"name": f"torchvision:{name}", "init": init}, **changes)


def trained_reference(name="resnet18", num_classes=10, seed=0):
    """Torchvision's own network in float64 with statistics, scales and shifts far from their defaults."""
    torch.manual_seed(seed)
    model = torchvision.models.get_model(name, weights=None, num_classes=num_classes).double().eval()
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.running_mean, -0.5), (module.running_var, 0.5), (module.weight, 0.5)):
                tensor.data.copy_(low + torch.rand(tensor.shape, generator=generator))
            module.bias.data.copy_(torch.rand(module.bias.shape, generator=generator) - 0.5)
    return model


@pytest.fixture(scope="module")
def reference():
    return trained_reference()


@pytest.fixture
def init_file(reference, tmp_path):
    path = tmp_path / "resnet18.pth"
    torch.save(reference.state_dict(), path)
    return path


def built(init=None, name="resnet18", norm="batchless", num_classes=10, **settings):
    """Straight from the library, without a recipe: the network in eval mode, in float64, and its notices."""
    model, notices = build_torchvision_model(
        name,
        num_classes,
        norm=norm_factory(norm, **settings),
        image_size=32,
        init=None if init is None else str(init),
        dtype=torch.float64,
    )
    return model.eval(), notices


def refusal(init, exception=CheckpointError, **settings):
    with pytest.raises(exception) as caught:
        built(init, **settings)
    return str(caught.value)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
@pytest.mark.parametrize("norm", ["batch", "batch-frozen", "batchless", "group", "layer", "instance", "none"])
def test_every_norm_takes_the_place_of_every_batchnorm(name, norm):
    """Each norm is where torchvision has a BatchNorm, under its name, and the network gives finite logits and gradients."""
    original = torchvision.models.get_model(name, weights=None, num_classes=10)
    places = {key: m.num_features for key, m in original.named_modules() if isinstance(m, nn.BatchNorm2d)}
    torch.manual_seed(0)
    standardized = norm in ("batchless", "group")
    model, notices = build_torchvision_model(
        name, 10, norm=norm_factory(norm), weight_standardization=standardized, image_size=64
    )
    modules = dict(model.named_modules())
    assert notices == []
    assert list(modules) == [key for key, _ in original.named_modules()]
    assert all(type(modules[key]) is type(norm_factory(norm)(places[key])) for key in places)
    assert all(isinstance(modules[k], StandardizedConv2d) == standardized for k, m in original.named_modules()
               if isinstance(m, nn.Conv2d))  # fmt: skip
    assert all(m.bias is not None for m in model.modules() if isinstance(m, nn.Conv2d)) == (norm == "none")
    logits = model(torch.randn(2, 3, 64, 64))
    (logits.sum() + BatchlessStatistics(model).nll()).backward()
    assert logits.shape == (2, 10)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_state_dict_names_stay_and_standardised_weights_are_torchvisions_own():
    """With BatchNorm the state dict has torchvision's names; weight standardisation keeps the weight and its name."""
    torch.manual_seed(0)
    original = torchvision.models.mobilenet_v2(num_classes=3)
    torch.manual_seed(0)
    model, _ = build_torchvision_model("mobilenet_v2", 3, norm=norm_factory("batch"), weight_standardization=True)
    assert largest_difference(dict(original.state_dict()), dict(model.state_dict())) == 0
    depthwise = model.features[1].conv[0][0]
    assert (type(depthwise), depthwise.groups, depthwise.weight.shape) == (StandardizedConv2d, 32, (32, 1, 3, 3))


def test_a_batchnorm_keeps_the_models_eps_and_takes_the_recipes_momentum():
    model, _ = built(name="mobilenet_v3_small", norm="batch", momentum=0.25)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.25)}


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_heads_are_left_out(name, tmp_path):
    """Networks with auxiliary heads give one tensor in training, and take trained files that have the heads."""
    full = torchvision.models.get_model(name, weights=None, num_classes=10, aux_logits=True, init_weights=False)
    torch.save(full.state_dict(), tmp_path / "full.pth")
    model, notices = build_torchvision_model(
        name, 10, norm=norm_factory("batchless"), image_size=96, init=str(tmp_path / "full.pth")
    )
    assert notices == []
    assert model(torch.randn(2, 3, 96, 96)).shape == (2, 10)
    assert torch.equal(model.fc.weight, full.fc.weight)


def test_dropout_and_stochastic_depth_belong_to_the_images():
    model, _ = built(name="efficientnet_b0")
    depths = [m for m in model.modules() if isinstance(m, InstanceStochasticDepth)]
    dropouts = [m for m in model.modules() if isinstance(m, InstanceDropout)]
    assert (len(depths), len(dropouts)) == (16, 17)
    assert len({m.purpose for m in dropouts}) == 17
    layer = InstanceStochasticDepth(0.25, purpose=1)
    layer.seeds = torch.arange(4000)
    out = layer(torch.ones(4000, 2, 3))
    assert all(bool((row == row[0, 0]).all()) for row in out)
    assert out.unique().tolist() == pytest.approx([0, 4 / 3])
    assert out.mean() == pytest.approx(1, abs=0.05)
    layer.seeds = torch.arange(2000, 4000)
    assert torch.equal(layer(torch.ones(2000, 2, 3)), out[2000:])
    assert torch.equal(layer.eval()(out), out)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_law_1_gradients_do_not_depend_on_the_split(name):
    """Law 1 through the recipe, with depthwise convolutions and dropout."""
    experiment = build_experiment(recipe_of(name, norm={"name": "batchless", "init_images": 0}))
    perturb(experiment.model)
    whole = gradients(experiment, 4, 4)
    assert len(whole) == len(list(experiment.model.parameters()))
    assert largest_difference(whole, gradients(experiment, 1, 4)) < 1e-11


def test_law_1_with_stochastic_depth_and_squeeze_and_excitation():
    """Law 1 by hand: the sum over single images is the gradient of the whole, dropped branches included."""
    torch.manual_seed(0)
    model = built(name="efficientnet_b0")[0].train()
    statistics, dropouts = BatchlessStatistics(model), [m for m in model.modules() if isinstance(m, InstanceDropout)]
    images, seeds = IMAGES.repeat(2, 1, 1, 1), torch.arange(4)

    def gradient(parts):
        model.zero_grad()
        for part in parts:
            set_instance_seeds(dropouts, seeds[part])
            (model(images[part]).square().sum() + statistics.nll()).backward()
        statistics.discard()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    whole = {key: value.clone() for key, value in gradient([slice(0, 4)]).items()}
    assert largest_difference(whole, gradient([slice(n, n + 1) for n in range(4)])) < 1e-11


@pytest.mark.parametrize(
    ("norm", "settings"),
    [("paper", {"parametrization": p}) for p in ("log", "abs", "inv")]
    + [("batchless", {}), ("batch", {}), ("batch-frozen", {})],
)
def test_trained_weights_keep_their_function(norm, settings, reference, init_file):
    """Before any step a network started from trained weights computes what the trained one does."""
    model, notices = built(init_file, norm=norm, **settings)
    assert notices == []
    torch.testing.assert_close(model(IMAGES), reference(IMAGES), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "densenet121"])
def test_other_families_keep_their_function_too(name, tmp_path):
    """Another eps than the default, and the keys of torchvision's old DenseNet files."""
    original = trained_reference(name)
    old = {k.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): v for k, v in original.state_dict().items()}
    assert (name == "densenet121") == ("features.denseblock1.denselayer1.norm.1.weight" in old)
    torch.save(old, tmp_path / "old.pth")
    norm = "batchless" if name == "densenet121" else "batch"
    model, _ = built(tmp_path / "old.pth", name, norm)
    torch.testing.assert_close(model(IMAGES), original(IMAGES), rtol=1e-9, atol=1e-9)


def test_a_recipe_starts_from_trained_weights(reference, init_file):
    """Through the recipe: same function, no statistics from data, no weight standardisation, and training goes on."""
    experiment = build_experiment(recipe_of(init=str(init_file), train__max_steps=1))
    assert [text.partition(":")[0] for text in experiment.notices] == ["Trained weights of model.init"]
    torch.testing.assert_close(experiment.model.eval()(IMAGES), reference(IMAGES), rtol=1e-10, atol=1e-10)
    assert not any(isinstance(m, StandardizedConv2d) for m in experiment.model.modules())
    before = copy.deepcopy(experiment.model.state_dict())
    for _ in experiment.trainer.steps():
        pass
    assert not torch.equal(before["fc.weight"], experiment.model.state_dict()["fc.weight"])


def test_trained_weights_are_read_from_training_checkpoints_and_old_files(reference, tmp_path):
    """A state dict may be under `model` or `state_dict`, of DataParallel, in the format before torch 1.6, or in float32."""
    state = reference.state_dict()
    parallel = {f"module.{key}": tensor for key, tensor in state.items()}
    for content in ({"model": state, "epoch": 3}, {"state_dict": parallel}):
        torch.save(content, tmp_path / "a.pt")
        assert torch.equal(built(tmp_path / "a.pt", norm="batch")[0].fc.weight, reference.fc.weight)
    uncounted = {k: v.float() if v.is_floating_point() else v for k, v in state.items() if "num_batches" not in k}
    torch.save(uncounted, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    torch.testing.assert_close(built(tmp_path / "a.pt")[0](IMAGES), reference(IMAGES), rtol=1e-3, atol=1e-3)


@pytest.fixture
def small_file(tmp_path):
    """Trained weights of a small network, for whole runs."""
    path = tmp_path / "mobilenet_v3_small.pth"
    torch.save(trained_reference("mobilenet_v3_small").state_dict(), path)
    return path


def small_run(init, **changes):
    size = {"train__effective_batch_size": 2, "train__micro_batch_size": 2, "data__num_train": 10}
    return recipe_of("mobilenet_v3_small", str(init), **size, **changes)


def test_a_run_of_ours_with_batchnorm_can_be_migrated(small_file, tmp_path):
    """The checkpoint of a run with norm batch is itself a file to start from."""
    folder = RunFolder(tmp_path / "run")
    run(small_run(small_file, norm={"name": "batch"}, train__max_steps=1), folder, name="batch")
    trained = trained_reference("mobilenet_v3_small")
    trained.load_state_dict(torch.load(folder.checkpoint, weights_only=True)["model"])
    model, _ = built(folder.checkpoint, "mobilenet_v3_small")
    torch.testing.assert_close(model(IMAGES), trained(IMAGES), rtol=1e-9, atol=1e-9)


def test_another_number_of_classes_starts_the_classifier_afresh(reference, init_file):
    torch.manual_seed(0)
    model, notices = built(init_file, num_classes=7)
    assert notices == [
        "resnet18.pth has a classifier for 10 classes, the data have 7: `fc` starts afresh."
    ]  # and nothing else
    assert torch.equal(model.layer4[1].conv2.weight, reference.layer4[1].conv2.weight)
    assert model(IMAGES).shape == (2, 7)
    assert model.fc.weight.abs().max() > 0


def test_a_resumed_or_evaluated_run_needs_its_trained_weights_no_more(small_file, tmp_path):
    """The run folder holds everything: without the file a stopped run goes on to the very same weights."""
    recipe = small_run(small_file, train__max_steps=2)
    straight, stopped = RunFolder(tmp_path / "straight"), RunFolder(tmp_path / "stopped")
    run(recipe, straight, name="straight")
    run(small_run(small_file, train__max_steps=1), stopped, name="stopped")
    small_file.unlink()
    assert evaluate_checkpoint(stopped.path)[2] == 1
    resumed = build_experiment(recipe, initialize=False).trainer
    resumed.load_state_dict(load_checkpoint(stopped.checkpoint))
    advance(resumed)
    expected = load_checkpoint(straight.checkpoint)["model"]
    assert largest_difference(expected, dict(resumed.accumulation.model.state_dict())) == 0


def test_a_folder_of_images_at_their_own_size(tmp_path):
    """Images of 64x64 from a folder, two classes, channels last, evaluated in batches of their own size."""
    for split in ("train", "test"):
        for label, colour in (("dark", 40), ("light", 200)):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(3):
                noise = torch.randint(0, 50, (80, 70, 3), generator=torch.Generator().manual_seed(i))
                Image.fromarray((noise + colour).to(torch.uint8).numpy()).save(tmp_path / split / label / f"{i}.png")
    recipe = recipe_of(
        "mobilenet_v3_small",
        data={"name": "folder", "root": str(tmp_path), "image_size": 64},
        train={"epochs": 1, "effective_batch_size": 4, "micro_batch_size": 1, "eval_batch_size": 3},
    )
    summary = run(recipe, RunFolder(tmp_path / "run"), name="folder")
    assert (summary["model"], summary["num_test_images"]) == ("torchvision:mobilenet_v3_small", 6)
    assert evaluate_checkpoint(tmp_path / "run")[1].loss == pytest.approx(summary["test_loss"], rel=1e-6)


# what is refused


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("resnet19", "torchvision has no such classification model; did you mean resnet1"),
        ("fcn_resnet50", "no such classification model"),
        ("zzz", "known: alexnet"),
        ("squeezenet1_1", "it has no BatchNorm to replace (its norms: none); resnet*"),
        ("swin_t", "it has no BatchNorm to replace (its norms: LayerNorm)"),
        ("inception_v3", "it cannot take images of 32x32 pixels: "),
    ],
)
def test_a_model_that_cannot_be_built_is_a_usage_error(name, fragment):
    """Unknown names, other norms and images that are too small, at exit code 2."""
    with pytest.raises(UsageError) as caught:
        build_experiment(recipe_of(name))
    assert caught.value.exit_code == EXIT_USAGE
    assert caught.value.problem.startswith(f"model torchvision:{name} with norm batchless: ")
    assert fragment in caught.value.problem


def test_instance_norm_needs_more_than_one_position():
    with pytest.raises(UsageError, match="instance norm needs positions to average over, and 32 pixels leave only one"):
        build_experiment(recipe_of(norm={"name": "instance"}))


RECIPE = """\
data: {{name: shapes}}
model: {{{}}}
norm: {{name: {}}}
train: {{epochs: 1, micro_batch_size: 1}}
optimizer: {{name: sgd, lr: 0.1}}
"""


@pytest.mark.parametrize(
    ("model", "norm", "fragment"),
    [
        ("name: 'torchvision:'", "batch", "r.yaml:2: model.name: 'torchvision:': write torchvision:<name>"),
        ("name: 'torchvision:../x'", "batch", "r.yaml:2: model.name: "),
        ("name: torchvison}", "batch", "r.yaml:2: "),
        ("name: resnet20, init: pretrained", "batchless", "r.yaml:2: model.init: there are no published weights of resnet20"),
        ("name: resnet20, init: a.pth, zero_init_residual: true", "batch", "r.yaml:2: model.zero_init_residual: the weights"),
        ("name: 'timm:a-b'", "batch", "r.yaml:2: model.name: 'timm:a-b': write timm:<name>"),
        ("name: resnet20, init: a.pth", "batchless, init_images: 64", "r.yaml:3: norm.init_images: with model.init"),
        ("name: resnet20, init: a.pth", "batch-frozen, init_images: 64", "r.yaml:3: norm.init_images: with model.init"),
        ("name: 'torchvision:resnet18', init: ''", "batchless", "r.yaml:2: model.init: is empty"),
        ("name: 'torchvision:resnet18', init: a.pth", "group", "r.yaml:2: model.init: norm group would throw the trained"),
        ("name: 'torchvision:resnet18', init: a.pth", "none", "use batchless, batch or batch-frozen"),
        ("name: 'torchvision:resnet18', init: a.pth", "batchless-paper, share: layer", "r.yaml:3: norm.share: with model.init"),
        ("name: 'torchvision:resnet18', init: a.pth, weight_standardization: true", "batchless",
         "r.yaml:2: model.weight_standardization: would change"),
        ("name: 'torchvision:resnet18', shortcut: B", "batch", "r.yaml:2: model.shortcut: only the CIFAR ResNets"),
        ("name: 'torchvision:resnet18', zero_init_residual: true", "batch", "r.yaml:2: model.zero_init_residual: "),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_be_is_refused_at_its_line(model, norm, fragment):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(RECIPE.format(model, norm), origin="r.yaml")
    assert fragment in caught.value.problem


def test_weight_standardisation_is_off_for_trained_weights_only():
    fresh, trained = (parse_recipe(RECIPE.format(f"name: 'torchvision:resnet18', init: {init}", "batchless"), origin="r")
                      for init in ("null", "pretrained"))  # fmt: skip
    assert fresh.weight_standardization
    assert not trained.weight_standardization


def test_comparing_norms_that_trained_weights_exclude_is_a_usage_error():
    """`compare --norm` replaces the norm; the recipe's refusal comes as a usage error, not as a traceback."""
    recipe = recipe_of(init="a.pth")
    assert recipe.with_norm("batch").norm.name == "batch"
    with pytest.raises(UsageError, match="norm group would throw the trained statistics away"):
        recipe.with_norm("group")


def test_memory_is_measured_without_trained_weights():
    """`memory` compares norms on random images: the same network, as the trained one has it, but of drawn weights."""
    recipe = recipe_of(init="a.pth")
    untrained = recipe.untrained()
    assert (untrained.model.init, untrained.weight_standardization) == (None, False)
    assert untrained.with_norm("none").norm.name == "none"
    assert recipe_of().untrained() == recipe_of()


def test_the_library_refuses_what_the_recipe_refuses(init_file):
    assert "would throw the trained statistics away" in refusal(init_file, ValueError, norm="group")
    assert "norm.share" in refusal(init_file, ValueError, norm="paper", share="layer")
    assert "norm.eps is 0.9, above a trained standard deviation" in refusal(init_file, ValueError, eps=0.9)


def test_a_file_that_does_not_fit_is_refused_with_everything_that_is_wrong(reference, tmp_path):
    """One error lists missing, unexpected, misshapen and damaged entries; the exit code is that of a bad checkpoint."""
    state = dict(reference.state_dict())
    del state["layer1.0.bn1.running_mean"], state["fc.bias"]
    state |= {
        "extra": torch.zeros(1),
        "conv1.weight": torch.zeros(64, 3, 3, 3),
        "layer2.0.conv1.weight": torch.tensor(0),
    }
    state["layer1.1.bn1.running_var"] = -torch.ones(64)
    state["layer1.1.bn2.weight"] = torch.full((64,), torch.nan)
    torch.save(state, tmp_path / "wrong.pth")
    problem = refusal(tmp_path / "wrong.pth")
    for fragment in (
        f"{tmp_path / 'wrong.pth'} does not fit torchvision's resnet18",
        "missing: layer1.0.bn1.running_mean, fc.bias",
        "unexpected: extra",
        "conv1.weight (64, 3, 3, 3) float32 for (64, 3, 7, 7) float64",
        "layer2.0.conv1.weight () int64",
        "not finite, or a negative variance: layer1.1.bn1.running_var, layer1.1.bn2.weight",
    ):
        assert fragment in problem
    torch.save(torchvision.models.resnet50(num_classes=10).state_dict(), tmp_path / "wrong.pth")
    problem = refusal(tmp_path / "wrong.pth")
    assert "unexpected: layer1.0.conv3.weight" in problem
    assert "more" in problem
    with pytest.raises(CheckpointError) as caught:
        build_experiment(recipe_of(init=str(tmp_path / "wrong.pth")))
    assert caught.value.exit_code == EXIT_FAILED


def test_a_file_with_some_layers_migrated_is_taken_too(reference, tmp_path):
    """Each layer is what its keys say; a batchless one gives a BatchNorm back where that is wanted."""
    layer = to_batchless(reference.bn1)
    state = {k: v for k, v in reference.state_dict().items() if not k.startswith("bn1.")}
    torch.save(state | {f"bn1.{k}": v for k, v in layer.state_dict().items()}, tmp_path / "mixed.pth")
    for norm in ("batchless", "batch", "batch-frozen"):
        model, _ = built(tmp_path / "mixed.pth", norm=norm)
        torch.testing.assert_close(model(IMAGES), reference(IMAGES), rtol=1e-10, atol=1e-10)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_execute_code_is_refused(zipped, tmp_path, monkeypatch):
    """Files are read as tensors and plain containers; nothing in them runs."""
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Evil()}, "evil.pth", _use_new_zipfile_serialization=zipped)
    assert "evil.pth cannot be read as a state dict: it holds something other than tensors" in refusal("evil.pth")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evil.pth"]


def test_files_that_are_no_state_dict_are_refused(init_file, tmp_path):
    path = tmp_path / "x.pth"
    small = {"name": "mobilenet_v3_small"}
    assert f"no file at {path}" in refusal(path, **small)
    assert "no file at" in refusal(tmp_path, **small)
    for content in (b"", b"not a file of torch's", init_file.read_bytes()[:5000]):
        path.write_bytes(content)
        assert f"{path} cannot be read as a state dict" in refusal(path, **small)
    for content in ([1, 2], {}, {"model": {}}, {"fc.weight": 3}, torch.zeros(3), 5):
        torch.save(content, path)
        assert f"{path} holds no state dict" in refusal(path, **small)


# torchvision's own weights: the download is stubbed


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Torch.hub's folder, empty, and downloads that fail as they do without a network."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def offline(url, *args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    return tmp_path / "hub" / "checkpoints"


def test_pretrained_offline_says_what_to_put_where(hub):
    problem = refusal("pretrained")
    url = torchvision.models.ResNet18_Weights.DEFAULT.url
    for fragment in (url, "Name or service not known", str(hub / url.rpartition("/")[2]), "model.init=PATH"):
        assert fragment in problem


def test_pretrained_weights_are_downloaded_once_and_checked(hub, monkeypatch):
    """The file goes to torch.hub's folder, checked against the hash in its name; the next build does not download."""
    original = trained_reference(num_classes=1000)
    asked = []

    def download(url, file, hash_prefix, progress):
        asked.append((url, hash_prefix))
        torch.save(original.state_dict(), file)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    url = torchvision.models.ResNet18_Weights.DEFAULT.url
    for _ in range(2):
        model, notices = built("pretrained")
        assert torch.equal(model.layer3[0].conv1.weight, original.layer3[0].conv1.weight)
        assert notices == [
            f"{url.rpartition('/')[2]} has a classifier for 1000 classes, the data have 10: `fc` starts afresh."
        ]
    assert asked == [(url, url.rpartition("-")[2].removesuffix(".pth"))]


def test_the_shipped_recipe_is_resnet50_from_torchvisions_weights(hub):
    """It loads without data or network; building it offline is one error."""
    recipe = load_recipe("finetune_resnet50")
    assert (recipe.model.name, recipe.model.init) == ("torchvision:resnet50", "pretrained")
    assert (recipe.train.micro_batch_size, recipe.train.effective_batch_size) == (1, 32)
    offline = Recipe.model_validate(
        {**recipe.model_dump(), "data": {"name": "shapes", "num_train": 10, "num_test": 10}}
    )
    with pytest.raises(CheckpointError, match="cannot download torchvision's weights of resnet50"):
        build_experiment(offline)
    assert not Path(hub).joinpath("resnet50.pth").exists()


def test_batchless_layers_start_with_the_trained_statistics(reference, init_file):
    model, _ = built(init_file)
    norm, old = model.bn1, reference.bn1
    assert isinstance(norm, BatchlessNorm2d)
    torch.testing.assert_close(norm.mean.detach(), old.running_mean, rtol=0, atol=0)
    torch.testing.assert_close(norm.std.detach(), (old.running_var + old.eps).sqrt(), rtol=1e-14, atol=0)
