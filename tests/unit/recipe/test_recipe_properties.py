"""Whatever a recipe file holds: a Recipe, or one RecipeError whose problems all have a place."""

from __future__ import annotations

import codecs
import contextlib
import copy
import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bln_train.cli import app as cli
from bln_train.errors import EXIT_USAGE, RecipeError
from bln_train.recipe.load import MAX_BYTES, dump_recipe, load_recipe, parse_any_recipe, shipped_recipes
from bln_train.recipe.recipe import Recipe
from bln_train.recipe.synthetic import SyntheticRecipe

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
SYNTHETIC = """\
experiment: synthetic
num_samples: 64
batch_sizes: [1, 8]
report_after: [8, 64]
streams:
  - {name: gaussian, mean: 3.0, std: 2.0}
  - {name: jump, mean: 0.0, std: 1.0, mean_after: 5.0, at: 32}
estimators:
  - {name: natural, rates: [0.1]}
  - {name: sgd, parametrizations: [log, inv], rates: [0.1]}
  - {name: exact}
runtime: {device: cpu}
"""
MAX_EXAMPLES = int(os.environ.get("BLN_EXAMPLES", "300"))
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


def read(text: str, overrides: tuple[str, ...] = ()) -> Recipe | SyntheticRecipe | None:
    try:
        recipe = parse_any_recipe(text, origin="r.yaml", overrides=overrides)
    except RecipeError as error:
        check_problems(error)
        return None
    assert parse_any_recipe(dump_recipe(recipe), origin="dump.yaml") == recipe
    return recipe


def check_problems(error: RecipeError) -> None:
    assert error.exit_code == EXIT_USAGE
    assert error.problems
    for place, what in error.problems:
        assert re.match(r"r\.yaml:[1-9]\d*(: |$)|--set ", place), place
        assert what
        assert (place + what).isprintable()


def test_the_text_that_is_mutated_is_valid() -> None:
    assert isinstance(read(VALID), Recipe)
    assert isinstance(read(SYNTHETIC), SyntheticRecipe)


@fast
@given(st.text(max_size=200))
def test_arbitrary_text(text: str) -> None:
    read(text)


@fast
@given(st.text(alphabet=st.sampled_from("abc01.:-[]{}&*!|>?#%@'\"\\ \n\t,~<=\x85\u2028"), max_size=60))
def test_text_of_yaml_signs(text: str) -> None:
    read(text)


@fast
@given(st.sampled_from((VALID, SYNTHETIC)), st.lists(edits, max_size=3))
def test_mutated_recipe(text: str, changes: list[tuple[int, int, str]]) -> None:
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


# Whole files through the program's own error boundary


def places(data: Any, keys: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Every place in nested data, the outermost first."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [keys, *(place for key, value in items for place in places(value, (*keys, key)))]


def mutate(data: Any, where: int, how: str, new: Any) -> Any:
    """Change one place of a recipe's data: the value, its type or nesting, the key's name or presence."""
    keys = places(data)[where % len(places(data))]
    if not keys:
        return new if how == "replace" else data
    parent = data
    for key in keys[:-1]:
        parent = parent[key]
    last, value = keys[-1], parent[keys[-1]]
    if how == "replace":
        parent[last] = new
    elif how == "delete":
        del parent[last]
    elif how == "rename" and isinstance(parent, dict):
        parent[f"{last}{new}" if isinstance(new, str) else f"{last}s"] = parent.pop(last)
    elif how == "as text":
        parent[last] = str(value)
    elif how == "in a list":
        parent[last] = [value] * 3
    elif how == "deep":
        for _ in range(12):
            value = {"a": value}
        parent[last] = value
    elif how == "moved up":
        data[str(last)] = value
    elif how == "huge":
        parent[last] = 10**30 if isinstance(value, int) else "x" * 5000
    elif how == "many":
        parent[last] = list(range(200))
    return data


DATA = (yaml.safe_load(VALID), yaml.safe_load(SYNTHETIC))
HOW = ("replace", "delete", "rename", "as text", "in a list", "deep", "moved up", "huge", "many")
mutations = st.lists(st.tuples(st.integers(0, 60), st.sampled_from(HOW), nested), max_size=3)
ENCODINGS = ("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "latin-1", "cp037")
raw = st.sampled_from((b"\x00", b"\xff", b"\xc3", b"\r", b"\x1b[31m", b"\xed\xa0\x80", codecs.BOM_UTF8, b"\x85", b"\t"))


@st.composite
def files(draw: st.DrawFn) -> bytes:
    data = copy.deepcopy(draw(st.sampled_from(DATA)))
    for where, how, new in draw(mutations):
        data = mutate(data, where, how, new) if isinstance(data, dict) else data
    text = yaml.safe_dump(data, default_flow_style=draw(st.sampled_from((None, True, False))), allow_unicode=True)
    for start, length, new in draw(st.lists(edits, max_size=2)):
        text = text[:start] + new + text[start + length :]
    content = text.encode(draw(st.sampled_from(ENCODINGS)), errors="replace")
    for place, bad in draw(st.lists(st.tuples(st.integers(0, 400), raw), max_size=1)):
        content = content[:place] + bad + content[place:]
    content = content[: draw(st.none() | st.integers(0, 400))]
    return content * draw(st.sampled_from((1, 1, 1, 1, 1, 1, 2, 10)))


def check_file(path: Path, *overrides: str) -> tuple[int, str]:
    """Exit code and stderr of `bln-train check`, in this process, through `cli.main`."""
    talk, result = io.StringIO(), io.StringIO()
    options = [part for override in overrides for part in ("--set", override)]
    with (
        mock.patch.object(sys, "argv", ["bln-train", "check", str(path), *options]),
        contextlib.redirect_stderr(talk),
        contextlib.redirect_stdout(result),
        pytest.raises(SystemExit) as ended,
    ):
        cli.main()
    return int(ended.value.code or 0), talk.getvalue()


def check_refusal(code: int, talk: str, path: Path) -> None:
    """Accepted, or exit code 2 with a line number in the first line and no traceback anywhere."""
    assert code in (0, EXIT_USAGE), talk
    assert "Traceback" not in talk
    assert "bug in bln-train" not in talk
    if code:
        assert re.match(rf"error: {re.escape(str(path))}:[1-9]\d*: ", talk), talk


@settings(fast, max_examples=MAX_EXAMPLES)
@given(files())
def test_any_file_is_accepted_or_refused_with_a_line(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    """Mutated keys, types, nesting, encodings and sizes of both kinds of recipe: never a traceback, always 2 with a line."""
    path = tmp_path_factory.getbasetemp() / "r.yaml"
    path.write_bytes(content)
    check_refusal(*check_file(path), path)


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_are_accepted_by_the_same_check(name: str) -> None:
    """The refusals are not empty: what is right is accepted."""
    assert check_file(shipped_recipes()[name]) == (0, "")


BOMBS = {
    "empty": (b"", 1, "empty"),
    "many laughs": (b"a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n", 1, "anchors and aliases"),
    "deep": (b"data: " + b"[" * 10**6, 1, "nested deeper"),
    "many values": (b"data:\n" + b"- 1\n" * 10**5, 4999, "more than 5000"),
    "many keys": (b"".join(b"k%d: 1\n" % n for n in range(80_000)), 2500, "more than 5000"),
    "too long": (b"#\n" * (MAX_BYTES // 2 + 1), MAX_BYTES // 2 + 1, "beyond 1 MiB"),
    "long number": (b"train:\n  epochs: " + b"9" * 10**5, 2, "10^18"),
    "long key": (b"a: 1\n" + b"k" * 1000 + b": 1\n", 1, "no such section"),
    "utf-16": (VALID.encode("utf-16"), 1, "UTF-16"),
    "latin-1": ("data:\n  root: Bücher\n".encode("latin-1"), 2, "0xfc"),
    "nul": (b"data:\n  name: sha\0pes\n", 2, "control character"),
    "tag": (b"data:\n  name: !!python/object/apply:os.system ['false']\n", 2, "tag"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_quickly(tmp_path: Path, name: str) -> None:
    """What is too deep, too long or too much is refused at its line, in a moment and not in minutes."""
    content, line, message = BOMBS[name]
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    began = time.process_time()
    code, talk = check_file(path)
    assert time.process_time() - began < 3
    check_refusal(code, talk, path)
    assert code == EXIT_USAGE
    assert f"{path}:{line}: " in talk
    assert message in talk
    assert len(talk) < 60_000


def test_the_real_program_refuses_alike(tmp_path: Path) -> None:
    """A process of its own gives the code and the line that this one gives."""
    path = tmp_path / "r.yaml"
    path.write_bytes(BOMBS["tag"][0])
    command = [sys.executable, "-m", "bln_train", "run", str(path)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, cwd=Path(cli.__file__).parents[2]
    )
    check_refusal(done.returncode, done.stderr, path)
    assert done.returncode == EXIT_USAGE
    assert done.stdout == ""
