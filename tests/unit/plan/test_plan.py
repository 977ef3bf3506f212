"""`plan`: what is predicted is what is measured, without computing it."""

import json
import resource
import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from bln_train.cli import app as cli
from bln_train.errors import DoesNotFitError, UsageError
from bln_train.experiments import sweep
from bln_train.plan.allocator import BLOCK_BYTES, MIB, CachingAllocator
from bln_train.plan.planner import largest_fit, plan_sizes
from bln_train.plan.predict import CONTEXT_BYTES, plan_memory
from bln_train.plan.trace import FakeTracker
from bln_train.recipe.load import load_recipe
from bln_train.system.units import parse_bytes
from bln_train.train.cuda_graphs import MOST_PIXELS

SMALL = ["--set", "model.name=resnet8", "--set", "data={name: folder, root: nowhere, image_size: 16}"]


def invoke(*arguments):
    """The command's result; what it refuses is `result.exception`."""
    return CliRunner().invoke(cli.app, ["plan", *map(str, arguments)], env={"COLUMNS": "80"})


def recipe(*overrides, norm="batchless", effective=12):
    """A small network on small images, on the CPU."""
    of = [
        "data={name: folder, root: nowhere, image_size: 16}",
        "model.name=resnet8",
        f"train.effective_batch_size={effective}",
    ]
    return load_recipe("cifar10_mb1", [*of, "runtime.device=cpu", *overrides]).with_norm(norm)


def measured(recipe, micro_batch_size):
    """The record of two real steps."""
    train = recipe.train.model_copy(update={"micro_batch_size": micro_batch_size})
    data = sweep.random_data(recipe, train.effective_batch_size)
    return sweep.measure_peak(recipe.model_copy(update={"train": train}), data)


@pytest.mark.parametrize(
    ("norm", "overrides"),
    [
        ("none", []),
        ("batch", []),
        ("group", ["optimizer={name: adam, lr: 0.01}"]),
        ("batchless-plain", []),
        ("batchless-plain", ["optimizer.accumulate_into=momentum"]),
        ("batchless-plain", ["train.precision=bf16"]),
        ("batchless", []),
        ("batchless", ["runtime.compiled=false", "model.shortcut=B"]),
        ("group", ["train.precision=bf16"]),
        ("batchless-plain", ["runtime.compiled=false"]),
        ("batchless-plain", ["model.zero_init_residual=true"]),
        ("batchless-plain", ["optimizer={name: adamw, lr: 0.01}", "model.shortcut=B"]),
    ],
)
def test_law_7_the_plan_bounds_the_measured_peak(norm, overrides):
    """Law 7, CPU: within 0.5 % of the tracked peak and 0.1 % below at most, in each part, at micro-batches below, at and above the
    probe's images and at the whole batch: sizes that were traced and sizes that follow from others."""
    of = recipe(*overrides, norm=norm)
    sizes = [1, 2, 3, 8, 12]
    for row in plan_memory(of, sizes, cuda=False):
        truth = measured(of, row.micro_batch_size)
        assert -0.001 <= row.total_bytes / truth.peak_bytes - 1 <= 0.005, row
        for part in ("parameter", "optimizer", "other"):
            assert getattr(row, f"{part}_bytes") == getattr(truth, f"{part}_bytes"), (part, row)
        assert row.tensor_bytes == row.total_bytes
        assert row.workspace_bytes is row.graph_bytes is row.rounding_bytes is row.context_bytes is None


def test_activations_per_image_are_the_slope():
    """What a plan says of one image more is the difference of two plans."""
    first, second = plan_memory(recipe(), [9, 10], cuda=False)
    assert second.activation_bytes - first.activation_bytes == pytest.approx(first.activation_bytes_per_image, rel=1e-3)


def test_a_plan_is_of_the_micro_batch_that_was_asked_for():
    """Also where the parts of a balanced correction are smaller: it bounds what they take."""
    parts = recipe("norm.correction_parts=12")
    assert plan_memory(parts, [3, 8], cuda=False) == plan_memory(recipe(), [3, 8], cuda=False)


def test_a_plan_computes_nothing():
    """A micro-batch of 50,000 images is planned in the time and the memory of a small one."""
    of = recipe(effective=65536)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    row = plan_memory(of, [65536], cuda=False)[0]
    assert row.total_bytes > 2**32  # more than was touched
    assert time.process_time() - began < 60
    if sys.platform == "linux":
        assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 2**31


def test_a_fake_step_leaves_kernels_and_settings_as_they_were():
    """After a plan, training runs compiled kernels as before, and its results are what they were."""
    from bln_train.norm.kernels.library import library
    from bln_train.norm.kernels.table import kernels_are_wanted

    before, wanted = library("float"), kernels_are_wanted()
    plan_memory(recipe(), [1], cuda=True)
    assert library("float") is before
    assert kernels_are_wanted() == wanted


def test_fake_operators_allocate_what_real_ones_do():
    """Shapes, strides and bytes of results, views included, are those of real operators; small tensors hold real values."""
    x = torch.randn(4, 8, 32, 32).to(memory_format=torch.channels_last)
    weight = torch.randn(16, 8, 3, 3).to(memory_format=torch.channels_last)

    def work():
        y = torch.conv2d(x, weight, padding=1)
        z = y.relu_().mul(2)
        return (
            y,
            z,
            z.permute(0, 2, 3, 1).view(-1),
            z.sum((0, 2, 3)),
            torch.arange(5) * 2,
            z.contiguous(),
            z.split(2)[1],
        )

    real = work()
    with FakeTracker([x, weight]) as tracker:
        fake = work()
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
    assert fake[4].tolist() == [0, 2, 4, 6, 8]
    assert fake[3].tolist() == [1.0] * 16
    alive = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (x, weight, *fake)}
    assert tracker.live_bytes == sum(alive.values())


# CUDA, as far as numbers go


@given(st.lists(st.tuples(st.integers(1, 40 * MIB), st.integers(0, 30)), max_size=60))
@settings(max_examples=60, deadline=None)
def test_the_allocator_holds_what_it_hands_out(requests):
    """Reserved is at least what is out, in whole 512 B, at any time; when all came back the segments are whole and free."""
    allocator, out = CachingAllocator(), []
    for size, take_back in requests:
        block = allocator.allocate(size)
        assert block.size >= size
        out.append((block, size))
        assert allocator.reserved_bytes >= sum(-(-s // BLOCK_BYTES) * BLOCK_BYTES for _, s in out)
        for _ in range(min(take_back % 3, len(out))):
            allocator.release(out.pop(take_back % len(out))[0])
    while out:
        allocator.release(out.pop()[0])
    free = [block for pool in allocator._free.values() for _, _, block in pool]
    assert sum(block.size for block in free) == allocator.reserved_bytes
    assert all(block.before is None and block.after is None for block in free)


@pytest.mark.parametrize(
    ("requests", "reserved"),
    [
        ([1], 2),
        ([MIB], 2),
        ([MIB, MIB, 1], 4),
        ([MIB + 1], 20),
        ([10 * MIB - 512], 20),
        ([10 * MIB], 10),
        ([11 * MIB - 1], 12),
    ],
)
def test_segments_are_those_of_pytorch(requests, reserved):
    """2 MiB for small requests, 20 MiB for middle ones, their own in whole 2 MiB for large ones."""
    allocator = CachingAllocator()
    for request in requests:
        allocator.allocate(request)
    assert allocator.reserved_bytes == reserved * MIB


def test_a_cuda_plan_adds_up():
    """The parts are the total; tensors take whole blocks; a given context takes the place of the assumed one."""
    of = recipe("train.precision=fp16", "runtime.device=auto")
    row, given = plan_memory(of, [4], cuda=True)[0], plan_memory(of, [4], cuda=True, context_bytes=5 * MIB)[0]
    beside = row.workspace_bytes + row.graph_bytes + row.rounding_bytes + row.context_bytes
    assert row.total_bytes == row.tensor_bytes + beside
    assert row.graph_bytes >= row.activation_bytes
    without, large = (
        plan_memory(recipe("train.precision=fp16", "runtime.device=auto", *also), [4], cuda=True)[0]
        for also in (["runtime.graphs=false"], ["data={name: folder, root: nowhere, image_size: 224}"])
    )
    assert row.total_bytes - without.total_bytes == row.graph_bytes
    assert without.graph_bytes == large.graph_bytes == 0
    assert row.tensor_bytes % BLOCK_BYTES == 0
    assert row.context_bytes == CONTEXT_BYTES
    assert row.total_bytes - given.total_bytes == CONTEXT_BYTES - 5 * MIB


def test_a_cuda_plan_counts_what_recordings_keep():
    """Where micro-steps are too large to be recorded and the probe is not: at most its images' way forth and back."""
    changes = ["data={name: folder, root: nowhere}", "runtime.device=auto"]
    own, fewest, none = (
        plan_memory(recipe(*changes, f"norm.probe_images={number}", effective=256), [256], cuda=True)[0]
        for number in (8, "auto", 0)
    )
    assert 256 * 32**2 > MOST_PIXELS >= 8 * 32**2
    assert none.graph_bytes == 0
    for row, number in ((own, 8), (fewest, 4)):
        assert 0 <= row.graph_bytes - number * row.activation_bytes_per_image <= 2 * MIB


@pytest.mark.gpu
def test_law_7_on_cuda():
    """Law 7, CUDA: within 10 % of `max_memory_allocated`."""
    of = load_recipe(
        "cifar10_mb1", ["data={name: folder, root: nowhere}", "model.name=resnet18", "runtime.device=cuda"]
    )
    for row in plan_memory(of, [1, 16], cuda=True):
        truth = measured(of, row.micro_batch_size).peak_bytes
        assert abs((row.tensor_bytes + row.workspace_bytes) / truth - 1) <= 0.1


# The command


def test_json_names_what_fits():
    """Every row says whether it fits, and the largest one is named; nothing is written."""
    result = invoke("cifar10_mb1", *SMALL, "--device", "cpu", "--budget", "4MiB", "--micro-batch", "1,2,8,64", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    fits = [row["micro_batch_size"] for row in document["rows"] if row["fits"]]
    assert fits == [n for n in (1, 2, 8, 64) if n <= document["largest_fit"]["batchless"]]
    assert 0 < len(fits) < 4
    assert document["predicted_for"] == "cpu"


def test_the_recipes_budget_is_the_plans():
    """`train.memory_budget` is the budget where --budget names no other."""
    for budget, arguments in ((3 * MIB, []), (4 * MIB, ["--budget", "4MiB"])):
        result = invoke(
            "cifar10_mb1", *SMALL, "--set", "train.memory_budget=3MiB", "--micro-batch", "1", "--json", *arguments
        )
        assert json.loads(result.stdout)["budget_bytes"] == budget


def test_norms_and_settings_side_by_side():
    """--norm and --vary make a row for each combination, and what a recipe excludes is named beside the others."""
    vary = ["--vary", "optimizer.accumulate_into=gradient,momentum", "--vary", "train.precision=fp32,bf16"]
    result = invoke("cifar10_mb1", *SMALL, "--norm", "batch,batchless", *vary, "--micro-batch", "1", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert len(rows) == 8
    total = {(row["norm"], *row["settings"].values()): row["total_bytes"] for row in rows}
    for norm in ("batch", "batchless"):
        assert total[norm, "momentum", "fp32"] <= total[norm, "gradient", "fp32"]


def test_the_table_fits_80_columns():
    """Nothing is cut off."""
    result = invoke("cifar10_mb1", *SMALL, "--budget", "1GiB")
    assert result.exit_code == 0, result.output
    assert "…" not in result.stdout
    table = result.stdout.split("weights etc. of")[0]
    assert all(len(line.rstrip()) <= 80 for line in table.splitlines())


def test_nothing_fits():
    """Exit 3: the largest parts, settings that would help with what they would make of it, and the command."""
    smallest = plan_memory(recipe(norm="batch", effective=128), [1], cuda=False)[0].total_bytes
    result = invoke("cifar10_mb1", *SMALL, "--norm", "batch", "--device", "cpu", "--budget", smallest - 1)
    assert isinstance(result.exception, DoesNotFitError)
    assert result.exception.exit_code == 3
    assert "activations" in str(result.exception)
    assert "--set norm={name: batchless}" in result.stdout
    assert "--set " in result.exception.hint


@pytest.mark.parametrize(
    "arguments",
    [
        ["--budget", "lots"],
        ["--budget", "0GiB"],
        ["--device", "tpu"],
        ["--vary", "train.precision"],
        ["--vary", "train.precision=fp32", "--vary", "train.precision=bf16"],
        ["--vary", "train.precison=fp32"],
        ["--norm", "bach"],
        ["--device", "cpu", "--context", "1GiB"],
        ["--micro-batch", "1,x"],
        ["--micro-batch", "4096"],
    ],
)
def test_what_cannot_be_planned_is_a_usage_error(arguments):
    """A wrong option is refused with its name before anything is built."""
    result = invoke("cifar10_mb1", *SMALL, *arguments)
    assert isinstance(result.exception, UsageError), result.output


@given(st.integers(1, 5000))
def test_plan_sizes_end_with_the_whole_batch(effective):
    """1, 2, 4, ... below the effective batch, and the effective batch."""
    sizes = plan_sizes(effective)
    assert sizes[0] == 1
    assert sizes[-1] == effective
    assert sizes == sorted(set(sizes))


def test_the_largest_fit_is_the_last_within_the_budget():
    """None where the smallest is too large."""
    rows = plan_memory(recipe(norm="none"), [1, 2, 4], cuda=False)
    totals = [row.total_bytes for row in rows]
    assert largest_fit(rows, totals[1]) == 2
    assert largest_fit(rows, totals[0] - 1) is None


@pytest.mark.parametrize(
    ("text", "size"), [("4GiB", 2**32), ("1.5 kb", 1500), ("512", 512), ("3 mib", 3 * 2**20), ("2TB", 2 * 10**12)]
)
def test_sizes_are_read(text, size):
    """Binary and decimal units, in any case."""
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1e9", "4 gigs", "0", "inf", "1GiB2", "٤GiB"])
def test_what_is_no_size_is_refused(text):
    """With the text."""
    with pytest.raises(ValueError, match="is not a size"):
        parse_bytes(text)
