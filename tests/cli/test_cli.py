"""The command line: what a command prints where, leaves on disk, refuses, and survives (each docstring is a law)."""

import json
import pickle
import shlex
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from cli_runs import ENVIRONMENT, fingerprint, finish, start, wait_for, write_recipe
from PIL import Image

import bln_train
from bln_train.recipe.load import load_recipe, shipped_recipes
from bln_train.records import EpochRecord, MemoryRecord, StepRecord
from bln_train.runs.folder import RunFolder, same_trajectory


def tensors_of(checkpoint):
    """Every tensor of a checkpoint by path."""
    found = {}

    def walk(path, value):
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{path}.{key}", inner)
        elif isinstance(value, torch.Tensor):
            found[path] = value

    walk("", torch.load(checkpoint, weights_only=True))
    return found


# run


def test_run_folder_holds_everything(finished):
    """A run folder holds the recipe as it was resolved, every record, the environment, weights and summary."""
    recipe, folder, _, _ = finished
    written = load_recipe(folder / "recipe.yaml")
    assert same_trajectory(written, load_recipe(recipe))
    assert written.train.effective_batch_size == 16
    for section in (written.model, written.norm, written.train):
        assert "auto" not in section.model_dump().values()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == len(list(RunFolder(folder).records()))
    assert [r["step"] for r in records if r["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert [r["epoch"] for r in records if r["kind"] == "epoch"] == [1, 2]
    assert json.loads((folder / "environment.json").read_text())["torch"] == torch.__version__
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["step"] == 6
    assert all(torch.isfinite(t).all() for t in tensors_of(folder / "checkpoint.pt").values() if t.is_floating_point())
    assert not list(folder.glob("*.tmp"))


def test_stdout_is_data_and_stderr_is_talk(finished):
    """`--json` prints one JSON document, the summary, and nothing else on stdout; progress goes to stderr."""
    _, folder, stdout, stderr = finished
    assert {**json.loads((folder / "summary.json").read_text()), "folder": "run"} == json.loads(stdout)
    assert "epoch 2: loss" in stderr
    assert "effective batch 16, micro-batch 8" in stderr


def test_peak_memory_splits_without_rest(finished):
    """The parts of the peak add up to it; what was not measured is null, and shown as `-`, never 0."""
    _, folder, _, _ = finished
    measured = [r for r in RunFolder(folder).records() if isinstance(r, MemoryRecord)][-1]
    parts = ("parameter", "gradient", "optimizer", "activation", "other")
    sizes = [getattr(measured, f"{part}_bytes") for part in parts]
    assert min(sizes) > 0
    assert sum(sizes) == measured.peak_bytes
    assert measured.reserved_bytes is None
    assert measured.device
    assert measured.process_bytes > measured.peak_bytes


def test_summary_table_and_numbered_folders(bln):
    """Without --json the summary is a table on stdout; without --out a second run takes the next free folder."""
    name = "ti[red]ny:fire:.yaml"  # shown as it is: neither markup nor emoji
    write_recipe(Path(name), train__epochs=1, data__num_train=16)
    code, out, err = bln("run", name)
    assert code == 0, err
    assert "test accuracy" in out
    assert "peak, tracked tensors" in out
    assert "whole card in use" in out
    assert "ti[red]ny:fire:.yaml" in out
    assert "epoch 1" not in out
    assert "epoch 1" in err
    assert bln("run", name, "--set", "train.seed=1", "--json")[0] == 0
    assert sorted(p.name for p in Path("runs").iterdir()) == ["ti[red]ny:fire:", "ti[red]ny:fire:-2"]
    assert RunFolder(Path("runs/ti[red]ny:fire:-2")).recipe().train.seed == 1


def test_a_run_is_never_overwritten(bln, finished):
    """The folder of a run, of another recipe's run or of anything foreign is refused with exit 1 and stays as it was."""
    recipe, folder, _, _ = finished
    before = fingerprint(folder)
    for changes, word in (((), "--resume"), (("--set", "optimizer.lr=0.2"), "another recipe")):
        code, out, err = bln("run", recipe, "--out", folder, *changes)
        assert (code, out) == (1, "")
        assert word in err
    assert bln("run", recipe, "--out", folder, "--set", "optimizer.lr=0.2", "--resume")[0] == 1
    assert fingerprint(folder) == before

    foreign = Path("foreign")
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("all of it")
    code, _, err = bln("run", recipe, "--out", foreign)
    assert code == 1
    assert "holds no run" in err
    assert [p.name for p in foreign.iterdir()] == ["thesis.tex"]


def test_unusable_output_is_refused(bln, finished):
    """A file as --out, a folder that cannot be made, and --resume where nothing was begun: exit 1 before any training."""
    recipe = finished[0]
    Path("file").write_text("mine")
    for out, word in (
        ("file", "is a file"),
        ("file/run", "cannot be written"),
        ("/proc/run", "/proc"),
        ("x" * 300, "too long"),
    ):
        code, _, err = bln("run", recipe, "--out", out)
        assert code == 1
        assert word in err.lower()
    assert Path("file").read_text() == "mine"
    code, _, err = bln("run", recipe, "--out", "nothing-here", "--resume")
    assert code == 1
    assert "holds no run to resume" in err
    assert not Path("nothing-here").exists()
    assert bln("run", recipe, "--resume")[0] == 1
    assert not Path("runs").exists()


def test_resuming_a_finished_run_changes_nothing(bln, finished):
    """--resume on a finished run prints its summary again; measured figures are not overwritten by unmeasured ones."""
    recipe, folder, stdout, _ = finished
    before = fingerprint(folder)
    code, out, _ = bln("run", recipe, "--out", folder, "--resume", "--json")
    assert code == 0
    assert json.loads(out) == {**json.loads(stdout), "folder": str(folder)}
    assert fingerprint(folder) == before


def test_a_run_may_go_on_for_longer(bln):
    """A run stopped by max_steps goes on with more of them, sliced otherwise; the folder's recipe says so."""
    write_recipe(Path("r.yaml"), train__max_steps=2)
    assert bln("run", "r.yaml", "--out", "run")[0] == 0
    more = ("--set", "train.max_steps=4", "--set", "train.micro_batch_size=4")
    assert bln("run", "r.yaml", "--out", "run", "--resume", *more)[0] == 0
    folder = RunFolder(Path("run"))
    assert (folder.recipe().train.max_steps, folder.recipe().train.micro_batch_size) == (4, 4)
    assert [r.step for r in folder.records() if isinstance(r, StepRecord)] == [1, 2, 3, 4]
    assert folder.summary()["steps"] == 4


def test_interrupted_run_resumes_bitwise(bln, tmp_path):
    """Ctrl-C saves the state, exits with 130 and names the command that ends in the very bits of an unbroken run."""
    recipe = write_recipe(tmp_path / "long run.yaml", train__eval_every_epochs=20)
    changes = ("--set", "train.epochs=8")
    process = start("run", recipe, *changes, "--out", "broken run", cwd=tmp_path)
    folder = RunFolder(tmp_path / "broken run")

    def num_steps():
        return sum(isinstance(r, StepRecord) for r in folder.records())

    wait_for(lambda: num_steps() >= 4, process)
    process.send_signal(signal.SIGINT)
    code, stdout, stderr = finish(process)
    assert (code, stdout) == (130, "")
    assert "Traceback" not in stderr
    assert 4 <= num_steps() < 24
    command = shlex.split(stderr.split("Go on with: ")[1])
    assert command[0] == "bln-train"
    code, _, err = bln(*command[1:])
    assert code == 0
    assert "resumed at step" in err

    assert bln("run", recipe, *changes, "--out", "straight")[0] == 0
    expected, found = tensors_of("straight/checkpoint.pt"), tensors_of(folder.checkpoint)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert [r.step for r in folder.records() if isinstance(r, StepRecord)] == list(range(1, 25))
    epochs, straight = (
        [(r.epoch, r.train_loss, r.test_loss) for r in f.records() if isinstance(r, EpochRecord)]
        for f in (folder, RunFolder(Path("straight")))
    )
    assert epochs == straight


def test_batchnorm_below_the_effective_batch_is_told(bln):
    """BatchNorm with a smaller micro-batch trains, but a note says what that means and names batchless; JSON stays pure."""
    write_recipe(Path("r.yaml"), norm={"name": "batch"}, train__epochs=1)
    code, out, err = bln("run", "r.yaml", "--json")
    assert code == 0
    assert json.loads(out)["norm"] == "batch"
    assert "note: BatchNorm sees 8 images at a time" in err
    assert "norm.name=batchless" in err


def test_a_diverged_run_says_so(bln):
    """Divergence is exit 1 with the settings to change; what was logged stays readable JSON."""
    write_recipe(Path("r.yaml"), norm={"name": "none"}, optimizer__lr=1e18, optimizer__clip_norm=None)
    code, _, err = bln("run", "r.yaml", "--out", "run")
    assert code == 1
    assert "diverged" in err
    assert "optimizer.lr" in err
    for line in Path("run/metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


# evaluate


def test_evaluate_gives_the_accuracy_of_the_summary(bln, finished):
    """A run folder and its checkpoint file evaluate to exactly the loss and accuracy of the run's summary."""
    _, folder, stdout, _ = finished
    summary = json.loads(stdout)
    for source in (folder, folder / "checkpoint.pt"):
        code, out, _ = bln("evaluate", source, "--json")
        assert code == 0
        found = json.loads(out)
        assert (found["loss"], found["accuracy"]) == (summary["test_loss"], summary["test_accuracy"])
        assert (found["num_images"], found["step"]) == (20, 6)
    code, out, _ = bln("evaluate", folder)
    assert code == 0
    assert f"accuracy {100 * summary['test_accuracy']:.2f} % over 20 images" in out


def test_evaluate_shows_each_layers_likelihood(bln, finished):
    """`--layers` adds the nll of the test images by layer, and leaves loss and accuracy as they are to the bit."""
    _, folder, stdout, _ = finished
    summary = json.loads(stdout)
    found = json.loads(bln("evaluate", folder, "--layers", "--json")[1])
    assert found["loss"] == summary["test_loss"]
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [record["nll_by_layer"] for record in logged if record.get("nll_by_layer")][-1]
    assert list(found["nll_by_layer"]) == list(last)
    assert all(-0.5 < value < 50 for value in found["nll_by_layer"].values())
    code, out, _ = bln("evaluate", folder, "--layers")
    assert code == 0
    for name, value in found["nll_by_layer"].items():
        assert f"nll {value:10.4f}  {name}" in out
    assert json.loads(bln("evaluate", folder, "--json")[1])["nll_by_layer"] is None


class Trap:
    """Creates a file when it is unpickled by a loader that executes what a file says."""

    def __reduce__(self):
        return open, ("trapped", "w")


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch warns of foreign pickles before it refuses them
def test_damaged_checkpoints_are_refused(bln, finished):
    """A truncated, damaged, empty or foreign checkpoint is exit 1 with its name; no code in it is executed."""
    whole = (finished[1] / "checkpoint.pt").read_bytes()
    torch.save({"bln_train_format": 1, "recipe": Trap()}, "trap.pt")
    torch.save({"model": {}}, "other.pt")
    torch.save({"bln_train_format": 1, "recipe": (finished[1] / "recipe.yaml").read_text(), "step": 3}, "half.pt")
    files = {
        "cut.pt": whole[: len(whole) // 2],
        "garbled.pt": whole[:200] + bytes(300) + whole[500:],
        "empty.pt": b"",
        "text.pt": b"not a checkpoint\n" * 99,
        "pickle.pt": pickle.dumps(Trap()),
        "trap.pt": None,
        "other.pt": None,
        "half.pt": None,
    }
    for name, content in files.items():
        if content is not None:
            Path(name).write_bytes(content)
        code, out, err = bln("evaluate", name)
        assert (code, out) == (1, ""), name
        assert err.startswith("error: ")
        assert name in err or "checkpoint" in err
    assert not Path("trapped").exists()
    Path("no-checkpoint").mkdir()
    assert bln("evaluate", "no-checkpoint")[0] == 1
    assert bln("evaluate", "nowhere")[0] == 2


def test_flipped_weights_are_refused(bln, finished):
    """Bytes that changed inside the weights are exit 1, not an accuracy of other weights."""
    whole = bytearray((finished[1] / "checkpoint.pt").read_bytes())
    whole[len(whole) // 3 : len(whole) // 3 + 4000] = bytes(4000)
    Path("damaged.pt").write_bytes(whole)
    assert bln("evaluate", "damaged.pt")[0] == 1


# Bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "r.yaml", "--set", "train.epoch=3"], ["train.epoch", "did you mean `epochs`"]),
        (["run", "r.yaml", "--set", "norm.name=batchles"], ["batchles", "did you mean `batchless`"]),
        (["run", "nosuch.yaml"], ["nosuch.yaml", "no such file", "recipes list"]),
        (["run", "r.yaml", "--device", "cuda"], ["CUDA"]),
        (["run", "r.yaml", "--device", "tpu"], ["--set runtime.device=tpu", "`cuda:<index>`"]),
        (["run", "r.yaml", "--device", "auto", "--set", "train.precision=fp16"], ["fp16", "CUDA"]),
        (["run", "r.yaml", "--set", "train.micro_batch_size=0"], ["train.micro_batch_size", "at least 1"]),
        (["run", "r.yaml", "--set", "train.micro_batch_size=17"], ["17", "effective_batch_size 16"]),
        (["compare", "r.yaml", "--micro-batch", "one"], ["--micro-batch", "'one'"]),
        (["compare", "r.yaml", "--micro-batch", "²"], ["--micro-batch", "'²'"]),
        (["compare", "r.yaml", "--effective-batch", "8,0"], ["--effective-batch", "'0'"]),
        (["compare", "r.yaml", "--effective-batch", "2,4", "--micro-batch", "8"], ["every micro-batch (8)"]),
        (["compare", "r.yaml", "--effective-batch", "1,2,...,8"], ["1,2,3,...,8 or 1,2,4,...,8", "Name three"]),
        (["compare", "r.yaml", "--effective-batch", "1,2,4,...,9"], ["--effective-batch 1,2,4,...,9", "equal steps"]),
        (["compare", "r.yaml", "--micro-batch", "1,...,8"], ["--micro-batch 1,...,8", "two sizes"]),
        (["memory", "r.yaml", "--effective-batch", "1,2,4,...,"], ["--effective-batch 1,2,4,...", "the last one"]),
        (["run", "r.yaml", "--set", "data.validation_fraction=1.0"], ["data.validation_fraction", "below 1"]),
        (["compare", "r.yaml", "--norm", "batch,batchles"], ["'batchles'", "batchless"]),
        (["compare", "r.yaml", "--norm", ","], ["at least one norm"]),
        (["compare", "r.yaml", "--seeds", "0"], ["--seeds"]),
        (["evaluate", "nowhere.pt"], ["nowhere.pt does not exist"]),
        (["recipes", "show", "nosuch"], ["'nosuch'", "quickstart"]),
        (["trian"], ["trian"]),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="expects a machine without CUDA")
def test_bad_input_is_exit_2_and_names_the_fault(bln, arguments, words):
    """Wrong input is exit 2: the fault and the way out on stderr, no traceback, nothing on stdout, nothing written."""
    write_recipe(Path("r.yaml"))
    code, out, err = bln(*arguments)
    assert (code, out) == (2, "")
    for word in words:
        assert word in err
    assert [p.name for p in Path().iterdir()] == ["r.yaml"]


def test_debug_shows_the_traceback(tmp_path):
    """BLN_DEBUG=1 shows where an error came from; without it a process prints the message alone."""
    plain = finish(start("check", "nosuch.yaml", cwd=tmp_path))
    debug = finish(start("check", "nosuch.yaml", cwd=tmp_path, env=ENVIRONMENT | {"BLN_DEBUG": "1"}))
    assert plain[0] == 2
    assert plain[1] == ""
    assert "Traceback" not in plain[2]
    assert debug[0] != 0
    assert "Traceback" in debug[2]
    assert "nosuch.yaml" in debug[2]


def test_class_count_of_a_folder_is_checked(bln):
    """An image folder with other classes than the recipe states is exit 2 and says both numbers; without them it trains."""
    for split in ("train", "test"):
        for n, name in enumerate(("ant", "bee")):
            folder = Path("images") / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                Image.effect_noise((32, 32), 40 + 20 * i + n).convert("RGB").save(folder / f"{i}.png")
    write_recipe(
        Path("r.yaml"),
        data={"name": "folder", "root": "images"},
        model__num_classes=3,
        train__effective_batch_size=8,
        train__epochs=1,
    )
    code, _, err = bln("run", "r.yaml", "--out", "run")
    assert code == 2
    assert "model.num_classes is 3" in err
    assert "2 classes" in err
    assert not Path("run").exists()
    assert bln("run", "r.yaml", "--out", "run", "--set", "model.num_classes=null")[0] == 0


# recipes, check, wheel


def test_recipes_list_show_copy(bln):
    """Shipped recipes are listed with their first line, shown, and copied without overwriting; all but the line for editors."""
    code, out, _ = bln("recipes", "list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == sorted(shipped_recipes())
    assert "quickstart               Drawn shapes, a small" in out
    _, _, text = shipped_recipes()["quickstart"].read_text().partition("\n")
    assert bln("recipes", "show", "quickstart")[1].partition("\n")[2] == text
    code, out, _ = bln("recipes", "copy", "quickstart")
    assert (code, out) == (0, "quickstart.yaml\n")
    Path("quickstart.yaml").write_text("edited")
    code, _, err = bln("recipes", "copy", "quickstart")
    assert code == 1
    assert "nothing was written" in err
    assert bln("recipes", "copy", "quickstart", ".")[0] == 1
    Path("link.yaml").symlink_to("elsewhere.yaml")
    assert bln("recipes", "copy", "quickstart", "link.yaml")[0] == 1
    assert Path("quickstart.yaml").read_text() == "edited"
    assert not Path("elsewhere.yaml").exists()
    Path("sub").mkdir()
    assert bln("recipes", "copy", "quickstart", "sub")[0] == 0
    assert Path("sub/quickstart.yaml").read_text().partition("\n")[2] == text
    assert bln("recipes", "copy", "quickstart", "nowhere/x.yaml")[0] == 1


def test_check_lists_all_problems_at_once(bln):
    """`check` names every problem with its line in one message, exit 2; a valid recipe is exit 0 and nothing runs."""
    write_recipe(Path("good[red].yaml"))
    code, out, _ = bln("check", "good[red].yaml")
    assert code == 0
    assert out.startswith("good[red].yaml: ok (resnet8 on shapes, norm batchless")
    Path("bad.yaml").write_text(
        "data: {name: shapes}\nmodel: {name: resnet9}\nnorm: {name: batch}\ntrain:\n  epochs: 0\n"
    )
    code, out, err = bln("check", "bad.yaml", "--set", "optimiser.lr=1")
    assert (code, out) == (2, "")
    for problem in ("bad.yaml:2: model.name", "bad.yaml:5: train.epochs", "train.micro_batch_size", "optimiser"):
        assert problem in err
    assert sorted(p.name for p in Path().iterdir()) == ["bad.yaml", "good[red].yaml"]


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_is_valid(bln, name):
    """Law 8: every recipe loads, by name and by path, and its header says what command runs it."""
    assert bln("check", name)[0] == 0
    assert bln("check", shipped_recipes()[name])[0] == 0
    header = [line for line in shipped_recipes()[name].read_text().splitlines() if line.startswith("#")]
    assert any("bln-train " in line for line in header)


def test_the_wheel_carries_the_recipes(tmp_path):
    """A built wheel holds the recipes, and its program lists them where there is no checkout."""
    root = Path(bln_train.__file__).parents[1]
    build = [sys.executable, "-m", "pip", "wheel", str(root), "--no-deps", "--quiet", "-w", str(tmp_path)]
    try:
        import hatchling  # noqa: F401

        build.append("--no-build-isolation")
    except ImportError:
        pass  # pip fetches it
    built = subprocess.run(build, capture_output=True, text=True, timeout=180)
    if built.returncode:
        pytest.skip(f"pip cannot build a wheel here: {built.stderr[-300:]}")
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    assert (tmp_path / "installed/bln_train/shipped_recipes/quickstart.yaml").is_file()
    environment = ENVIRONMENT | {"PYTHONPATH": str(tmp_path / "installed")}
    listing = start("recipes", "list", cwd=tmp_path, env=environment)
    code, out, err = finish(listing)
    assert code == 0, err
    assert [line.split()[0] for line in out.splitlines()] == sorted(shipped_recipes())
    where = [sys.executable, "-c", "import bln_train; print(bln_train.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert found.startswith(str(tmp_path))
