"""Whatever a recipe file holds: a Recipe, or one RecipeError whose problems all have a place."""

from __future__ import annotations

import re

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bln_train.errors import EXIT_USAGE, RecipeError
from bln_train.recipe import Recipe
from bln_train.recipe_file import dump_recipe, load_recipe, parse_recipe

VALID = """\
data: {name: shapes, augment: {flip: true}}
model:
  name: resnet8
norm:
  name: batchless
  eps: 1.0e-5
train:
  epochs: 3
  micro_batch_size: 4
  eval_batch_size: auto
optimizer: {name: adamw, lr: 0.1, betas: [0.9, 0.99]}
schedule: {name: step, milestones: [1, 2.5]}
runtime: {device: cpu}
"""
SECTIONS = ("data", "model", "norm", "train", "optimizer", "schedule", "runtime")
NAMES = ("shapes", "folder", "resnet8", "batch", "batch-frozen", "batchless", "group", "none", "sgd", "adam", "step")
KEYS = ("name", "lr", "betas", "milestones", "epochs", "micro_batch_size", "clip_norm", "device", "augment", "momentum")
BITS = (
    *(
        "\t",
        "&a ",
        "*a",
        "<<: ",
        "!!python/object:os.system ",
        "---\n",
        "- ",
        "[",
        "{",
        "? ",
        "1e-3",
        ".nan",
        '"',
        "\n ",
    ),
    *(
        "2024-99-99",
        "0x1f",
        "1:30",
        "yes",
        "null",
        '"\\ud800"',
        '"\\UFFFFFFFF"',
        "%YAML 9.9\n",
        "\x00",
        "\ufeff",
        "9" * 5000,
    ),
)

fast = settings(
    max_examples=250, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from((*NAMES, "auto", "1e-3"))
)
keys = st.one_of(st.sampled_from(SECTIONS + KEYS), st.text(max_size=6), st.integers())
nested = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4))


edits = st.tuples(st.integers(0, len(VALID)), st.integers(0, 12), st.sampled_from(BITS) | st.text(max_size=3))


def read(text: str, overrides: tuple[str, ...] = ()) -> Recipe | None:
    try:
        recipe = parse_recipe(text, origin="r.yaml", overrides=overrides)
    except RecipeError as error:
        check_problems(error)
        return None
    assert parse_recipe(dump_recipe(recipe), origin="dump.yaml") == recipe
    return recipe


def check_problems(error: RecipeError) -> None:
    assert error.exit_code == EXIT_USAGE
    assert error.problems
    for place, what in error.problems:
        assert re.match(r"r\.yaml:[1-9]\d*(: |$)|--set ", place), place
        assert what
        assert (place + what).isprintable()


def test_the_text_that_is_mutated_is_valid() -> None:
    assert read(VALID)


@fast
@given(st.text(max_size=200))
def test_arbitrary_text(text: str) -> None:
    read(text)


@fast
@given(st.text(alphabet=st.sampled_from("abc01.:-[]{}&*!|>?#%@'\"\\ \n\t,~<=\x85\u2028"), max_size=60))
def test_text_of_yaml_signs(text: str) -> None:
    read(text)


@fast
@given(st.lists(edits, max_size=3))
def test_mutated_recipe(changes: list[tuple[int, int, str]]) -> None:
    text = VALID
    for start, length, new in changes:
        text = text[:start] + new + text[start + length :]
    read(text)


@fast
@given(st.dictionaries(st.sampled_from(SECTIONS), nested, max_size=4))
def test_random_data_in_place_of_sections(changed: dict[str, object]) -> None:
    read(yaml.safe_dump({**yaml.safe_load(VALID), **changed}))


@fast
@given(st.sampled_from(SECTIONS), keys, nested)
def test_one_random_setting(section: str, key: object, value: object) -> None:
    data = yaml.safe_load(VALID)
    data[section][key] = value
    read(yaml.safe_dump(data))


@fast
@given(
    st.lists(st.sampled_from(SECTIONS + KEYS) | st.text(max_size=4), max_size=4),
    st.sampled_from((*NAMES, *BITS, "1", "0.5", "{a: {b: 1}}", "[1, 2]")) | st.text(max_size=10),
    st.sampled_from((VALID, "", "[", "norm: batch\ntrain:\n")),
)
def test_random_overrides(path: list[str], value: str, text: str) -> None:
    read(text, (f"{'.'.join(path)}={value}", value, "norm.eps=1.0e-3"))


@settings(fast, max_examples=100)
@given(st.binary(max_size=60))
def test_arbitrary_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=r"r\.yaml:[1-9]"):
        load_recipe(path)


@fast
@given(st.text(max_size=20))
def test_arbitrary_sources(source: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(f"no-such-folder/{source}")
    assert str(caught.value).startswith("no-such-folder")
