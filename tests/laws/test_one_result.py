"""One result whatever the code path: processor, kernels, folds, memory format, split and threads (docstrings are laws)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_recipe
from torch.testing import assert_close

from bln_train.experiments.run import run
from bln_train.recipe.load import load_recipe
from bln_train.runs.checkpoint import load_checkpoint
from bln_train.runs.folder import RECIPE, RunFolder

PATHS = {
    "default": {},
    "operators": {"runtime": {"device": "cpu", "compiled": False}},
    "unfolded, one image": {"norm__fold": False, "train__micro_batch_size": 1},
    "channels first, one image": {"train__channels_last": False, "train__micro_batch_size": 1},
    "unfolded, channels first": {"norm__fold": False, "train__channels_last": False},
    "two threads, four images": {"runtime": {"device": "cpu", "num_threads": 2}, "train__micro_batch_size": 4},
}
TRAIN = """
import json, sys
import torch
from helpers import state, tiny_recipe, trained
from bln_train.norm.kernels.library import why_not_compiled
for name, changes in json.loads(sys.argv[1]).items():
    torch.set_num_threads(1)
    torch.save(state(trained(tiny_recipe(**changes), 5)), f"{sys.argv[2]}/{name}.pt")
print(why_not_compiled())
"""


NORMS = ("batchless", "batchless-plain")


def train_paths(out, **environment):
    """Five steps of both norms on every path in a process of its own; returns why no kernel was compiled, "" where they were."""
    changes = {
        f"{norm}, {name}": {"norm": {"name": norm, "init_images": 10}, **path}
        for norm in NORMS
        for name, path in PATHS.items()
    }
    out.mkdir()
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    told = {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_WAIT_POLICY": "PASSIVE",
        **environment,
    }  # two threads spin on a busy core
    command = [sys.executable, "-c", TRAIN, json.dumps(changes), str(out)]
    return subprocess.run(command, env=told, check=True, capture_output=True, text=True).stdout.strip()


def test_weights_and_statistics_do_not_depend_on_the_path(tmp_path):
    """Five float64 steps end equal to 1e-9 of each tensor's norm on every path, with a C compiler on the machine and without."""
    assert train_paths(tmp_path / "with") == ""
    why = train_paths(tmp_path / "without", CC="no-such-compiler", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert "no-such-compiler" in why
    for norm in NORMS:
        expected = torch.load(tmp_path / "with" / f"{norm}, default.pt")
        for file in sorted(tmp_path.glob(f"*/{norm}, *.pt")):
            found = torch.load(file)
            assert found.keys() == expected.keys()
            for name, tensor in expected.items():
                size = torch.linalg.vector_norm(tensor).clamp(min=1e-30)
                assert torch.linalg.vector_norm(found[name] - tensor) / size < 1e-9, (file, name)


def autos(values, path=()):
    """Places that say auto."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from autos(value, (*path, key))
        elif value == "auto":
            yield ".".join((*path, key))


@pytest.mark.parametrize("norm", ["batchless", "batchless-plain", "batchless-paper", "batch-frozen", "batch", "group"])
def test_a_runs_recipe_states_what_auto_stood_for(norm, tmp_path):
    """recipe.yaml has a number for each `auto`, and trained again it ends at the same bits."""
    first, second = RunFolder(tmp_path / "first"), RunFolder(tmp_path / "second")
    asked = tiny_recipe(norm={"name": norm}, train__micro_batch_size=4, train__max_steps=2, train__precision="fp32")
    run(asked, first, name="first")
    written = load_recipe(first.path / RECIPE)
    unused = {"batch": {"norm.init_images"}}.get(norm, set())
    assert set(autos(written.model_dump())) == {"runtime.graphs"} | unused
    run(written, second, name="second")
    states = [load_checkpoint(folder.checkpoint)["model"] for folder in (first, second)]
    assert_close(*states, rtol=0, atol=0)
    assert load_recipe(second.path / RECIPE) == written


def test_auto_stands_for_the_numbers_that_a_run_began_with(tmp_path, monkeypatch):
    """A run that goes on by a recipe with `auto` takes the run's own numbers, whatever `auto` would be here and now."""
    folder = RunFolder(tmp_path / "run")
    changes = {"norm": {"name": "batchless", "init_images": 10}, "train__precision": "fp32"}
    run(tiny_recipe(**changes, train__max_steps=2), folder, name="run")
    begun = load_recipe(folder.path / RECIPE)
    assert begun.norm.probe_images == 4
    monkeypatch.setattr("bln_train.build.first_statistics._LEAST_PROBE", 7)
    run(tiny_recipe(**changes, train__max_steps=3), folder, name="run", resume=True)
    after = load_recipe(folder.path / RECIPE)
    assert (after.norm, after.model) == (begun.norm, begun.model)
    straight = RunFolder(tmp_path / "straight")
    run(begun.model_copy(update={"train": after.train}), straight, name="straight")
    states = [load_checkpoint(each.checkpoint)["model"] for each in (folder, straight)]
    assert_close(*states, rtol=0, atol=0)
