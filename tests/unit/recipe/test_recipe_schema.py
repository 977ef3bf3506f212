"""The schema for editors: current, complete, as strict as the loader about names, and found from every recipe."""

import json
import sys
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
import yaml
from jsonschema import Draft7Validator

from bln_train.cli import app as cli
from bln_train.recipe.editor_schema import MODELINE, SCHEMA_NAME, editor_schema, schema_file
from bln_train.recipe.load import dump_recipe, load_any_recipe, shipped_recipes
from bln_train.recipe.norms import NORM_NAMES
from bln_train.recipe.sections import Section

SCHEMA = editor_schema()
VALIDATOR = Draft7Validator(SCHEMA)
SETTINGS = {
    f"{section}.{key}": setting
    for section, content in SCHEMA["definitions"].items()
    for key, setting in content["properties"].items()
}
# Of what a number is; a rate, share or factor is a number without unit.
UNITS = ("image", "pixel", "epoch", "step", "second", "sample", "thread", "number", "groups", "checkpoints", "units", "passes",
         "rate", "share", "fraction", "part", "factor", "probability", "bound", "weights per gradient", "side")  # fmt: skip

UNBOUNDED = ("mean", "mean_after", "init_mean")


def sections(kind=Section):
    """Every section of both kinds of recipe."""
    for section in kind.__subclasses__():
        yield section
        yield from sections(section)


def problems(data):
    return [f"{'.'.join(map(str, error.path))}: {error.message}" for error in VALIDATOR.iter_errors(data)]


def quickstart(**changes):
    data = yaml.safe_load(shipped_recipes()["quickstart"].read_text())
    for path, value in changes.items():
        section, _, key = path.partition("__")
        data[section] = {**data.get(section, {}), key: value} if key else value
    return data


def test_the_shipped_schema_is_current():
    Draft7Validator.check_schema(SCHEMA)
    shipped = json.loads(schema_file().read_text(encoding="utf-8"))
    assert shipped == SCHEMA, f"renew it: bln-train recipes schema > recipes/{SCHEMA_NAME}"


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_fit_the_schema_and_lead_to_it(name):
    path = shipped_recipes()[name]
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f"{MODELINE}{SCHEMA_NAME}\n"), f"begin {path.name} with: {MODELINE}{SCHEMA_NAME}"
    assert problems(yaml.safe_load(text)) == []
    assert problems(yaml.safe_load(dump_recipe(load_any_recipe(name)))) == []


@pytest.mark.parametrize("norm", NORM_NAMES)
def test_a_norm_has_the_defaults_that_the_loader_fills_in(norm):
    assert problems(quickstart(norm={"name": norm})) == []
    filled = load_any_recipe("quickstart", [f"norm={norm}"]).norm.model_dump()
    settings = SCHEMA["definitions"][f"norm-{norm}"]["properties"]
    assert {key: setting["default"] for key, setting in settings.items() if key != "name"} | {"name": norm} == filled


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"train__epoch": 3}, "train: Additional properties are not allowed ('epoch' was unexpected)"),
        ({"norm": {"name": "batchless", "momentum": 0.1}}, "norm: Additional properties are not allowed ('momentum'"),
        ({"norm": {"name": "batchles"}}, "norm.name: 'batchles' is not one of ['batchless',"),
        ({"norm": {"share": "layer"}}, "norm: 'name' is a required property"),
        ({"optimiser": {"name": "sgd"}}, "Additional properties are not allowed ('optimiser' was unexpected)"),
        ({"optimizer": {"name": "adam", "lr": 1e-3, "nesterov": True}}, "optimizer: Additional properties are not allowed"),
        ({"model__name": "resnet9"}, "model.name: 'resnet9' is not valid under any of the given schemas"),
        ({"train__epochs": 0}, "train.epochs: 0 is less than the minimum of 1"),
        ({"train__epochs": "3"}, "train.epochs: '3' is not of type 'integer'"),
        ({"train__memory_budget": "4 giga"}, "train.memory_budget: '4 giga' is not valid under any of the given schemas"),
        ({"runtime": {"device": "gpu"}}, "runtime.device: 'gpu' does not match"),
        ({"experiment": "synthetic"}, "'num_samples' is a required property"),
    ],
)  # fmt: skip
def test_what_the_loader_refuses_is_marked(change, fault):
    found = problems(quickstart(**change))
    assert any(fault in problem for problem in found), found


@pytest.mark.parametrize("text", ["4GiB", "800MiB", " 1.5 kb", "512", "7b"])
def test_every_way_to_write_a_size_is_accepted(text):
    assert problems(quickstart(train__memory_budget=text)) == []
    load_any_recipe("quickstart", [f"train.memory_budget='{text}'"])


@pytest.mark.parametrize("name", ["wrn16_4", "torchvision:resnet50", "timm:resnet26d.bt_in1k", "paper_cnn"])
def test_every_kind_of_model_is_accepted(name):
    assert problems(quickstart(model={"name": name})) == []


@pytest.mark.parametrize("section", list(sections()))
def test_every_setting_has_a_docstring(section):
    assert [key for key, field in section.model_fields.items() if not field.description] == []
    assert section.__doc__ or section.__name__.startswith("_")


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_says_what_it_is_its_unit_its_range_and_its_default(name):
    """Descriptions are the docstrings in the code, ranges and defaults come from the types."""
    section, _, key = name.partition(".")
    setting = SETTINGS[name]
    if setting.keys() == {"$ref"}:
        setting = SCHEMA["definitions"][setting["$ref"].rpartition("/")[2]]
    words = setting["description"]
    assert len(words.split()) > 1
    kinds = {one.get("type") for one in setting.get("anyOf", [setting])}
    if kinds & {"integer", "number"}:
        own = words.partition(" A number")[0].partition(" A whole number")[0]
        assert any(unit in own.lower() for unit in UNITS), f"the unit is missing: {words}"
        assert any(word in words for word in ("at least", "above", "at most", "below")) or key in UNBOUNDED, words
    is_section = setting.get("type") == "object" or "allOf" in setting.get("items", {})
    if not is_section and key not in SCHEMA["definitions"][section]["required"]:
        assert "Default: " in words


def printed(monkeypatch, capfd, *arguments):
    monkeypatch.setattr(sys, "argv", ["bln-train", *map(str, arguments)])
    capfd.readouterr()
    with pytest.raises(SystemExit):
        cli.main()
    return capfd.readouterr().out


def schema_of(recipe: Path):
    """What an editor reads for a recipe."""
    address = recipe.read_text(encoding="utf-8").splitlines()[0].removeprefix(MODELINE)
    url = urlparse(address)
    return Path(unquote(url.path)) if url.scheme == "file" else recipe.parent / address


def test_the_line_for_editors_leads_to_the_schema_from_wherever_a_recipe_lands(monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert json.loads(printed(monkeypatch, capfd, "recipes", "schema")) == SCHEMA
    assert printed(monkeypatch, capfd, "recipes", "copy", "quickstart") == "quickstart.yaml\n"
    Path("shown.yaml").write_text(printed(monkeypatch, capfd, "recipes", "show", "quickstart"))
    for recipe in (Path("quickstart.yaml"), Path("shown.yaml"), shipped_recipes()["quickstart"]):
        assert json.loads(schema_of(recipe).read_text()) == SCHEMA
        assert load_any_recipe(recipe) == load_any_recipe("quickstart")
