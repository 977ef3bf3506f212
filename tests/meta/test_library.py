"""bln-train as a library: the README's example, the public names, what importing them costs, and their types."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

import bln_train

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def example():
    """The names that the README's block leaves behind, and the losses it prints."""
    (block,) = re.findall(r"## As a library\n.*?```python\n(.*?)```", README, re.DOTALL)
    printed = []
    names = {"print": lambda *values: printed.append(values)}
    exec(compile(block, "README.md", "exec"), names)
    return names, printed


@pytest.mark.slow
def test_the_example_trains(example):
    """The block runs as it stands, folds every norm, and its loss falls."""
    (kept,), (losses,) = example[1]
    assert kept == "not folded: {}"
    assert len(losses) == 8
    assert losses[-1] < 0.5 * losses[0], losses


@pytest.mark.slow
def test_the_example_is_the_same_one_image_at_a_time(example):
    """Law 1 in somebody else's network: micro-batch 1 equals micro-batch 4, and 3 with a short last one, in float64."""
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=10).double()
    images, labels = torch.rand(8, 3, 32, 32, dtype=torch.float64), torch.arange(8)
    nets = {size: copy.deepcopy(net) for size in (1, 4, 3)}
    losses = {
        size: example[0]["train"](each, images, labels, micro_batch_size=size, num_steps=2)
        for size, each in nets.items()
    }
    states = {size: each.state_dict() for size, each in nets.items()}
    for size in (4, 3):
        assert losses[size] == pytest.approx(losses[1], rel=1e-6)  # the example sums them in float32
        for name, expected in states[1].items():
            torch.testing.assert_close(states[size][name], expected, rtol=1e-9, atol=1e-11, msg=name)


def test_public_names_are_imported_on_first_use():
    """`import bln_train` loads no torch; every public name is there; what is not public is an AttributeError."""
    code = (
        "import sys, bln_train; assert 'torch' not in sys.modules and 'pydantic' not in sys.modules\n"
        "assert set(bln_train.__all__) <= set(dir(bln_train))\n"
        "bln_train.load_recipe, bln_train.BlnError, bln_train.StepRecord; assert 'torch' not in sys.modules\n"
        "from bln_train import *; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    for name in bln_train.__all__:
        assert getattr(bln_train, name) is getattr(bln_train, name)
    with pytest.raises(AttributeError, match="no attribute 'fuze'"):
        bln_train.fuze  # noqa: B018
    assert set(bln_train._HOMES) < set(bln_train.__all__)


def test_help_loads_no_torch():
    code = (
        "import sys; sys.argv = ['bln-train', '--help']\n"
        "from bln_train.cli.app import app\n"
        "try: app()\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules, 'torch'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_a_program_that_uses_the_names_is_type_checked(tmp_path):
    """mypy --strict takes a program that is right, and sees a wrong argument, a wrong attribute and a misspelt name."""
    mypy = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--no-error-summary"]
    good = f"from bln_train import {', '.join(bln_train.__all__)}\n" + (
        "from torch import nn\n"
        "net: nn.Module = convert_batchnorm(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))\n"
        "kept: dict[str, str] = fuse(net).kept\n"
        "trainer: Trainer = build_experiment(load_recipe('quickstart')).trainer\n"
        "losses = [record.loss for record in trainer.steps() if isinstance(record, StepRecord)]\n"
        "mean: float = sum(losses) / len(losses)\n"
    )
    bad = "\nfrom bln_train import fuze\nBatchlessNorm2d('8')\nmean.loss\n"
    (tmp_path / "program.py").write_text(good + bad)
    found = subprocess.run([*mypy, "program.py"], cwd=tmp_path, capture_output=True, text=True)
    lines = good.count("\n")
    assert [line.split(":")[1] for line in found.stdout.splitlines() if ": error: " in line] == [
        str(lines + n) for n in (2, 3, 4)
    ], found.stdout + found.stderr
