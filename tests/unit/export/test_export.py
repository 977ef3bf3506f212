"""Exported files: what they compute, say, refuse, and leave behind (each docstring is a law)."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from helpers import tiny_recipe
from torch import nn

from bln_train.build.experiment import build_network
from bln_train.cli import app as cli
from bln_train.errors import BlnError, CheckpointError, DataError, ExportError, UsageError
from bln_train.experiments.run import run
from bln_train.export import export as export_module
from bln_train.export.export import export_run, load_merged
from bln_train.norm.convert.merge import merge_norms
from bln_train.recipe.load import load_recipe
from bln_train.runs.checkpoint import load_checkpoint, save_checkpoint
from bln_train.runs.folder import RunFolder

PLAIN = {"name": "batchless-plain", "probe_images": 6}


def finished_run(path, norm):
    run(tiny_recipe(norm__name=norm, train__precision="fp32", train__max_steps=3), RunFolder(path), name="tiny")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run in float32, all of whose norms merge."""
    return finished_run(tmp_path_factory.mktemp("exported") / "run", "batchless-plain")


@pytest.fixture(scope="module", params=["batchless-plain", "batchless"])
def either_folder(request, folder, tmp_path_factory):
    """That run, and one whose groups of channels stay."""
    return (
        folder
        if request.param == "batchless-plain"
        else finished_run(tmp_path_factory.mktemp("groups") / "run", request.param)
    )


@pytest.fixture
def out(tmp_path):
    """Where to export to: a folder that must hold nothing but the files asked for."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def changed(folder, path, **changes):
    """The run's checkpoint with other contents; None removes one."""
    state = {**load_checkpoint(folder / "checkpoint.pt"), **changes}
    save_checkpoint(path, {key: value for key, value in state.items() if value is not None})
    return path


def content(path):
    """Metadata and tensors of a .safetensors file, in the order of names, which the file does not keep."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).tolist() for name in sorted(file.keys())}
        return dict(sorted(file.metadata().items())), tensors


def outputs_of_the_run(folder, num=8):
    """Logits of the run on its first test images by way of `evaluate`'s parts, and the images in [0, 1]."""
    from bln_train.build.experiment import build_experiment

    experiment = build_experiment(load_recipe(folder / "recipe.yaml"), initialize=False)
    experiment.trainer.load_state_dict(load_checkpoint(folder / "checkpoint.pt"))
    images = experiment.data.test.images[:num]
    with torch.no_grad():
        logits = experiment.model.eval()(experiment.trainer.accumulation.preprocess.test(images))
    return logits, images / 255


def test_safetensors_round_trip(folder, out):
    """The weights load into the merged network, which computes what the run does; the header says what it is."""
    from safetensors import safe_open

    found = export_run(folder, out / "model.safetensors")
    logits, images = outputs_of_the_run(folder)
    network = load_merged(out / "model.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(network(images), logits, rtol=0, atol=1e-5)
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]
    assert found["max_abs_difference"] < 1e-5
    assert (found["batch"], found["compared_on"], found["num_compared"], found["top1_agreement"]) == (
        None, "test images", 10, 1.0)  # fmt: skip
    with safe_open(out / "model.safetensors", framework="pt") as content:
        metadata, names = content.metadata(), set(content.keys())
    assert {"stem.weight", "stem.bias", "blocks.0.conv1.weight", "fc.bias"} <= names
    assert not any("norm" in name for name in names)
    assert json.loads(metadata["class_names"])[0] == "bars"
    assert metadata["model"] == "resnet8"


@pytest.mark.parametrize(
    "changes", [{}, {"model__name": "paper_cnn"}, {"norm": {"name": "batch"}}, {"norm": {"name": "group"}}]
)
def test_every_norm_survives_the_round_trip(changes, tmp_path):
    """Maps, BatchNorms and norms that stay are written and read back, of a float64 run as float32."""
    run(tiny_recipe(train__max_steps=1, **changes), RunFolder(tmp_path / "run"), name="tiny")
    assert export_run(tmp_path / "run", tmp_path / "model.safetensors")["max_rel_difference"] < 1e-5


@pytest.mark.slow
def test_pt2_round_trip(either_folder, out):
    """A .pt2 loads without bln-train's classes, takes any number of images, and computes what the run does."""
    export_run(either_folder, out / "model.pt2")
    logits, images = outputs_of_the_run(either_folder)
    extra = {"bln_train.json": ""}
    network = torch.export.load(out / "model.pt2", extra_files=extra).module()
    for num in (1, 3, 8):
        torch.testing.assert_close(network(images[:num]), logits[:num], rtol=0, atol=1e-5)
    assert json.loads(extra["bln_train.json"])["norm"] == load_recipe(either_folder / "recipe.yaml").norm.name
    assert [path.name for path in out.iterdir()] == ["model.pt2"]


READ_ONNX = """
import json, sys
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
assert "torch" not in sys.modules and "bln_train" not in sys.modules
images = np.load(sys.argv[2])
logits = np.concatenate([session.run(["logits"], {"images": images[part]})[0] for part in (slice(1), slice(1, 3), slice(3, 8))])
print(json.dumps({"logits": logits.tolist(), "metadata": session.get_modelmeta().custom_metadata_map}))
"""


@pytest.mark.slow
def test_onnx_round_trip_in_another_process(either_folder, out, tmp_path):
    """A process without torch opens the .onnx, reads what it is, feeds it any number of images, and gets what the run computes."""
    import hashlib

    import numpy as np
    import onnx

    found = export_run(either_folder, out / "model.onnx")
    logits, images = outputs_of_the_run(either_folder)
    np.save(tmp_path / "images.npy", images.numpy())
    command = [sys.executable, "-c", READ_ONNX, str(out / "model.onnx"), str(tmp_path / "images.npy")]
    read = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout)
    torch.testing.assert_close(torch.tensor(read["logits"]), logits, rtol=0, atol=1e-5)
    assert json.loads(read["metadata"]["input"])["shape"] == ["batch", 3, 32, 32]
    digest = hashlib.sha256((either_folder / "recipe.yaml").read_bytes()).hexdigest()
    assert read["metadata"]["recipe_sha256"] == digest
    kinds = [node.op_type for node in onnx.load(out / "model.onnx").graph.node]
    assert kinds.count("Conv") == 7
    assert not {"BatchNormalization", "Exp"} & set(kinds)
    assert load_recipe(either_folder / "recipe.yaml").channel_groups or not {"Sqrt", "Reciprocal"} & set(kinds)
    assert found["batch"] == "dynamic"
    assert [path.name for path in out.iterdir()] == ["model.onnx"]


@pytest.mark.slow
def test_a_fixed_batch_is_in_the_file(folder, out):
    """With --batch 3 the file takes 3 images, no other number, and the comparison fills up the last batch."""
    found = export_run(folder, out / "model.pt2", batch=3)
    assert (found["batch"], found["num_compared"]) == (3, 10)
    network = torch.export.load(out / "model.pt2").module()
    assert network(torch.zeros(3, 3, 32, 32)).shape == (3, 10)
    with pytest.raises(AssertionError, match="== 3"):
        network(torch.zeros(4, 3, 32, 32))


def test_without_the_data_random_images_are_compared(folder, out, monkeypatch):
    """A checkpoint carries its normalisation and classes: where the data are gone the file is compared on random images."""
    here = export_run(folder, out / "here.safetensors")

    def gone(recipe):
        assert not recipe.data.download
        raise DataError("gone")

    monkeypatch.setattr(export_module, "load", gone)
    found = export_run(folder, out / "gone.safetensors")
    assert (found["compared_on"], found["num_compared"], found["top1_agreement"]) == ("random images", 64, None)
    assert here["norms"] == found["norms"]
    assert content(out / "here.safetensors") == content(out / "gone.safetensors")


def test_checkpoints_from_before_inputs_were_kept(folder, out, monkeypatch):
    """A checkpoint without its normalisation takes that from its data, and cannot be exported without them."""
    old = changed(folder, out.parent / "old.pt", input=None)
    export_run(old, out / "old.safetensors")
    export_run(folder, out / "new.safetensors")
    assert content(out / "old.safetensors") == content(out / "new.safetensors")

    def gone(recipe):
        raise DataError("gone")

    monkeypatch.setattr(export_module, "load", gone)
    with pytest.raises(DataError):
        export_run(old, out / "gone.safetensors")
    assert not (out / "gone.safetensors").exists()


# Refusing


def test_what_cannot_be_written_is_refused_before_anything_is_computed(folder, out, monkeypatch):
    """An unknown suffix, a batch of weights, a missing package, folder or file name, and an existing file: one error, no change."""
    monkeypatch.setattr(export_module, "read_checkpoint", None)
    (out / "taken.onnx").write_text("mine")
    (out / "folder.pt2").mkdir()
    for name, settings, error, words in [
        ("model.pth", {}, UsageError, "'.pth'"),
        ("model", {}, UsageError, "suffix"),
        ("model.safetensors", {"batch": 4}, UsageError, "batch"),
        ("taken.onnx", {}, ExportError, "exists"),
        ("folder.pt2", {"force": True}, ExportError, "exists"),
        ("no/model.pt2", {}, ExportError, "no folder"),
    ]:
        with pytest.raises(error, match=words):
            export_run(folder, out / name, **settings)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"onnx, onnxruntime, onnxscript") as caught:
        export_run(folder, out / "model.onnx")
    assert "pip install 'bln-train[export]'" in caught.value.hint
    assert (out / "taken.onnx").read_text() == "mine"
    assert sorted(path.name for path in out.iterdir()) == ["folder.pt2", "taken.onnx"]


def test_unusable_sources_leave_no_file(folder, out):
    """Damaged, foreign, empty and unfitting checkpoints are a CheckpointError with exit 1, and nothing is written."""
    place = out.parent
    whole = (folder / "checkpoint.pt").read_bytes()
    (place / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (place / "flipped.pt").write_bytes(whole[:30000] + bytes(4000) + whole[34000:])
    torch.save({"stem.weight": torch.zeros(3)}, place / "state_dict.pt")
    model = load_checkpoint(folder / "checkpoint.pt")["model"]
    recipe = load_checkpoint(folder / "checkpoint.pt")["recipe"]
    spec = load_checkpoint(folder / "checkpoint.pt")["input"]
    (place / "no-run").mkdir()
    changed(folder, place / "other.pt", recipe=recipe.replace("resnet8", "resnet20"))
    changed(folder, place / "no-network.pt", model=None)
    changed(folder, place / "input.pt", input={**spec, "std": [0.0, 1.0, 1.0]})
    changed(folder, place / "input2.pt", input={"std": "abc"})
    changed(folder, place / "model.pt", model={**model, "fc.bias": torch.zeros(7)})
    names = [
        "cut.pt", "flipped.pt", "state_dict.pt", "no-run", "other.pt", "no-network.pt", "input.pt", "input2.pt", "model.pt"
    ]  # fmt: skip
    for name in names:
        with pytest.raises(CheckpointError) as caught:
            export_run(place / name, out / "model.safetensors")
        assert caught.value.exit_code == 1
        assert name in caught.value.problem
    assert list(out.iterdir()) == []


def test_outputs_that_are_not_finite_are_refused(folder, out):
    """A network whose training diverged is not exported."""
    model = load_checkpoint(folder / "checkpoint.pt")["model"]
    diverged = changed(folder, out.parent / "nan.pt", model={**model, "fc.bias": torch.full((10,), torch.nan)})
    with pytest.raises(ExportError, match="not finite"):
        export_run(diverged, out / "model.safetensors")
    assert list(out.iterdir()) == []


def test_a_file_that_computes_something_else_is_not_kept(folder, out, monkeypatch):
    """Outputs over the tolerance are an ExportError with exit 1: no file, and one of that name stays as it was."""

    def wrong(network):
        report = merge_norms(network)
        network.fc.bias.data[3] += 0.01
        return report

    monkeypatch.setattr(export_module, "merge_norms", wrong)
    (out / "model.safetensors").write_text("earlier")
    # load_merged merges too, but its values are replaced by the file's.
    with pytest.raises(ExportError, match=r"over the tolerance of 0\.0001; nothing was written") as caught:
        export_run(folder, out / "model.safetensors", force=True)
    assert caught.value.exit_code == 1
    assert (out / "model.safetensors").read_text() == "earlier"
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]


def test_the_tolerance_is_never_below_what_rounding_does(folder, out, monkeypatch):
    """A right file is kept where the run's own float32 rounding is above the tolerance, a wrong one is not."""
    monkeypatch.setattr(export_module, "TOLERANCE", 1e-12)
    result = export_run(folder, out / "model.safetensors")
    assert 1e-12 < result["max_rel_difference"] <= result["tolerance"] < 1e-4

    def wrong(network):
        report = merge_norms(network)
        network.fc.bias.data[3] += 0.01
        return report

    monkeypatch.setattr(export_module, "merge_norms", wrong)
    with pytest.raises(ExportError, match="over the tolerance"):
        export_run(folder, out / "wrong.safetensors")


class DependsOnData(nn.Module):
    """A network that no capture can follow."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x) if float(x.sum()) > 0 else -self.network(x)


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_networks_that_cannot_be_captured_leave_no_file(folder, out, monkeypatch, suffix):
    """A forward that depends on data is one error that says so, without a file."""
    monkeypatch.setattr(export_module, "_network", lambda recipe, spec: DependsOnData(network(recipe, spec)))
    network = build_tiny
    model = load_checkpoint(folder / "checkpoint.pt")["model"]
    source = changed(folder, out.parent / "c.pt", model={f"network.{key}": value for key, value in model.items()})
    with pytest.raises(ExportError, match="cannot be captured"):
        export_run(source, out / f"model{suffix}")
    assert list(out.iterdir()) == []


def build_tiny(recipe, spec):
    return build_network(recipe, num_classes=10, image_size=32, initialize=False)[0]


def test_a_damaged_export_is_refused(folder, out):
    """A .safetensors that is cut, foreign or missing is a CheckpointError."""
    from safetensors.torch import save_file

    export_run(folder, out / "model.safetensors")
    (out / "cut.safetensors").write_bytes((out / "model.safetensors").read_bytes()[:-100])
    save_file({"weight": torch.zeros(3)}, out / "foreign.safetensors")
    for name in ("cut", "foreign", "missing"):
        with pytest.raises(CheckpointError, match=f"{name}.safetensors"):
            load_merged(out / f"{name}.safetensors")


def test_the_command(folder, tmp_path, monkeypatch, capfd):
    """`export` prints what became of the norms and the difference, as JSON if asked; errors have the design's exit codes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["bln-train", "export", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, *capfd.readouterr()

    code, printed, _ = call(folder, "-o", "model.safetensors")
    assert code == 0
    assert "7 merged into weights, 0 kept as a scale and shift, 0 kept as they are" in printed
    assert "same top-1 100.00 %" in printed
    code, printed, _ = call(folder, "-o", "model.safetensors", "--force", "--json")
    assert code == 0
    assert json.loads(printed)["file"] == "model.safetensors"
    for arguments, expected, words in [
        ((folder, "-o", "model.safetensors"), 1, "--force"),
        ((folder, "-o", "m.safetensors", "--batch", "dynamic"), 2, "Leave it out"),
        ((folder, "-o", "m.onnx", "--batch", "many"), 2, "'many'"),
        ((folder, "-o", "m.txt"), 2, "'.txt'"),
        (("nowhere", "-o", "m.onnx"), 2, "nowhere does not exist"),
        ((tmp_path, "-o", "m.onnx"), 1, "no checkpoint"),
    ]:
        code, printed, talk = call(*arguments)
        assert (code, printed) == (expected, "")
        assert words in talk
        assert "Traceback" not in talk
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert issubclass(ExportError, BlnError)
