"""What the shell offers: through a real bash, and as zsh and fish get it (each docstring is a law)."""

import os
import subprocess
import sys

import pytest

from bln_train.cli.complete import complete_norms, complete_recipe, complete_setting
from bln_train.recipe.load import shipped_recipes
from bln_train.recipe.recipe import Recipe

PROGRAM = """#!{python}
import atexit, pathlib, sys
atexit.register(lambda: pathlib.Path({imports!r}).write_text(" ".join(sys.modules)))
from bln_train.cli.app import main
main()
"""


@pytest.fixture
def home(tmp_path):
    """A home folder with the program on its path, which notes what it imported."""
    program = tmp_path / "bin" / "bln-train"
    program.parent.mkdir()
    program.write_text(PROGRAM.format(python=sys.executable, imports=str(tmp_path / "imports")))
    program.chmod(0o755)
    return tmp_path


def environment(home):
    return {**os.environ, "HOME": str(home), "PATH": f"{home / 'bin'}:{os.environ['PATH']}"}


@pytest.mark.slow
def test_bash_completes_after_install_completion(home):
    """`--install-completion` makes bash complete commands, shipped recipes and norms, without torch."""
    script = """
bln-train --install-completion > /dev/null || exit 1
source ~/.bashrc
offer() {
    COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
    _bln_train_completion bln-train; echo "${COMPREPLY[*]}"
}
offer bln-train rec
offer bln-train run qu
offer bln-train compare --norm batch,gr
offer bln-train run ./elsewhere/my_rec
"""
    command = ["bash", "--norc", "-c", script]
    found = subprocess.run(command, env=environment(home), cwd=home, capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == ["recipes", "quickstart", "batch,group", ""], (
        found.stderr
    )  # bash adds files itself
    imported = (home / "imports").read_text().split()
    assert "bln_train.recipe.load" in imported
    assert not {"torch", "torchvision", "rich.console"} & set(imported)


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("bln-train plan quickstart --norm none,inst", ["none,instance"]),
        ("bln-train run quickstart --set model.name=paper", ["model.name=paper_cnn"]),
        ("bln-train run quickstart --device au", ["auto"]),
        ("bln-train recipes copy quick", ["quickstart"]),
        ("bln-train migrate r.pt --calibrate finetune", ["finetune_resnet50"]),
        ("bln-train check my_own_rec", []),
    ],
)
def test_words_reach_the_shell(home, typed, offered):
    """Arguments and options of every command offer what fits there, a word to a line; nothing where files are meant."""
    env = {**environment(home), "_BLN_TRAIN_COMPLETE": "complete_fish", "_TYPER_COMPLETE_ARGS": typed}
    env["_TYPER_COMPLETE_FISH_ACTION"] = "get-args"
    found = subprocess.run([home / "bin" / "bln-train"], env=env, cwd=home, capture_output=True, text=True, check=False)
    assert found.stdout.split() == offered, found.stderr


def test_every_shipped_recipe_is_offered():
    """An empty word offers all shipped recipes."""
    assert complete_recipe("") == list(shipped_recipes())
    assert complete_recipe("nosuch") == []


def test_a_norm_is_offered_once():
    """In a list of norms those that are there already are not offered again."""
    offered = complete_norms("batch,none,")
    assert "batch,none,batchless" in offered
    assert not [text for text in offered if text.endswith((",batch", ",none"))]


def test_every_setting_is_offered_and_its_words():
    """Each section's keys, those of all its kinds; then booleans, choices and names, each of which a recipe takes."""
    keys = complete_setting("")
    for key in ("train.epochs=", "norm.num_groups=", "norm.probe_images=", "optimizer.nesterov=", "optimizer.betas="):
        assert key in keys
    assert {key.partition(".")[0] for key in keys} == set(Recipe.model_fields)
    assert len(keys) == len(set(keys))
    assert complete_setting("train.micro_batch_size=") == ["train.micro_batch_size=auto"]
    assert complete_setting("train.precision=b") == ["train.precision=bf16"]
    assert complete_setting("optimizer=") == ["optimizer=adam", "optimizer=adamw", "optimizer=sgd"]
    assert complete_setting("optimizer.nesterov=") == ["optimizer.nesterov=true", "optimizer.nesterov=false"]
    assert complete_setting("train.epochs=") == complete_setting("nosuch.key=") == []
