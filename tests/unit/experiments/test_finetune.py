"""Fine-tuning from a trained BatchNorm network by the commands alone: migrate, run."""

import json
import re

import pytest
from helpers import tiny_recipe

from bln_train.build.trained_run import evaluate_checkpoint
from bln_train.experiments.run import run
from bln_train.export.migrate import migrate
from bln_train.recipe.load import load_recipe
from bln_train.runs.folder import RunFolder

SMALL = [
    "data={name: shapes, num_train: 40, num_test: 30}",
    "model={name: resnet8}",
    "train={epochs: 1, effective_batch_size: 20, micro_batch_size: 20, precision: fp64}",
    "schedule={name: constant}",
    "runtime.device=cpu",
]


def test_a_fine_tuning_run_begins_with_what_its_weights_are_worth(tmp_path):
    """Loss and accuracy before the first step, in log and notices, are those of the BatchNorm run that was migrated."""
    trained = RunFolder(tmp_path / "trained")
    run(load_recipe("quickstart", [*SMALL, "norm={name: batch}"]), trained, name="trained")
    _, found, _ = evaluate_checkpoint(trained.path)
    migrate(str(trained.path), tmp_path / "batchless.pt", to="batchless")

    for norm, init in (("batchless", "batchless.pt"), ("batch", None)):
        init = tmp_path / init if init else tmp_path / "batch.pt"
        if norm == "batch":
            migrate(str(tmp_path / "batchless.pt"), init, to="batch")
        tuned, records = RunFolder(tmp_path / norm), []
        of = [*SMALL, f"norm={{name: {norm}}}", f"model={{name: resnet8, init: '{init}'}}", "train.micro_batch_size=4"]
        run(load_recipe("quickstart", of), tuned, name="tuned", listen=records.append)
        lines = [json.loads(line) for line in (tuned.path / "metrics.jsonl").read_text().splitlines()]
        said = [line["text"] for line in lines if "before the first step" in line.get("text", "")]
        assert len(said) == 1
        loss, accuracy, num = re.search(r"test loss ([\d.]+), accuracy ([\d.]+) % over (\d+) images", said[0]).groups()
        assert (loss, accuracy, num) == (f"{found.loss:.4f}", f"{100 * found.accuracy:.2f}", "30")
        texts = [getattr(record, "text", "") for record in records]
        assert said[0] in texts
        (told,) = [text for text in texts if text.startswith("Trained weights of model.init")]
        assert ("norm.statistics_rate 0.01" in told) == (norm == "batchless")
        assert "a gradient norm of at most 1 (optimizer.clip_norm)" in told  # 0.1 / 0.1


def test_trained_weights_have_defaults_of_their_own():
    """The statistics keep to the trained ones and the bound is that of unstandardised weights, unless the recipe says otherwise."""
    for name, rate in (("batchless", 1e-2), ("batchless-plain", 1e-2), ("batch", None), ("batchless-paper", None)):
        recipe = tiny_recipe(model={"name": "resnet8", "init": "a.pt"}, norm={"name": name})
        assert recipe.optimizer.clip_norm == pytest.approx(0.1 / recipe.optimizer.lr)
        assert getattr(recipe.norm, "statistics_rate", None) == rate
        untrained = tiny_recipe(model={"name": "resnet8"}, norm={"name": name})
        assert untrained.optimizer.clip_norm == 1
        assert getattr(untrained.norm, "statistics_rate", None) == (0.1 if rate else None)
    stated = {
        "norm": {"name": "batchless", "statistics_rate": 0.05},
        "optimizer": {"name": "sgd", "lr": 0.1, "clip_norm": None},
    }
    recipe = tiny_recipe(model={"name": "resnet8", "init": "a.pt"}, **stated)
    assert (recipe.norm.statistics_rate, recipe.optimizer.clip_norm) == (0.05, None)
    assert recipe.with_norm("batchless-plain").norm.statistics_rate == 1e-2
    assert (
        tiny_recipe(model={"name": "resnet8", "init": "a.pt"}, norm={"name": "batch"})
        .with_norm("batchless")
        .norm.statistics_rate
        == 1e-2
    )
