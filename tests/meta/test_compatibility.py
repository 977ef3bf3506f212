"""What earlier versions wrote can still be read."""

import pytest
import yaml
from helpers import tiny_recipe

from bln_train.build.trained_run import evaluate_checkpoint
from bln_train.errors import RecipeError
from bln_train.experiments.run import run
from bln_train.export.export import export_run, load_merged
from bln_train.export.migrate import migrate
from bln_train.recipe.load import dump_recipe, load_recipe
from bln_train.report.source import read_sources
from bln_train.runs.checkpoint import load_checkpoint, save_checkpoint
from bln_train.runs.folder import RECIPE, RunFolder


@pytest.mark.parametrize(
    ("model", "norm"),
    [("resnet8", "batch"), ("resnet8, init: trained.pt", "batchless"), ("resnet8, init: trained.pt", "batch-frozen")],
)
def test_recipes_that_earlier_versions_wrote_out_are_read(tmp_path, model, norm):
    """Their run folders have init_images: 128, then the default, also where nothing used it."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"data: {{name: shapes}}\nmodel: {{name: {model}}}\nnorm: {{name: {norm}, init_images: 128}}\n"
        "train: {epochs: 1, micro_batch_size: 1}\noptimizer: {name: sgd, lr: 0.1}\nschedule: {name: cosine}\n"
    )
    assert load_recipe(str(path)).num_init_images == 0


def test_runs_of_before_there_were_groups_have_none(tmp_path):
    """Their recipes say all that there was to be said of the norm: they resume as the network that they were."""
    recipe = load_recipe("quickstart")
    assert recipe.channel_groups == 8
    written = recipe.model_dump(mode="json")
    del written["norm"]["channel_groups"]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(written))
    assert load_recipe(str(path)).channel_groups == 0


@pytest.mark.parametrize("norm", ["batchless", "batchless-plain", "batchless-paper"])
def test_recipes_with_a_probe_gain_of_one_are_read(tmp_path, norm):
    """`norm.probe_gain` is gone: 1, which runs wrote out, is what happens; tests/unit/recipe/test_recipe.py has what of another."""
    recipe = load_recipe("quickstart", [f"norm={norm}"])
    written = recipe.model_dump(mode="json")
    written["norm"]["probe_gain"] = 1.0
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(written))
    assert load_recipe(str(path)) == recipe


def test_a_network_that_was_trained_with_another_probe_gain_is_used_and_not_trained_further(tmp_path):
    """Its statistics are what they are: it is evaluated, exported, migrated and reported of. Going on would be another training."""
    recipe, folder = tiny_recipe(train__max_steps=1, train__precision="fp32"), RunFolder(tmp_path / "run")
    expected = run(recipe, folder, name="run")
    text = dump_recipe(recipe).replace("  probe_images:", "  probe_gain: 0.25\n  probe_images:")
    assert "  probe_gain: 0.25\n" in text
    old = RunFolder(tmp_path / "old")
    old.path.mkdir()
    for name in ("environment.json", "metrics.jsonl", "summary.json"):
        (old.path / name).write_bytes((folder.path / name).read_bytes())
    (old.path / RECIPE).write_text(text)
    save_checkpoint(old.checkpoint, {**load_checkpoint(folder.checkpoint), "recipe": text})
    assert evaluate_checkpoint(old.path)[1].loss == pytest.approx(expected["test_loss"], rel=1e-6)
    exported = tmp_path / "old.safetensors"
    export_run(old.path, exported)
    load_merged(exported)
    migrate(str(old.path), tmp_path / "old.pt")
    assert read_sources([old.path])
    with pytest.raises(RecipeError, match=r"norm\.probe_gain: is no setting any more"):
        old.check_usable(recipe, resume=True)
