"""Run folders for the tests of reports: real runs of a tiny recipe, and what may become of folders."""

import json
import shutil

import pytest
from helpers import tiny_recipe

from bln_train.experiments.run import run
from bln_train.recipe.load import dump_recipe
from bln_train.runs.folder import RunFolder

HOSTILE = "<script>document.title='run'</script><img src=http://example.org/x>'\"&|`" + "W" * 120


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A comparison folder of a batchless cell with two seeds, a BatchNorm cell and one that failed."""
    root = tmp_path_factory.mktemp("compared")
    base = tiny_recipe(train__precision="fp32", train__memory_budget="12MiB")
    (root / "comparison.yaml").write_text(dump_recipe(base))
    norms = {"batchless": {"name": "batchless", "init_images": 8, "probe_images": 4}, "batch": {"name": "batch"}}
    for norm, micro, seed in (("batchless", 4, 0), ("batchless", 4, 1), ("batch", 16, 0)):
        recipe = tiny_recipe(
            train__precision="fp32",
            train__memory_budget="12MiB",
            train__micro_batch_size=micro,
            train__seed=seed,
            norm=norms[norm],
        )
        name = f"{norm}-effective16-micro{micro}-seed{seed}"
        run(recipe, RunFolder(root / "cells" / name), name=name)
    (root / "cells" / "batch-effective16-micro1-seed0.failed").write_text("BatchNorm cannot train on one value")
    return root


@pytest.fixture
def single(folders, tmp_path):
    """A copy of a finished batchless run."""
    return shutil.copytree(folders / "cells" / "batchless-effective16-micro4-seed0", tmp_path / "single")


@pytest.fixture
def hostile(single, tmp_path):
    """A run whose every text is markup, or far too long."""
    place = single.rename(tmp_path / "<b>bold & 'quoted'<")
    text = (place / "recipe.yaml").read_text()
    old = next(line for line in text.splitlines() if "name: shapes" in line)
    data = {"name": "folder", "root": HOSTILE, "num_train": 40}
    begin, end = text.index("data:"), text.index("model:")
    assert old in text[begin:end]
    (place / "recipe.yaml").write_text(text[:begin] + "data: " + json.dumps(data) + "\n" + text[end:])
    (place / "environment.json").write_text(json.dumps({"device": HOSTILE, HOSTILE: 1}))
    summary = json.loads((place / "summary.json").read_text())
    (place / "summary.json").write_text(json.dumps({**summary, "data": HOSTILE}))
    lines = []
    for line in (place / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "memory":
            record["device"] = HOSTILE
        for key in ("layers", "nll_by_layer"):
            if record.get(key):
                record[key] = {f"{HOSTILE}{name}": value for name, value in record[key].items()}
        lines.append(json.dumps(record))
    lines.append(json.dumps({"kind": "notice", "text": HOSTILE + "\ud800", "step": 1}))
    (place / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return place
