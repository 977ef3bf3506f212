"""What earlier versions wrote can still be read."""

import pytest
import yaml

from bln_train.recipe_file import load_recipe


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
    """`norm.probe_gain` is gone: 1, which runs wrote out, is what happens; tests/test_recipe.py has what of another."""
    recipe = load_recipe("quickstart", [f"norm={norm}"])
    written = recipe.model_dump(mode="json")
    written["norm"]["probe_gain"] = 1.0
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(written))
    assert load_recipe(str(path)) == recipe
