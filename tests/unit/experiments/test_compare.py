"""`compare`: what it prints, writes, refuses, and survives (each docstring is a law)."""

import csv
import json
import signal
from pathlib import Path
from xml.etree import ElementTree

import pytest
from cli_runs import fingerprint, finish, start, wait_for, write_recipe


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """A comparison that was interrupted after its first cell and went on; batch at micro-batch 1 cannot run."""
    place = tmp_path_factory.mktemp("comparison")
    write_recipe(
        place / "tiny.yaml",
        model={"name": "paper_cnn"},
        data__num_train=8,
        data__num_test=10,
        train={"epochs": 1, "effective_batch_size": 4, "micro_batch_size": 4, "precision": "fp64"},
    )
    arguments = ["compare", "tiny.yaml", "--norm", "batchless,batch", "--micro-batch", "1,full", "--seeds", "2"]
    arguments += ["--out", "out"]
    cells = place / "out" / "cells"
    first = start(*arguments, cwd=place)
    wait_for(lambda: list(cells.glob("*/summary.json")) and len(list(cells.glob("*.log"))) == 2, first)
    first.send_signal(signal.SIGINT)
    interrupted = finish(first)
    done = {path: path.stat().st_mtime_ns for path in cells.glob("*/summary.json")}
    second = finish(start(*arguments, cwd=place))
    return place, interrupted, done, second


def test_interrupted_comparison_goes_on(comparison):
    """Ctrl-C exits with 130 and says how to go on; the same command leaves finished cells alone and does the rest."""
    place, (code, stdout, stderr), done, second = comparison
    assert (code, stdout) == (130, "")
    assert "Go on with the same command" in stderr
    assert "Traceback" not in stderr
    assert 1 <= len(done) < 6
    assert second[0] == 0, second[2]
    assert len(list((place / "out" / "cells").glob("*/summary.json"))) == 6
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())


def test_comparison_writes_table_csv_json_and_plots(comparison):
    """A comparison prints a table and leaves the same rows as CSV and JSON, and two drawings of its lines."""
    place, _, _, (_, stdout, stderr) = comparison
    out = place / "out"
    rows = json.loads((out / "comparison.json").read_text())["rows"]
    table = list(csv.DictReader((out / "comparison.csv").read_text().splitlines()))
    names = [("batchless", 1), ("batchless", 4), ("batch", 1), ("batch", 4)]
    assert [(r["norm"], r["micro_batch_size"]) for r in rows] == names
    assert [(r["norm"], int(r["micro_batch_size"])) for r in table] == names
    for row, line in zip(rows, table, strict=True):
        assert line["peak_bytes"] == ("" if row["peak_bytes"] is None else str(row["peak_bytes"]))
    for plot in ("accuracy.svg", "peak_memory.svg"):
        texts = [element.text for element in ElementTree.parse(out / plot).iter("{http://www.w3.org/2000/svg}text")]
        assert {"batchless, micro-batch 1", "batchless, micro-batch full", "effective batch, images"} <= set(texts)
    assert "peak" in stdout
    assert "accuracy %" in stdout
    assert "± " in stdout
    assert "device: " in stdout
    assert "[1/8] batchless-effective4-micro1-seed0" in stderr


def test_comparison_shows_that_batchless_ignores_the_split(comparison):
    """In float64 batchless has equal accuracies and losses at micro-batch 1 and full, with a lower peak at 1."""
    single, full, *_ = json.loads((comparison[0] / "out" / "comparison.json").read_text())["rows"]
    assert single["num_finished"] == full["num_finished"] == 2
    assert single["test_accuracies"] == full["test_accuracies"]
    assert single["train_loss_mean"] == pytest.approx(full["train_loss_mean"], rel=1e-12)
    assert single["test_loss_mean"] == pytest.approx(full["test_loss_mean"], rel=1e-10)
    assert single["peak_bytes"] < full["peak_bytes"]


def test_a_cell_that_cannot_run_says_why(comparison):
    """BatchNorm on one value per channel fails alone: its row has the reason and no figure, the others have theirs."""
    place, _, _, (code, stdout, _) = comparison
    *_, single, full = json.loads((place / "out" / "comparison.json").read_text())["rows"]
    assert code == 0
    assert single["num_finished"] == 0
    assert single["peak_bytes"] is None
    assert single["test_accuracy_mean"] is None
    assert len(single["failures"]) == 2
    assert all("one value per channel" in reason for reason in single["failures"])
    assert "did not finish: batch, effective 4, micro 1: seed 0" in stdout
    assert "Traceback" not in stdout
    assert full["num_finished"] == 2


def test_folder_of_another_comparison_is_refused(bln, comparison, finished):
    """A comparison of other settings, a run, or anything foreign in --out: exit 1, nothing changed, both ways round."""
    place = comparison[0]
    for out, *changes in (
        (place / "out", "--set", "optimizer.lr=0.2"),
        (place / "out", "--set", "train.max_steps=1"),  # its cells would be of another length than those that are there
        (finished[1],),
        (place,),
        (place / "tiny.yaml",),
    ):
        before = fingerprint(place), fingerprint(finished[1])
        code, stdout, err = bln("compare", place / "tiny.yaml", "--out", out, *changes)
        assert (code, stdout) == (1, "")
        assert "another --out" in err
        assert (fingerprint(place), fingerprint(finished[1])) == before
    before = fingerprint(place)
    assert bln("run", place / "tiny.yaml", "--out", place / "out")[0] == 1
    assert fingerprint(place) == before


def test_cells_that_cannot_be_planned(bln):
    """Combinations that the recipe's rules refuse cost no process; when no cell finishes the command fails."""
    write_recipe(Path("r.yaml"))
    code, out, err = bln("compare", "r.yaml", "--norm", "batchless", "--micro-batch", "99", "--out", "out", "--json")
    assert code == 1
    assert "no cell" in err
    row = json.loads(out)["rows"][0]
    assert "99 is above effective_batch_size 16" in row["failures"][0]
    assert row["peak_bytes"] is None
