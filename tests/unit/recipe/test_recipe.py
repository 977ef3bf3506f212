"""Recipes: what is refused, with which words and at which line; overrides; the round trip."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bln_train.errors import EXIT_USAGE, RecipeError
from bln_train.recipe.load import (
    dump_recipe,
    load_any_recipe,
    load_recipe,
    parse_any_recipe,
    parse_recipe,
    shipped_recipes,
)
from bln_train.recipe.norms import NORM_NAMES, BatchlessNormSection, BatchNormSection
from bln_train.recipe.paper_norm import PaperNormSection
from bln_train.recipe.recipe import Recipe
from bln_train.recipe.sections import AdamSection

VALID = {
    "data": "data: {name: shapes}",
    "model": "model: {name: resnet8}",
    "norm": "norm: {name: batchless}",
    "train": "train: {epochs: 3, micro_batch_size: 4}",
    "optimizer": "optimizer: {name: sgd, lr: 0.1}",
}


def text_of(**changed: str) -> str:
    """A valid recipe with sections replaced or added; in order, a line per section unless the text has more."""
    return "\n".join({**VALID, **changed}.values()) + "\n"


def parse(text: str, *overrides: str) -> Recipe:
    return parse_recipe(text, origin="r.yaml", overrides=overrides)


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse(text, *overrides)
    assert caught.value.exit_code == EXIT_USAGE
    assert "bln-train check r.yaml" in caught.value.hint
    return caught.value.problem


TRAIN = "train:\n  epochs: 3\n  micro_batch_size: 4\n"
BAD_RECIPES = {
    "unknown key": (text_of(train=TRAIN + "  epoch: 3"), ["r.yaml:7: train.epoch: no such setting", "`epochs`"]),
    "unknown section": (text_of(trian="trian: 1"), ["r.yaml:6: trian: no such section; did you mean `train`?"]),
    "key of a section": (text_of(lr="lr: 0.1"), ["r.yaml:6: lr: no such section; did you mean optimizer.lr?"]),
    "key of another name": (
        text_of(optimizer="optimizer: {name: adamw, lr: 0.1, momentum: 0.9}"),
        ["r.yaml:5: optimizer.momentum: `adamw` has no such setting; it belongs to sgd; known: name, lr,"],
    ),
    "key of another norm": (text_of(norm="norm:\n  name: none\n  eps: 1"), ["r.yaml:5: norm.eps: `none` has no such"]),
    "unknown norm": (
        text_of(norm="norm: {name: batchles}"),
        ["r.yaml:3: norm.name: unknown norm 'batchles'; did you mean `batchless`?", "layer, none"],
    ),
    "norm without name": (text_of(norm="norm: {eps: 1}"), ["r.yaml:3: norm.name: is missing; known: batch"]),
    "norm that is no section": (text_of(norm="norm: batch"), ["r.yaml:3: norm: expected a section (name: batch|"]),
    "unknown model": (text_of(model="model: {name: resnet21}"), ["r.yaml:2: model.name: unknown model 'resnet21'"]),
    "unknown data": (
        text_of(data="data: {name: cifar}"),
        ["r.yaml:1: data.name: expected `cifar10` or", "did you mean"],
    ),
    "missing key": (
        text_of(train="train:\n  epochs: 3"),
        ["r.yaml:4: train.micro_batch_size: is missing; expected a whole"],
    ),
    "missing section": ("model: {name: resnet8}", ["r.yaml:1: data: is missing", "r.yaml:1: train: is missing"]),
    "empty section": (text_of(runtime="runtime:"), ["r.yaml:6: runtime: expected a section", "got nothing (null)"]),
    "text for number": (
        text_of(train=TRAIN.replace("3", "many")),
        ["r.yaml:5: train.epochs: expected a whole number, at least 1, got the text 'many'"],
    ),
    "fraction for integer": (text_of(train=TRAIN.replace("3", "2.5")), ["r.yaml:5: train.epochs:", "got 2.5"]),
    "bool for integer": (text_of(train=TRAIN.replace("3", "yes")), ["r.yaml:5: train.epochs:", "got true"]),
    "quoted number": (text_of(train=TRAIN.replace("3", '"3"')), ["r.yaml:5: train.epochs:", "write 3 without quotes"]),
    "bool for text": (
        text_of(model="model: {name: no}"),
        ["r.yaml:2: model.name: expected text, got false", "`no` as false"],
    ),
    "list too short": (
        text_of(optimizer="optimizer: {name: adam, lr: 0.1, betas: [0.9]}"),
        ["r.yaml:5: optimizer.betas: expected a list of 2, each a number, at least 0 and below 1, got a list of 1"],
    ),
    "wrong item": (
        text_of(schedule="schedule:\n  name: step\n  milestones:\n  - 1\n  - true"),
        ["r.yaml:10: schedule.milestones[1]: expected a number, above 0, got true"],
    ),
    "milestones that fall": (
        text_of(schedule="schedule: {name: step, milestones: [2, 1]}"),
        ["r.yaml:6: schedule.milestones: name at least one epoch, in rising order"],
    ),
    "1e-3": (
        text_of(optimizer="optimizer: {name: sgd, lr: 1e-3}"),
        ["r.yaml:5: optimizer.lr: expected a number, above 0", "YAML reads `1e-3` as text; write 1.0e-3"],
    ),
    "1e3 epochs": (text_of(train=TRAIN.replace("3", "1e3")), ["r.yaml:5: train.epochs:", "as text; write 1000"]),
    "quoted 1e-3": (text_of(optimizer='optimizer: {name: sgd, lr: "1e-3"}'), ["write 1.0e-3 without quotes"]),
    "octal": (
        text_of(train=TRAIN.replace("3", "010")),
        ["r.yaml:5: train.epochs: `010` is not a finite, plain decimal"],
    ),
    "base 60": (text_of(train=TRAIN.replace("3", "1:30")), ["r.yaml:5: train.epochs: `1:30` is not"]),
    "micro-batch 0": (
        text_of(train=TRAIN.replace("4", "0")),
        ["r.yaml:6: train.micro_batch_size:", "at least 1, or `auto`, got 0"],
    ),
    "above the effective batch": (
        text_of(train=TRAIN + "  effective_batch_size: 2"),
        ["r.yaml:6: train.micro_batch_size: 4 is above effective_batch_size 2"],
    ),
    "negative rate": (
        text_of(optimizer="optimizer: {name: sgd, lr: -0.1}"),
        ["r.yaml:5: optimizer.lr:", "above 0, got -0.1"],
    ),
    "nan": (text_of(optimizer="optimizer: {name: sgd, lr: .nan}"), ["r.yaml:5: optimizer.lr: `.nan` is not a finite"]),
    "inf": (text_of(optimizer="optimizer: {name: sgd, lr: .inf}"), ["r.yaml:5: optimizer.lr: `.inf` is not a finite"]),
    "overflow": (
        text_of(optimizer="optimizer: {name: sgd, lr: 1.0e+999}"),
        ["r.yaml:5: optimizer.lr: `1.0e+999` is not"],
    ),
    "class count": (
        text_of(model="model:\n  name: resnet8\n  num_classes: 100"),
        ["r.yaml:4: model.num_classes: 100, but shapes has 10 classes"],
    ),
    "fp16 on CPU": (
        text_of(train=TRAIN + "  precision: fp16", runtime="runtime: {device: cpu}"),
        ["r.yaml:7: train.precision: fp16 needs CUDA"],
    ),
    "warm-up too long": (
        text_of(schedule="schedule:\n  name: cosine\n  warmup_epochs: 3"),
        ["r.yaml:8: schedule.warmup_epochs: 3.0 leaves nothing of 3 epochs"],
    ),
    "unknown device": (text_of(runtime="runtime: {device: cuda:²}"), ["r.yaml:6: runtime.device: is `auto`, `cpu`"]),
    "shortcut without choice": (
        text_of(model="model: {name: paper_cnn, shortcut: B}"),
        ["r.yaml:2: model.shortcut: only the CIFAR ResNets"],
    ),
    "of the published layer": (
        text_of(norm="norm:\n  name: batchless\n  nll_weight: 2"),
        [
            "r.yaml:5: norm.nll_weight: `batchless` has no such setting; it belongs to batchless-paper, batchless-paper-abs"
        ],
    ),
    "of the product's layer": (
        text_of(norm="norm:\n  name: batchless-paper\n  correction_rate: 0.1"),
        [
            "r.yaml:5: norm.correction_rate: `batchless-paper` has no such setting; it belongs to batchless, batchless-plain"
        ],
    ),
    "ignored by frozen statistics": (
        text_of(norm="norm:\n  name: batch-frozen\n  momentum: 0.2"),
        ["r.yaml:5: norm.momentum: batch-frozen does not use it"],
    ),
    "ignored by fixed images": (
        text_of(data="data: {name: shapes, image_size: 64}"),
        ["r.yaml:1: data.image_size: shapes"],
    ),
    "duplicate key": (
        text_of(train=TRAIN + "  epochs: 5"),
        ["r.yaml:7: train.epochs: written twice, first at r.yaml:5"],
    ),
    "duplicate section": (text_of(again="data: {name: shapes}"), ["r.yaml:6: data: written twice, first at r.yaml:1"]),
    "anchor": (text_of(data="data: &d {name: shapes}"), ["r.yaml:1: anchors and aliases", "write the value again"]),
    "alias": (text_of(runtime="runtime: *d"), ["r.yaml:6: anchors and aliases"]),
    "merge key": (text_of(train=TRAIN + "  <<: {epochs: 3}"), ["r.yaml:7: train: merge keys"]),
    "number as key": (text_of(train=TRAIN + "  5: 3"), ["r.yaml:7: train: a key must be text, got `5`"]),
    "list as key": (text_of(train=TRAIN + "  [a]: 3"), ["r.yaml:7: train: a key must be text, got `seq`"]),
    "tag": (text_of(x="x: !!python/object/apply:os.system [ls]"), ["r.yaml:6: the tag", "os.system is refused"]),
    "date": (text_of(data="data: {name: folder, root: 2024-01-01}"), ["r.yaml:1: data.root: YAML reads `2024-01-01`"]),
    "escaped control character": (
        text_of(data='data: {name: folder, root: "a\\0"}'),
        ["r.yaml:1: data.root: control character '\\x00'"],
    ),
    "control character": (text_of() + "# \x1b[31m", ["r.yaml:6: control character '\\x1b'"]),
    "tab": ("data:\n\tname: shapes\n", ["r.yaml:2: tabs cannot indent YAML"]),
    "tab after spaces": ("data:\n  name: shapes\n \tdownload: true\n", ["r.yaml:3: tabs cannot indent YAML"]),
    "no YAML": ("data: [1,\n", ["r.yaml:2: not valid YAML:"]),
    "escape above Unicode": ('data: "\\UFFFFFFFF"', ["r.yaml:1: not valid YAML:"]),
    "empty": ("", ["r.yaml:1: the recipe is empty"]),
    "only a comment": ("# soon\n", ["r.yaml:1: the recipe is empty"]),
    "list at top level": ("- data\n", ["r.yaml:1: expected sections (data, model,", "got a list of 1"]),
    "scalar at top level": ("data", ["r.yaml:1: expected sections", "got the text 'data'"]),
    "two documents": (text_of() + "---\na: 1\n", ["r.yaml:6: a second document"]),
    "deep nesting": ("[" * 100_000, ["r.yaml:1: nested deeper than 10 levels"]),
    "deep blocks": ("- " * 5_000, ["r.yaml:1: nested deeper than 10 levels"]),
}


@pytest.mark.parametrize(("text", "fragments"), BAD_RECIPES.values(), ids=BAD_RECIPES)
def test_bad_recipe_is_refused_at_its_line(text: str, fragments: list[str]) -> None:
    problem = refusal(text)
    for fragment in fragments:
        assert fragment in problem


def test_problems_of_all_sections_come_at_once_by_line_each_setting_once() -> None:
    text = text_of(
        data="data: {name: shapes, rot: x}",
        train="train:\n  epochs: 0\n  micro_batch_size: true\n  eval_batch_size: 0\n  epochs: 1",
        optimizer="optimizer: {name: adamw, lr: 1e-3, betas: [2, 3]}",
        schedule="schedule: {name: cosin}",
    )
    problems = refusal(text, "model.name=x", "train.seed=-1").split("\n")
    assert [line.split(": ")[:2] for line in problems[:8]] == [
        ["r.yaml:1", "data.rot"],
        ["r.yaml:5", "train.epochs"],
        ["r.yaml:6", "train.micro_batch_size"],
        ["r.yaml:7", "train.eval_batch_size"],
        ["r.yaml:8", "train.epochs"],
        ["r.yaml:9", "optimizer.lr"],
        ["r.yaml:9", "optimizer.betas[0]"],
        ["r.yaml:9", "optimizer.betas[1]"],
    ]
    assert [line.split(": ")[0] for line in problems[8:]] == ["r.yaml:10", "--set model.name=x", "--set train.seed=-1"]


def test_a_flood_of_problems_is_cut() -> None:
    problems = refusal("".join(f"key{i}: 1\n" for i in range(500))).split("\n")
    assert len(problems) == 201
    assert "more problems" in problems[-1]


BAD_OVERRIDES = {
    "train.epochs": "--set train.epochs: write it as section.key=value",
    "=3": "--set =3: write it as section.key=value",
    "train..epochs=3": "--set train..epochs=3: write it as section.key=value",
    "train.seed=": "--set train.seed=: has no value; write null for none",
    "train.seed=#3": "--set train.seed=#3: has no value",
    "train.epochs.x=3": "--set train.epochs.x=3: train.epochs is no section",
    "train.epoch=3": "--set train.epoch=3: no such setting; did you mean `epochs`?",
    "train.epochs=0": "--set train.epochs=0: expected a whole number, at least 1, got 0",
    "optimizer.lr=1e-3": "--set optimizer.lr=1e-3: expected a number, above 0, got the text '1e-3'; YAML reads",
    "optimizer.lr=.nan": "--set optimizer.lr=.nan: `.nan` is not a finite",
    "optimizer.name=adamm": "--set optimizer.name=adamm: unknown optimizer 'adamm'; did you mean `adam`?",
    "norm=batchles": "--set norm=batchles: norm.name: unknown norm 'batchles'",
    "norm={name: batch, eps: 1}": "--set norm={name: batch, eps: 1}: norm.eps: `batch` has no such setting",
    "norm={name: batch, name: batch}": "norm.name: written twice",
    "train=5": "--set train=5: expected a section (epochs, max_steps",
    "norm=[1": "--set norm=[1: not valid YAML",
    "norm=*a": "--set norm=*a: anchors and aliases",
    "data.root=\x1b": "--set data.root=\\x1b: control character",
    "train.micro_batch_size=200": "--set train.micro_batch_size=200: 200 is above effective_batch_size 128",
}


@pytest.mark.parametrize(("override", "fragment"), BAD_OVERRIDES.items())
def test_bad_override_is_refused_by_its_own_words(override: str, fragment: str) -> None:
    assert fragment in refusal(text_of(), override)


def test_overrides_change_add_and_win_in_order() -> None:
    recipe = parse(text_of(), "train.epochs=5", "train.epochs=7", "data.augment.flip=false", "runtime.device=cpu")
    assert (recipe.train.epochs, recipe.data.augment.flip, recipe.runtime.device) == (7, False, "cpu")
    assert parse(text_of(optimizer="optimizer: {name: sgd, lr: 1e-3}"), "optimizer.lr=1.0e-3").optimizer.lr == 0.001
    assert parse(text_of(runtime="runtime:"), "runtime.device=cpu").runtime.device == "cpu"
    assert parse(text_of(), "train.max_steps=null").train.max_steps is None


def test_a_bare_name_replaces_the_section_and_dot_name_keeps_it() -> None:
    text = text_of(norm="norm: {name: batchless, eps: 1.0e-3}")
    assert parse(text, "norm=batch").norm == BatchNormSection(name="batch")
    kept = parse(text, "norm.name=batchless-paper").norm
    assert isinstance(kept, PaperNormSection)
    assert kept.eps == 0.001
    assert "r.yaml:3: norm.eps: `batch` has no such setting; it belongs to batchless" in refusal(
        text, "norm.name=batch"
    )
    assert parse(text, "norm=group", "norm.num_groups=4").norm.name == "group"
    assert isinstance(parse(text, "optimizer.name=adam").optimizer, AdamSection)


@pytest.mark.parametrize(("name", "parametrization"), [("", "log"), ("-abs", "abs"), ("-inv", "inv")])
def test_paper_presets_are_filled_in(name: str, parametrization: str) -> None:
    norm = parse(text_of(), f"norm=batchless-paper{name}").norm
    assert isinstance(norm, PaperNormSection)
    assert (norm.statistics_rate, norm.parametrization, norm.eps) == (None, parametrization, 1e-5)
    natural = parse(text_of()).norm
    assert isinstance(natural, BatchlessNormSection)
    assert (natural.statistics_rate, natural.correction_rate, natural.probe_images) == (0.1, 0.1, "auto")
    theirs = {"parametrization", "share", "nll_weight", "nll_reduction", "gauge"}
    assert set(norm.model_dump()) >= theirs
    assert not theirs & set(natural.model_dump())


def test_settings_of_a_norm_never_change_its_groups() -> None:
    """Once every setting of the likelihood in a recipe meant a run of before there were groups, and took them away."""
    written = parse(text_of()).norm.model_dump(exclude={"channel_groups"}, mode="json")
    assert (
        parse(text_of(norm=f"norm: {yaml.safe_dump(written, default_flow_style=True, width=10_000)}")).channel_groups
        == 8
    )


def test_settings_without_an_effect_are_refused() -> None:
    found = refusal(text_of(), "norm={name: batchless-plain, correction_parts: 2, correction_rate: 0.0}")
    assert "there is no correction with correction_rate 0" in found
    found = refusal(text_of(), "norm={name: batchless, recompute: false, fold: false}")
    assert "recompute: norms that are not folded keep their input anyway" in found


ROUND_TRIPS = [
    *((f"norm={name}",) for name in NORM_NAMES),
    ("norm={name: batchless-paper, nll_weight: 1.0e-7, nll_reduction: sum, statistics_rate: 3}",),
    ("optimizer={name: adam, lr: 1.0e-05, betas: [0, 0.95], clip_norm: null}",),
    ("optimizer={name: adamw, lr: 1.0e+20, clip_norm: 3}",),
    ("optimizer={name: sgd, lr: 1, nesterov: true, weight_decay: 0}",),
    ("schedule={name: step, milestones: [1, 2.5]}",),
    ("schedule={name: cosine, warmup_epochs: 0.5, final_fraction: 0.1}",),
    ("schedule=constant",),
    *((f"data={{name: folder, root: {root}}}",) for root in ('"2024-01-01"', '"1e-3"', '"="', "'é: #\u2028'", '"no"')),
    ("model={name: wrn16_4, weight_standardization: false}", "train.eval_batch_size=3", "runtime.device=cuda:1"),
]


@pytest.mark.parametrize("overrides", ROUND_TRIPS, ids=lambda overrides: overrides[0])
def test_a_dumped_recipe_loads_back_equal(overrides: tuple[str, ...]) -> None:
    recipe = parse(text_of(), *overrides)
    assert parse(dump_recipe(recipe)) == recipe
    assert recipe.with_norm("layer").norm.name == "layer"


def test_every_shipped_recipe_loads_by_name_and_round_trips() -> None:
    for name, path in shipped_recipes().items():
        recipe = load_any_recipe(name)
        assert recipe == load_any_recipe(path)
        assert parse_any_recipe(dump_recipe(recipe), origin="r.yaml") == recipe


def load_refusal(source: str | Path) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(source)
    assert caught.value.exit_code == EXIT_USAGE
    assert "bln-train recipes list" in caught.value.hint
    return caught.value.problem


def test_a_file_loads_with_overrides_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + text_of().encode())
    assert load_recipe(str(path), ["train.epochs=9"]).train.epochs == 9
    path.write_text(text_of(train="train: {}"))
    with pytest.raises(RecipeError, match=r"r\.yaml:4: train\.epochs: is missing"):
        load_recipe(path)


def test_a_missing_file_names_the_near_one(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text_of())
    assert f"did you mean {tmp_path / 'mine.yaml'}?" in load_refusal(tmp_path / "mien.yaml")
    assert f"did you mean {tmp_path / 'mine.yaml'}?" in load_refusal(str(tmp_path / "mine"))
    assert "no such file or shipped recipe" in load_refusal("no-such-folder/zzz")


def test_a_misspelt_shipped_name_is_recognised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in shipped_recipes():
        assert f"did you mean {name}?" in load_refusal(f"{name}x")


def test_a_directory_lists_its_recipes(tmp_path: Path) -> None:
    (tmp_path / "mine.yml").write_text("")
    assert load_refusal(tmp_path) == f"{tmp_path}: is a directory; it holds {tmp_path / 'mine.yml'}"


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"data:\n  name: \xff\n")
    assert f"{path}:2: byte 0xff at position 14 is not UTF-8" in load_refusal(path)
    path.write_bytes(b"#" * (2**20 + 1))
    assert ":1: goes on beyond 1 MiB here" in load_refusal(path)
    assert "cannot be read" in load_refusal(path / "inside")
    assert "cannot be read" in load_refusal("a\0b")
    assert "cannot be read" in load_refusal("a" * 5000)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text_of())
    path.chmod(0)
    assert "cannot be read: Permission denied" in load_refusal(path)


def test_reading_recipes_imports_no_torch() -> None:
    code = "import sys, bln_train.recipe.load as r; r.shipped_recipes(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
