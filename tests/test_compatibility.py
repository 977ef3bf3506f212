"""What earlier versions wrote can still be read."""

import pytest

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
