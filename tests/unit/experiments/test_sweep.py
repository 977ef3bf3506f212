"""`bln-train memory`: what is measured equals what arithmetic says, and no cell takes the others with it."""

import csv
import json
from contextlib import nullcontext
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from helpers import tiny_recipe
from torch import nn
from typer.testing import CliRunner

from bln_train.build.experiment import build_experiment
from bln_train.cli import app as cli
from bln_train.data.augment import Preprocess
from bln_train.data.datasets import ImageSet
from bln_train.errors import BlnError, RunFolderError, UsageError
from bln_train.experiments import sweep
from bln_train.norm.batchless import BatchlessNorm2d
from bln_train.norm.statistics import BatchlessStatistics
from bln_train.system.units import format_bytes
from bln_train.train.step import AccumulationStep, StepSettings

SMALL = ["--set", "model.name=resnet8", "--set", "data={name: folder, root: nowhere, image_size: 16}"]
SMALL += ["--set", "norm.probe_images=2", "--device", "cpu"]


def invoke(*arguments):
    """The command's result; what it refuses is `result.exception`."""
    return CliRunner().invoke(cli.app, ["memory", *map(str, arguments)], env={"COLUMNS": "80"})


# What is measured


def step_of(*norms, num_images=5, side=8):
    """A convolution of 4 channels, what is asked for behind it, relu, pooling and a classifier, about to see some images."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), *norms, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
    )
    statistics = BatchlessStatistics(model)
    natural = {id(p) for p in statistics.natural_parameters}
    step = AccumulationStep(
        model,
        torch.optim.SGD([p for p in model.parameters() if id(p) not in natural], lr=0.1, momentum=0.9),
        statistics,
        Preprocess(torch.full((3,), 0.5), torch.ones(3), flip=True, crop_padding=1),
        StepSettings(micro_batch_size=num_images),
        device=torch.device("cpu"),
        autocast=nullcontext,
    )
    images = torch.randint(0, 256, (num_images, 3, side, side), dtype=torch.uint8)
    return step, ImageSet(images, torch.randint(0, 10, (num_images,)))


@pytest.mark.parametrize("num_images", [1, 5])
def test_saved_bytes_equal_arithmetic(num_images):
    """Without a norm: input, relu's output, pooled features, log-probabilities, labels, and the loss's total weight and divisor."""
    step, images = step_of(num_images=num_images)
    values = 3 * 64 + 4 * 64 + 4 + 10  # float32 each
    assert sweep.measure_saved_bytes(step, images, num_images) == num_images * (4 * values + 8) + 4 + 4
    assert all(p.grad is None for p in step.model.parameters())


def test_saved_bytes_hold_what_custom_functions_save():
    """An unfused batchless layer keeps its own xhat, as BatchNorm keeps its input: both count, parameters do not."""
    plain, batch, batchless = (
        sweep.measure_saved_bytes(*step_of(*norms), 5) for norms in ((), (nn.BatchNorm2d(4),), (BatchlessNorm2d(4),))
    )
    activation = 5 * 4 * 64 * 4
    assert 0 <= batch - plain - activation < 200  # and a few values per channel
    assert 0 <= batchless - plain - activation < 200


def test_saved_bytes_leave_out_standardised_weights():
    """What is made once for all micro-batches belongs to the step: saved bytes per image are the same for 1 and 4 images."""
    step = build_experiment(tiny_recipe(norm={"name": "group"}, train__micro_batch_size=4)).trainer.accumulation
    assert step.standardized
    images = ImageSet(torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    one, four = (sweep.measure_saved_bytes(step, images, n) for n in (1, 4))
    assert one * 4 == pytest.approx(four, rel=1e-3)


def test_floor_is_parameters_momentum_and_one_image():
    """The floor of a small network: parameters and momentum exactly, live tensors at least what autograd keeps."""
    recipe = tiny_recipe(norm={"name": "none"}, train__micro_batch_size=1, train__effective_batch_size=1)
    experiment = sweep._build(recipe, sweep.random_data(recipe, 1))
    floor = sweep.measure_floor(experiment)
    num_bytes = sum(p.numel() * p.element_size() for p in experiment.model.parameters())
    assert (floor.parameter_bytes, floor.optimizer_bytes) == (num_bytes, num_bytes)
    step, images = experiment.trainer.accumulation, experiment.data.train
    assert floor.live_bytes >= sweep.measure_saved_bytes(step, images, 1)
    assert floor.floor_bytes == 2 * num_bytes + floor.live_bytes


def test_timed_images():
    """The effective batch is timed whole up to four micro-batches or 128 images."""
    timed = [sweep.num_timed_images(micro, effective) for micro, effective in ((1, 8), (1, 1024), (8, 128), (64, 1024))]
    assert timed == [8, 128, 128, 256]


# The command


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A small sweep without a data set: its folder, document and result."""
    folder = tmp_path_factory.mktemp("sweep") / "out"
    grid = ["--norm", "none,batch,batchless", "--micro-batch", "2,1", "--effective-batch", "2,4", "--repeats", "1"]
    result = invoke("cifar10_mb1", *SMALL, *grid, "--out", folder, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    return folder, json.loads(result.stdout), result


def cell(document, norm, micro, effective):
    """A row of the document."""
    (row,) = (
        row
        for row in document["rows"]
        if (row["norm"], row["micro_batch_size"], row["effective_batch_size"]) == (norm, micro, effective)
    )
    return row


def test_rows_are_complete(measured):
    """Every cell has every figure (not CUDA's reserved memory, no timeline), its split adds up, and none is the unit of time."""
    document = measured[1]
    sizes = [(r["micro_batch_size"], r["effective_batch_size"], r["norm"]) for r in document["rows"]]
    assert sizes == [(m, e, n) for m in (1, 2) for e in (2, 4) for n in ("none", "batch", "batchless")]
    for row in document["rows"]:
        assert row["problem"] == ""
        assert {key for key, value in row.items() if value is None} == {"reserved_bytes", "timeline"}
        parts = ("parameter", "gradient", "optimizer", "activation", "other")
        assert sum(row[f"{part}_bytes"] for part in parts) == row["peak_bytes"]
        assert row["peak_over_floor"] == pytest.approx(row["peak_bytes"] / document["floor"]["floor_bytes"])
        assert row["images_per_second"] == pytest.approx(1e3 / row["ms_per_image"])
        assert row["num_timed_images"] == row["effective_batch_size"]
        assert (row["ms_over_none"] == 1) == (row["norm"] == "none")
        assert (row["ms_over_batch"] == 1) == (row["norm"] == "batch")
    assert document["data"] == "random 16x16 images of 10 classes, no data set"
    assert document["environment"]["torch"] == torch.__version__
    assert document["environment"]["num_threads"] == torch.get_num_threads()


def test_batch_keeps_more_than_none_and_peaks_are_flat(measured):
    """BatchNorm keeps more for backward than no norm; twice the effective batch takes at most 1 % more memory."""
    document = measured[1]
    for micro in (1, 2):
        assert (
            cell(document, "batch", micro, 4)["saved_bytes_per_image"]
            > 1.3 * cell(document, "none", micro, 4)["saved_bytes_per_image"]
        )
        for norm in ("none", "batch", "batchless"):
            first, second = (cell(document, norm, micro, effective)["peak_bytes"] for effective in (2, 4))
            # Micro-batches 2 to N find gradients already there, so one micro-batch may take less.
            assert second <= (1.01 if micro == 1 else 1.5) * first


def test_files_agree(measured):
    """JSON on stdout is memory.json and the folder; the CSV has the same rows and what they need beside; so has the drawing."""
    folder, document, result = measured
    assert {**json.loads((folder / "memory.json").read_text()), "folder": str(folder)} == document
    lines = list(csv.DictReader((folder / "memory.csv").read_text().splitlines()))
    assert len(lines) == len(document["rows"])
    for line, row in zip(lines, document["rows"], strict=True):
        assert line["peak_bytes"] == str(row["peak_bytes"])
        assert line["reserved_bytes"] == ""
        assert all(line[key] for key in ("device", "torch", "num_threads", "date", "floor_bytes", "data"))
    texts = [
        element.text for element in ElementTree.parse(folder / "memory.svg").iter("{http://www.w3.org/2000/svg}text")
    ]
    assert {"micro-batch 1", "micro-batch 2"} <= set(texts)
    for row in document["rows"]:
        name = f"{row['norm']}, micro-batch {row['micro_batch_size']} of {row['effective_batch_size']}"
        assert f"{name}: {format_bytes(row['peak_bytes'])}" in texts
    assert sorted(p.name for p in folder.iterdir()) == ["memory.csv", "memory.json", "memory.svg"]
    assert "memory: batchless, micro-batch 1 of 4" in result.stderr
    assert "[17/17] speed: micro-batch 2 of 4" in result.stderr


def test_a_cell_that_cannot_be_says_why(tmp_path):
    """BatchNorm on one value per channel is `-` with its reason, in 80 columns; the others are measured, and what was in the
    folder is overwritten or left alone."""
    (tmp_path / "memory.json").write_text("old")
    (tmp_path / "thesis.tex").write_text("all of it")
    result = invoke(
        *SMALL, "--set", "model.name=paper_cnn", "--norm", "batch,batchless,batchless-paper-abs", "--micro-batch", "1",
        "--effective-batch", "2", "--repeats", "1", "--out", tmp_path,
    )  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    batch, batchless, _ = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert "one value per channel" in batch["problem"]
    assert batch["peak_bytes"] is batch["ms_per_image"] is None
    assert batchless["peak_bytes"] > 0
    assert batchless["ms_over_none"] is None  # none is not in the list
    assert (tmp_path / "thesis.tex").read_text() == "all of it"
    table, after = result.stdout.split("not measured: batch, micro-batch 1 of 2: BatchNorm cannot train")
    assert max(map(len, table.splitlines())) <= 80
    assert table.splitlines()[4].split() == ["batch", "1", "2", "-", "-", "-", "-", "-"]
    assert f"files:  {tmp_path}/memory.json" in after
    assert torch.__version__ in after


def test_nothing_measured_is_a_failure(tmp_path):
    """When no cell can be measured the command fails, and its files say why."""
    result = invoke(
        *SMALL, "--norm", "batch", "--micro-batch", "4", "--effective-batch", "2", "--repeats", "1", "--out", tmp_path
    )
    assert isinstance(result.exception, BlnError)
    assert result.exception.exit_code == 1
    (row,) = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert "4 is above effective_batch_size 2" in row["problem"]


def test_interrupt_leaves_no_files(tmp_path, monkeypatch):
    """Ctrl-C during the measurement, or while a file is written, leaves the earlier files whole and no half ones."""

    def interrupt(*_):
        raise KeyboardInterrupt

    arguments = (*SMALL, "--norm", "none", "--micro-batch", "1", "--effective-batch", "1", "--out", tmp_path)
    for name, value in (("memory.json", "old"), ("memory.csv", "old")):
        (tmp_path / name).write_text(value)
    for target in ("bln_train.experiments.sweep._measure_speed", "bln_train.runs.folder.os.fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(target, interrupt)
            assert invoke(*arguments).exit_code == 130
        assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"memory.json": "old", "memory.csv": "old"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--norm", "batch,batchles"], ["'batchles'", "batchless"]),
        (["--norm", ","], ["at least one norm"]),
        (["--micro-batch", "one"], ["--micro-batch", "'one'", "1,8,64"]),
        (["--micro-batch", "0"], ["--micro-batch", "'0'"]),
        (["--effective-batch", ""], ["--effective-batch", "at least one"]),
        (["--effective-batch", "2,4", "--micro-batch", "8"], ["every micro-batch (8)"]),
        (["nosuch.yaml"], ["nosuch.yaml"]),
        (["--set", "model.nam=resnet8"], ["model.nam"]),
        (["--device", "cpu", "--set", "train.precision=tf32"], ["tf32 needs CUDA"]),
        (["--device", "tpu"], ["cuda"]),
    ],
)
def test_bad_input_is_refused(arguments, words, tmp_path, monkeypatch):
    """Wrong input is a usage error (exit 2) that names the fault, before anything is measured or written."""
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert isinstance(result.exception, UsageError)
    assert result.exception.exit_code == 2
    assert result.stdout == ""
    for word in words:
        assert word in str(result.exception)
    assert not list(Path().iterdir())


def test_unusable_folder_is_refused_before_measuring(tmp_path):
    """A file as --out, or below one, is exit 1 at once."""
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        result = invoke(*SMALL, "--out", out)
        assert isinstance(result.exception, RunFolderError)
        assert "another --out" in str(result.exception)
        assert "memory:" not in result.stderr
    assert (tmp_path / "file").read_text() == "mine"
    assert invoke("--repeats", "0").exit_code == 2
