"""`bln-train recipes new`: a recipe from answers or options that `check` accepts; nothing overwritten."""

import os
import re
import sys
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft7Validator
from typer.testing import CliRunner

from bln_train.cli.app import app
from bln_train.errors import BlnError, RecipeError, UsageError
from bln_train.recipe.editor_schema import editor_schema
from bln_train.recipe.load import load_recipe

VALIDATOR = Draft7Validator(editor_schema())


@pytest.fixture(autouse=True)
def _in_an_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def new(*arguments, answers=""):
    return CliRunner().invoke(app, ["recipes", "new", *arguments], input=answers)


def folder(name):
    for part in ("train", "test"):
        (Path(name) / part).mkdir(parents=True)
    return name


def check(file):
    """The recipe, after `bln-train check` and an editor had no objection."""
    assert CliRunner().invoke(app, ["check", str(file)]).exit_code == 0
    assert not list(VALIDATOR.iter_errors(yaml.safe_load(Path(file).read_text())))
    return load_recipe(file)


def test_answers_make_a_recipe_and_a_wrong_one_is_asked_again():
    result = new(answers="cifra10\ncifar10\nresnet9\n\n4 gigs\n4GiB\n")
    assert (result.exit_code, result.stdout) == (0, "my_recipe.yaml\n")  # stdout is data
    for asked_again in ("did you mean `cifar10`?", "did you mean 'resnet8'?", "'4 gigs' is not a size above 0"):
        assert asked_again in result.stderr
    recipe = check("my_recipe.yaml")
    assert (recipe.data.name, recipe.model.name) == ("cifar10", "resnet20")
    assert (recipe.train.micro_batch_size, recipe.train.memory_budget) == ("auto", "4GiB")


def test_enter_alone_makes_what_trains_at_once_one_image_at_a_time():
    assert new("mine.yaml", answers="\n\n\n").exit_code == 0
    recipe = check("mine.yaml")
    assert (recipe.data.name, recipe.model.name, recipe.train.micro_batch_size) == ("shapes", "resnet8", 1)
    load_recipe("mine.yaml", ["train.epochs=1"])  # a first try


def test_options_ask_nothing():
    photos = folder("my photos: #1")
    options = ["--data", photos, "--model", "torchvision:resnet50", "--memory", "512", "--init", "pretrained"]
    result = new("my fine tuning.yaml", *options)
    assert (result.exit_code, result.stderr) == (0, "")
    recipe = check("my fine tuning.yaml")
    assert (recipe.data.root, recipe.data.image_size, recipe.model.init) == (photos, 224, "pretrained")
    assert (recipe.train.memory_budget, recipe.optimizer.lr) == ("512", 1e-3)
    assert "#   bln-train run 'my fine tuning.yaml'\n" in Path("my fine tuning.yaml").read_text()


def test_every_suggestion_in_a_comment_is_accepted():
    assert new("plain.yaml", "--data", "cifar100", "--model", "torchvision:resnet18", "--memory", "").exit_code == 0
    Path("all.yaml").write_text(re.sub(r"^  # ", "  ", Path("plain.yaml").read_text(), flags=re.MULTILINE))
    recipe = check("all.yaml")
    assert (recipe.data.num_train, recipe.data.validation_fraction, recipe.model.init) == (1000, 0.2, "pretrained")
    assert (recipe.train.precision, recipe.optimizer.accumulate_into) == ("bf16", "momentum")


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        (["--data", "cifra10"], UsageError, "--data: 'cifra10' is no data set"),
        (["--data", "half"], UsageError, "half has no test; it needs train/<class>/* and test/<class>/*"),
        (["--model", "resnet9"], UsageError, "did you mean 'resnet8'?"),
        (["--memory", "much"], UsageError, "--memory: 'much' is not a size above 0"),
        (["--init", "pretrained"], RecipeError, "there are no published weights of resnet8"),
    ],
)
def test_bad_options_write_nothing(options, kind, words):
    Path("half/train").mkdir(parents=True)
    good = ["--data", "shapes", "--model", "resnet8", "--memory", ""]
    result = new("x.yaml", *good, *options)
    assert isinstance(result.exception, kind)
    assert words in str(result.exception)
    assert os.listdir() == ["half"]


def test_without_an_answer_it_says_which_option_to_give():
    result = new("--data", "shapes", "--memory", "")
    assert isinstance(result.exception, UsageError)
    assert str(result.exception).startswith("--model is not given")
    assert not os.listdir()


@pytest.mark.skipif(sys.platform == "win32", reason="links")
def test_an_existing_file_is_refused_before_any_question():
    Path("my_recipe.yaml").write_text("mine")
    Path("link.yaml").symlink_to("nowhere")
    for arguments in ([], ["link.yaml"]):
        result = new(*arguments, answers="\n\n\n")
        assert isinstance(result.exception, BlnError)
        assert "exists; nothing was written" in str(result.exception)
        assert "Data" not in result.stderr
    assert Path("my_recipe.yaml").read_text() == "mine"
    assert not Path("nowhere").exists()
    assert isinstance(new("no/folder.yaml", answers="\n\n\n").exception, BlnError)
