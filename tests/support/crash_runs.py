"""Runs that are killed and stopped, for test_crash.py and test_damage.py: fixtures and what has to be left of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_recipe

from bln_train.build.experiment import build_experiment
from bln_train.experiments.run import run
from bln_train.records import EpochRecord, StepRecord, record_to_dict
from bln_train.runs.checkpoint import find_checkpoint, load_checkpoint
from bln_train.runs.checkpoint_files import checkpoint_files
from bln_train.runs.folder import RunFolder
from bln_train.system.lock import LOCK

NUM_STEPS = 24
RECIPE = tiny_recipe(
    data={"name": "shapes", "num_train": 10, "num_test": 4, "augment": {"flip": True}},
    norm={"name": "batchless", "probe_images": 2, "init_images": 4},
    train={"epochs": 8, "effective_batch_size": 4, "micro_batch_size": 2, "precision": "fp32"},
    runtime={"device": "cpu", "checkpoint_every_steps": 1, "log_every_steps": 1, "keep_checkpoints": 3},
)  # three steps an epoch, the last one of 2 images


def figures(folder):
    """Steps and epochs of the metrics, apart from times."""
    kept = []
    for record in RunFolder(folder).records():
        if isinstance(record, StepRecord | EpochRecord):
            data = record_to_dict(record)
            for key in ("seconds", "images_per_second", "eval_seconds"):
                data.pop(key, None)
            kept.append(data)
    return kept


def equal(expected, found):
    return expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The undisturbed run: its folder, and the network after each step."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    run(RECIPE, RunFolder(folder), name="crash")
    trainer, after = build_experiment(RECIPE).trainer, {}
    for record in trainer.steps():
        if isinstance(record, StepRecord):
            after[record.step] = {key: value.clone() for key, value in trainer.accumulation.model.state_dict().items()}
    assert equal(after[NUM_STEPS], load_checkpoint(folder / "checkpoint.pt")["model"])
    return folder, after


class Worker:
    """crash_worker.py, which runs recipes in forked processes."""

    def __init__(self, warm):
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("crash_worker.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.process.stdin.write(f"{warm}\n{json.dumps({'recipe': RECIPE.model_dump(mode='json')})}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "warm\n"

    def start(self, folder, **task):
        """Begin a run, or go on with it; returns its process id."""
        resume = RunFolder(folder).holds_run
        line = json.dumps({"recipe": RECIPE.model_dump(mode="json"), "folder": str(folder), "resume": resume, **task})
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def ready(self):
        """Wait for the first step: None, or the exit code of a run that had none, killed when all was written."""
        line = self.process.stdout.readline()
        return None if line == "ready\n" else int(line.removeprefix("exit "))

    def wait(self):
        """The exit code of the run begun, -9 where it was killed."""
        while not (line := self.process.stdout.readline()).startswith("exit"):
            assert line == "ready\n"
        return int(line.split()[1])

    def run(self, folder, **task):
        self.start(folder, **task)
        return self.wait()


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    worker = Worker(tmp_path_factory.mktemp("warm") / "run")
    yield worker
    _, stderr = worker.process.communicate()
    assert "Traceback" not in stderr, stderr


def check_killed(folder, after):
    """Whatever is left after a kill: the checkpoint found is whole, is that of its step, and nobody need be told anything."""
    if checkpoint_files(folder):
        found = find_checkpoint(folder)
        assert found.notices == []
        if found.state["step"]:
            assert equal(after[found.state["step"]], found.state["model"])


def check_stopped(folder, after):
    """What a run leaves that stopped by itself: as after a kill, and no file half written and no lock."""
    assert not list(folder.glob("*.tmp"))
    assert not (folder / LOCK).exists()
    check_killed(folder, after)


def check_end(folder, straight):
    """The run's end: weights, metrics and files are those of the run that nobody disturbed."""
    expected = load_checkpoint(straight[0] / "checkpoint.pt")
    found = load_checkpoint(folder / "checkpoint.pt")
    assert equal(expected["model"], found["model"])
    for number, values in expected["optimizer"]["state"].items():
        assert equal(values, found["optimizer"]["state"][number])
    assert figures(folder) == figures(straight[0])
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in straight[0].iterdir())
