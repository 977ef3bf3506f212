"""Reports: what folders hold, in words and tables; nothing invented, nothing trusted, nothing foreign overwritten."""

import csv
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from bln_train.cli.app import app
from bln_train.errors import RunFolderError, UsageError
from bln_train.report.charts import Bar, Series, band_chart, bar_chart, line_chart
from bln_train.report.document import write_report
from bln_train.report.sheet import sheet
from bln_train.report.source import read_sources
from bln_train.report.svg import Axis
from bln_train.system.units import format_bytes


def markdown_of(*paths, out):
    return Path(write_report(list(paths), out)["markdown"]).read_text()


def records_of(folder, kind):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if (record := json.loads(line))["kind"] == kind]


def cells(line):
    return [cell.strip() for cell in line.strip("|\n ").split(" | ")]


def test_a_run_made_again_is_no_second_seed(single, tmp_path):
    """A run and its copy: one accuracy, without a spread."""
    twin = shutil.copytree(single, tmp_path / "again")
    text = markdown_of(single, twin, out=tmp_path / "r.html")
    accuracy = 100 * records_of(single, "epoch")[-1]["test_accuracy"]
    assert f"test accuracy {accuracy:.2f} % on 10 images" in text


def test_verdict_of_a_comparison_comes_first(folders, tmp_path):
    """What finished and failed, budgets, accuracy against BatchNorm at the whole batch with what the seeds allow to say."""
    text = markdown_of(folders, out=tmp_path / "r.html")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings == [
        "Verdict", "Memory", "Loss and accuracy", "Speed", "Statistics of each layer", "Recipes", "Environment"
    ]  # fmt: skip
    assert "3 of 3 runs finished" in text
    assert "batch-effective16-micro1-seed0: BatchNorm cannot train on one value" in text
    epochs = {p.name: records_of(p, "epoch")[-1] for p in (folders / "cells").iterdir() if p.is_dir()}
    ours = [100 * epochs[f"batchless-effective16-micro4-seed{n}"]["test_accuracy"] for n in (0, 1)]
    theirs = 100 * epochs["batch-effective16-micro16-seed0"]["test_accuracy"]
    spread = abs(ours[0] - ours[1]) / 2**0.5
    assert f"batchless, micro-batch 4 of 16: test accuracy {sum(ours) / 2:.2f} ± {spread:.2f} % on 10 images" in text
    assert f"{sum(ours) / 2 - theirs:+.2f} points against batch, micro-batch 16 of 16" in text
    assert "not several seeds of both: what another one would change is not known" in text
    peak = max(
        records_of(folders / "cells" / f"batchless-effective16-micro4-seed{n}", "memory")[-1]["peak_bytes"]
        for n in (0, 1)
    )
    share = f"{100 * peak / (12 * 2**20):.1f} % of the memory budget of 12.00 MiB"
    assert f"Fits: batchless, micro-batch 4 of 16 takes {share}: a peak of {format_bytes(peak)}" in text
    differing = text[text.index("Settings that differ") :].split("\n\n")[1].splitlines()
    rows = {cells(line)[0]: cells(line)[1:3] for line in differing[2:]}
    assert rows["norm.name"] == ["batch", "batchless"]
    assert rows["model.weight\\_standardization"] == ["false", "true"]
    assert not any("seed" in line for line in differing)


def test_a_budget_below_the_peak_does_not_fit(single, tmp_path):
    """The verdict compares what was measured with the stated budget, whatever the run was allowed to do."""
    recipe = (single / "recipe.yaml").read_text()
    (single / "recipe.yaml").write_text(recipe.replace("12MiB", "1MiB"))
    text = markdown_of(single, out=tmp_path / "r.html")
    assert "**no** Does not fit: batchless, micro-batch 4 of 16 takes" in text


def test_a_budget_on_cuda_is_for_what_the_allocator_reserved_and_the_context(single, tmp_path):
    """Of 1 GiB, 600 MiB and a context fit, 700 do not, whatever of it is allocated."""
    recipe = (single / "recipe.yaml").read_text()
    (single / "recipe.yaml").write_text(recipe.replace("12MiB", "1GiB"))
    lines = [line for line in (single / "metrics.jsonl").read_text().splitlines() if '"memory"' not in line]
    memory = records_of(single, "memory")[-1] | {"method": "allocator", "peak_bytes": 500 * 2**20}
    for reserved, words in ((600, "Fits: "), (700, "Does not fit: ")):
        own = json.dumps(memory | {"reserved_bytes": reserved * 2**20})
        (single / "metrics.jsonl").write_text("\n".join([*lines, own, ""]))
        text = markdown_of(single, out=tmp_path / "r.html")
        assert f"{words}batchless, micro-batch 4 of 16 takes {100 * (reserved + 400) / 1024:.1f} %" in text
        assert f"{reserved}.00 MiB reserved by the allocator" in text


def test_one_run_is_compared_with_guessing(single, tmp_path):
    """Without another run there is nothing else to compare with."""
    text = markdown_of(single, out=tmp_path / "r.html")
    assert "guessing gives 10.00 % of 10 classes" in text
    assert "/ reference" not in text


def test_runs_on_other_data_are_no_reference(single, folders, tmp_path):
    """A run is compared with those of its data, network and length alone."""
    recipe = (single / "recipe.yaml").read_text()
    (single / "recipe.yaml").write_text(recipe.replace("num_train: 40", "num_train: 41"))
    text = markdown_of(folders, single, out=tmp_path / "r.html")
    (line,) = [line for line in text.splitlines() if "(single): test accuracy" in line]
    assert "guessing gives 10.00 %" in line
    assert "points against" not in line


def test_what_was_not_measured_prints_a_dash(single, tmp_path):
    """A run stopped before its first epoch ended has no accuracy, memory or speed; a torn line and foreign values are no record."""
    (single / "summary.json").unlink()
    step = records_of(single, "step")[0]
    damaged = [{**step, "loss": "<b>"}, {"kind": "memory", "device": 3}, [1], {**step, "nll_by_layer": {"a": []}}]
    lines = [json.dumps(record) for record in ({**step, "step": 7, "layers": None}, *damaged)]
    (single / "metrics.jsonl").write_text("\n".join(lines) + '\n{"kind": "st')
    (single / "environment.json").write_text("[]")
    (found,) = read_sources([single]).runs
    assert [record.step for record in found.steps] == [7]
    text = markdown_of(single, out=tmp_path / "r.html")
    assert "is not finished; its metrics end at step 7" in text
    row = next(line for line in text.splitlines() if line.startswith("| batchless, micro-batch 4 of 16 | 0/1"))
    assert cells(row)[2:] == ["-", "-", "12.00 MiB", "-"]
    assert "No epoch has ended: -" in text
    assert "Memory was not measured: -" in text


def test_diverged_numbers_are_dashes(single, tmp_path):
    """A loss that was not finite is null in the log, and NaN, where some other program wrote it, is drawn nowhere."""
    lines = []
    for line in (single / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "epoch":
            record |= {"train_loss": None, "test_loss": float("nan"), "images_per_second": float("inf")}
        lines.append(json.dumps(record))
    (single / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = Path(write_report([single], tmp_path / "r.html")["html"]).read_text()
    assert not re.search(r"\b(nan|inf)\b", page[page.index("</style>") :])


def test_folders_that_are_no_runs_are_named_all_at_once(single, tmp_path):
    """Missing, empty, a file, a synthetic experiment: one error, exit code 2, and nothing is written."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    names = ["missing", "empty", "file"]
    result = CliRunner().invoke(
        app, ["report", str(single), *(str(tmp_path / n) for n in names), "-o", str(tmp_path / "r.html")]
    )
    assert isinstance(result.exception, UsageError)
    assert result.exception.exit_code == 2
    lines = str(result.exception).splitlines()
    assert [line.rpartition(": ")[2] for line in lines[:3]] == [
        "does not exist", "holds no run, no comparison and no memory sweep", "is a file, not a folder"
    ]  # fmt: skip
    assert str(single) not in str(result.exception)
    assert not (tmp_path / "r.html").exists()


def test_place_of_the_report(single, folders, tmp_path, monkeypatch):
    """In the folder by default, here for several, where --out says; earlier reports are replaced, foreign files are not."""
    monkeypatch.chdir(tmp_path)
    assert write_report([single])["html"] == str(single / "report.html")
    assert write_report([single])["markdown"] == str(single / "report.md")
    assert write_report([single, folders])["html"] == "report.html"
    assert write_report([single], tmp_path / "new" / "a.html")["html"] == str(tmp_path / "new" / "a.html")
    with pytest.raises(UsageError, match="neither a folder nor"):
        write_report([single], tmp_path / "a.pdf")
    (tmp_path / "foreign.md").write_text("mine")
    with pytest.raises(RunFolderError, match="is no report of bln-train"):
        write_report([single], tmp_path / "foreign.html")
    assert not (tmp_path / "foreign.html").exists()


def test_a_folder_named_twice_counts_once(single, folders, tmp_path):
    """Two ways to write a path are one run; a cell of a comparison and the comparison are no two."""
    cell = folders / "cells" / "batch-effective16-micro16-seed0"
    result = write_report([folders, cell, cell / ".." / cell.name], tmp_path / "r.html")
    assert result["num_runs"] == 3


def test_report_needs_no_torch(single, tmp_path):
    """It reads files alone, in a process that never imports torch."""
    code = (
        "import sys; from bln_train.cli.app import app; sys.argv = ['bln-train', 'report', sys.argv[1], '--json']\n"
        "try: app()\nexcept SystemExit as end: assert not end.code\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, str(single)], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {
        "html": str(single / "report.html"), "markdown": str(single / "report.md"),
        "num_runs": 1, "num_sweeps": 0, "num_failed": 0,
    }  # fmt: skip


def test_markdown_holds_no_markup_of_others(hostile, tmp_path):
    """Tags, links, pipes and code marks from folders are escaped."""
    text = markdown_of(hostile, out=tmp_path / "r.html")
    without_code = "\n".join(line for line in text.splitlines()[1:] if not line.startswith("    "))
    assert re.search(r"(?<!\\)<", without_code) is None
    assert "\\<script\\>" in without_code


@pytest.mark.slow
def test_memory_timeline(tmp_path, monkeypatch):
    """memory --timeline draws a file, puts each cell's timeline into memory.json and the report, and leaves the CSV as it is."""
    monkeypatch.chdir(tmp_path)
    command = "memory quickstart --norm none,batchless --micro-batch 2 --effective-batch 4 --repeats 1 --out swept --device cpu"
    picture = tmp_path / "new" / "t.svg"
    result = CliRunner().invoke(app, [*command.split(), "--timeline", str(picture)], catch_exceptions=False)
    assert result.exit_code == 0
    assert str(picture) in result.stdout.replace("\n", "")
    texts = [element.text or "" for element in ElementTree.parse(picture).iter("{http://www.w3.org/2000/svg}text")]
    for norm in ("none", "batchless"):
        assert f"One optimizer step: {norm}, micro-batch 2 of 4" in texts
    assert sum(text.startswith("peak, ") for text in texts) == 2
    rows = json.loads((tmp_path / "swept" / "memory.json").read_text())["rows"]
    for row in rows:
        values = zip(
            *(
                row["timeline"][f"{kind}_bytes"]
                for kind in ("parameter", "gradient", "optimizer", "activation", "other")
            ),
            strict=True,
        )
        assert max(map(sum, values)) == row["peak_bytes"]
    with open(tmp_path / "swept" / "memory.csv", newline="") as file:
        assert "timeline" not in csv.DictReader(file).fieldnames
    text = markdown_of(tmp_path / "swept", out=None)
    assert text.count(": largest moment of each phase") == 2
    assert f"smallest peak {format_bytes(min(row['peak_bytes'] for row in rows))} (none, micro-batch 2 of 4)" in text


def test_timelines_that_cannot_be_drawn_are_refused_before_anything_is_measured(tmp_path):
    """Too many panels, or a file of another kind: exit code 2 with the way out."""
    for arguments, words in (([], "cells are more than 12 panels"), (["--norm", "none"], "is no .svg file")):
        place = tmp_path / ("t.svg" if not arguments else "t.jpg")
        result = CliRunner().invoke(app, ["memory", *arguments, "--out", str(tmp_path / "m"), "--timeline", str(place)])
        assert isinstance(result.exception, UsageError)
        assert words in result.exception.problem
    assert not (tmp_path / "m").exists()


@pytest.mark.gpu
def test_cuda_snapshots_are_written(tmp_path, monkeypatch):
    """On CUDA each cell leaves a snapshot with allocations for PyTorch's viewer, and a timeline of tensors."""
    import pickle

    monkeypatch.chdir(tmp_path)
    command = (
        "memory quickstart --norm batchless --micro-batch 2 --effective-batch 8 --repeats 1 --out swept --device cuda"
    )
    result = CliRunner().invoke(app, [*command.split(), "--timeline", "t.svg"], catch_exceptions=False)
    assert result.exit_code == 0
    snapshot = pickle.loads((tmp_path / "t-batchless-micro2-effective8.pickle").read_bytes())
    events = [event for trace in snapshot["device_traces"] for event in trace]
    assert {"alloc", "free_completed"} <= {event["action"] for event in events}
    assert snapshot["segments"]
    (row,) = json.loads((tmp_path / "swept" / "memory.json").read_text())["rows"]
    assert max(row["timeline"]["activation_bytes"]) > 0


@pytest.mark.parametrize(
    "values", [(1e299, 1e299), (0.0, 0.0), (5.0,), (-1e-300, 1e-300), (-1e299, 1e299), (), (3.0, math.nan)]
)
@pytest.mark.parametrize("base", [0, 2, 10])
def test_drawings_of_any_numbers_are_well_formed(values, base):
    """Equal, huge, tiny, single, absent: XML that parses, every number in it finite, whatever text is in the labels."""
    points = [(2.0**n, value) for n, value in enumerate(values)]
    drawings = [
        line_chart("<t>&'\"", [Series("]]>", points)], Axis("x", log=base), Axis("<y>"), level=(0.0, "<l>")),
        line_chart("t", [Series("s", points, [(y, 2 * y) for _, y in points], shaded=True)], Axis("x"),
                   Axis("y", log=10, limits=(0.1, 10.0)), legend=False),
        line_chart("t", [Series("s", points, [(y, math.inf) for _, y in points])], Axis("x"), Axis("y", from_zero=True)),
        bar_chart("t", [Bar("<b>", [abs(v) for _, v in points if v == v], "-")], ("<p>", "q"), x_label="x"),
        band_chart("t", [(abs(v), abs(v), abs(v)) for _, v in points if v == v] or [(1.0, 1.0, 1.0)], Axis("x"),
                   Axis("y", log=base), level=(1.0, "l"), key="k"),
    ]  # fmt: skip
    for drawing in drawings:
        for text in (str(drawing), sheet("\x01\ud800<t>", [("<h>", drawing), ("", drawing)], columns=2)):
            ElementTree.fromstring(text)
            assert re.search(r"[\"\s,(](nan|inf)", text) is None
