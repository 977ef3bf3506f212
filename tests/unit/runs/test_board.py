"""TensorBoard's files, as its own reader reads them, say what metrics.jsonl says (each docstring is a law)."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from terminal import ENVIRONMENT

from bln_train.cli import app as cli
from bln_train.experiments.run import run
from bln_train.recipe.recipe import Recipe
from bln_train.records import EpochRecord, MemoryRecord, NoticeRecord, StepRecord
from bln_train.runs.folder import RunFolder

TINY = {
    "data": {"name": "shapes", "num_train": 48, "num_test": 20},
    "model": {"name": "resnet8"},
    "norm": {"name": "batchless", "probe_images": 4, "init_images": 8},
    "train": {"epochs": 2, "effective_batch_size": 16, "micro_batch_size": 16},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "runtime": {"device": "cpu", "num_threads": 1, "log_every_steps": 1, "checkpoint_every_steps": 1},
    "logging": {"tensorboard": True},
}
EVERYTHING = {"scalars": 0, "histograms": 0, "tensors": 0}


def recipe(**changes):
    """TINY with `section__key=value` changes."""
    data = {name: dict(section) for name, section in TINY.items()}
    for path, value in changes.items():
        section, _, key = path.partition("__")
        data[section][key] = value
    return Recipe.model_validate(data)


def written(folder):
    """All events as TensorBoard shows them: what a later file says to be void is left out."""
    events = EventAccumulator(str(folder.path), EVERYTHING)
    events.Reload()
    return events


def scalars(events, tag):
    return [(event.step, event.value) for event in events.Scalars(tag)]


def check_equal_to_metrics(folder):
    """Every figure of metrics.jsonl is there once, in order, at its step."""
    events, records = written(folder), list(folder.records())
    steps = [r for r in records if isinstance(r, StepRecord)]
    for name in ("loss", "accuracy", "nll", "learning_rate", "grad_norm"):
        assert scalars(events, f"train/{name}") == [(r.step, np.float32(getattr(r, name))) for r in steps]
    speeds = [(r.step, np.float32(r.num_images / r.seconds)) for r in steps]
    assert scalars(events, "train/images_per_second") == speeds
    layers = steps[0].nll_by_layer
    for name in layers:
        found = [(r.step, np.float32(r.nll_by_layer[name])) for r in steps]
        assert scalars(events, f"layer_nll/{name}") == found
    epochs = [r for r in records if isinstance(r, EpochRecord)]
    assert scalars(events, "epoch/loss") == [(r.step, np.float32(r.train_loss)) for r in epochs]
    assert scalars(events, "test/accuracy") == [(r.step, np.float32(r.test_accuracy)) for r in epochs]
    assert "validation/loss" not in events.Tags()["scalars"]
    for kind in ("mean", "log_std"):
        assert {tag for tag in events.Tags()["histograms"] if tag.startswith(f"layer_{kind}/")} == {
            f"layer_{kind}/{name}" for name in layers
        }
        for name in layers:
            assert [event.step for event in events.Histograms(f"layer_{kind}/{name}")] == [r.step for r in epochs]
    return events, records


def test_numbers_are_those_of_the_metrics(tmp_path):
    """Loss, rates, norms, speed, likelihoods and peaks are metrics.jsonl's, in float32; histograms are of the layers at the end."""
    folder = RunFolder(tmp_path / "run")
    kept = []
    run(recipe(), folder, name="tiny", announce=kept.append)
    events, records = check_equal_to_metrics(folder)
    peaks = [r for r in records if isinstance(r, MemoryRecord)]
    assert [value for _, value in scalars(events, "memory_mib/peak")] == [
        np.float32(r.peak_bytes / 2**20) for n, r in enumerate(peaks) if r not in peaks[:n]
    ]
    assert scalars(events, "memory_mib/activation")[0] == (2, np.float32(peaks[0].activation_bytes / 2**20))
    assert "memory_mib/reserved" not in events.Tags()["scalars"]  # was not measured
    name, layer = next(iter(kept[0].trainer.accumulation.statistics.layers.items()))
    last = events.Histograms(f"layer_log_std/{name}")[-1].histogram_value
    assert last.num == layer.std.numel()
    assert last.sum == pytest.approx(layer.std.log().sum().item(), rel=1e-5)
    texts = [e for tag in events.Tags()["tensors"] if tag.startswith("notices") for e in events.Tensors(tag)]
    assert len(texts) == sum(isinstance(r, NoticeRecord) for r in records)


@pytest.mark.parametrize("left_at", ["step 5", "an epoch's end"])
def test_a_resumed_run_writes_no_step_twice(tmp_path, left_at):
    """After a run that left between two checkpoints, steps and epochs that are taken again stand once, and none is missing;
    an event that is torn harms none before it."""

    def leave(record):  # as a second Ctrl-C does
        if (isinstance(record, EpochRecord) and left_at == "an epoch's end") or getattr(record, "step", 0) == 5:
            raise KeyboardInterrupt

    every = None if left_at == "step 5" else 1
    folder, begun = RunFolder(tmp_path / "run"), recipe(runtime__checkpoint_every_steps=every)
    with pytest.raises(KeyboardInterrupt):
        run(begun, folder, name="tiny", listen=leave)
    before = scalars(written(folder), "train/loss" if every is None else "epoch/loss")
    assert [step for step, _ in before] == ([1, 2, 3, 4, 5] if every is None else [3])
    with open(folder.event_files()[0], "r+b") as torn:  # as a kill in the middle of writing leaves it
        torn.truncate(torn.seek(0, 2) - 3)
    run(begun, folder, name="tiny", resume=True)
    assert len(folder.event_files()) == 2
    _, records = check_equal_to_metrics(folder)
    assert [r.step for r in records if isinstance(r, StepRecord)] == [1, 2, 3, 4, 5, 6]


def test_a_run_without_a_board_goes_on_with_one(tmp_path):
    """A run that had none goes on with a board that begins with the first step; a new run clears it."""
    folder = RunFolder(tmp_path / "run")
    run(recipe(train__max_steps=3, logging__tensorboard=False), folder, name="tiny")
    assert not folder.event_files()
    longer = recipe()
    folder.check_usable(longer, resume=True)
    run(longer, folder, name="tiny", resume=True)
    events = written(folder)
    assert [step for step, _ in scalars(events, "train/loss")] == [1, 2, 3, 4, 5, 6]
    folder.create(longer, {})
    assert not folder.event_files()


@pytest.fixture
def without_tensorboard(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # what Python looks up before any folder
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(yaml.safe_dump(TINY))


@pytest.mark.usefixtures("without_tensorboard")
@pytest.mark.parametrize("command", ["check", "run", "compare"])
def test_a_missing_package_is_told_before_anything_runs(monkeypatch, capfd, command):
    """Without the package `logging.tensorboard` is exit 2 with the command that installs it, and nothing is written."""
    monkeypatch.setattr(sys, "argv", ["bln-train", command, "r.yaml"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "pip install 'bln-train[tensorboard]'" in capfd.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["r.yaml"]


@pytest.mark.slow
def test_nothing_is_imported_where_it_is_off(tmp_path):
    """A run without logging.tensorboard imports nothing of TensorBoard and writes no event file."""
    data = {**TINY, "train": {**TINY["train"], "max_steps": 1}, "logging": {"tensorboard": False}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(data))
    program = (
        "import sys; from bln_train.cli.app import app; app(['run', 'r.yaml', '--out', 'run', '--json'], standalone_mode=False);"
        "assert not [name for name in sys.modules if 'tensorboard' in name and not name.startswith('bln_train')]"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=ENVIRONMENT, check=True, capture_output=True)
    assert not RunFolder(tmp_path / "run").event_files()
