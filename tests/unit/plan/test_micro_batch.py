"""`train.micro_batch_size: auto` and `train.memory_budget`: what is chosen fits, and choosing it changes nothing else."""

import copy
import os

import pytest
import torch
from failing_allocator import FailingAllocator

from bln_train.build.experiment import build_experiment
from bln_train.errors import DoesNotFitError, UsageError
from bln_train.experiments.run import run
from bln_train.plan import micro_batch
from bln_train.plan.micro_batch import choose_micro_batch
from bln_train.plan.planner import Remedy, remedies
from bln_train.plan.predict import plan_memory
from bln_train.recipe.load import load_recipe
from bln_train.records import NoticeRecord
from bln_train.runs.checkpoint import load_checkpoint
from bln_train.runs.folder import RunFolder
from bln_train.system import machine
from bln_train.system.machine import limit_memory, may_spill, memory_limit, memory_notices, others_notice, spill_notice
from bln_train.train.step import AccumulationStep

SMALL = [
    "data={name: shapes, num_train: 40, num_test: 10}",
    "model.name=resnet8",
    "train.effective_batch_size=20",
    "train.epochs=1",
    "train.precision=fp64",
    "schedule={name: constant}",
    "runtime.device=cpu",
]


def recipe(*overrides):
    """A short run."""
    return load_recipe("quickstart", [*SMALL, *overrides])


def state_of(experiment):
    """Everything that training goes on from."""
    return experiment.trainer.state_dict()


def assert_equal(a, b):
    """Bit for bit, whatever is inside what."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_equal(one, other)
    else:
        assert a == b


@pytest.mark.parametrize("norm", ["batch", "batchless"])
@pytest.mark.parametrize("into", ["gradient", "momentum"])
def test_choosing_changes_nothing(norm, into):
    """Weights, buffers, optimizer, random numbers, the place in the data: the state after the choice is that before, but for
    the micro-batch, in the middle of a run too."""
    experiment = build_experiment(
        recipe("train.micro_batch_size=4", f"optimizer.accumulate_into={into}").with_norm(norm)
    )
    steps = experiment.trainer.steps()
    next(steps)
    copied = copy.deepcopy(state_of(experiment))
    said = choose_micro_batch(
        recipe("train.micro_batch_size=auto", f"optimizer.accumulate_into={into}").with_norm(norm), experiment
    )
    after = state_of(experiment)
    assert "images/s" in said
    for state in (copied, after):
        state.pop("micro_batch_size"), state.pop("asked_micro_batch_size")
    assert_equal(copied, after)
    assert all(p.grad is None for p in experiment.model.parameters())


def test_the_fastest_of_the_largest_is_taken(monkeypatch):
    """Three candidates are timed; the plan's largest is not taken where a smaller one is faster."""
    asked = []

    def speeds(experiment, sizes, effective):
        asked.extend(sizes)
        return {20: 10.0, 16: 30.0, 8: 20.0}

    monkeypatch.setattr(micro_batch, "_try", speeds)
    experiment = build_experiment(recipe("train.micro_batch_size=auto"))
    said = choose_micro_batch(recipe("train.micro_batch_size=auto"), experiment)
    assert asked == [20, 16, 8]
    assert experiment.trainer.accumulation.micro_batch_size == 16
    assert said.startswith("micro-batch 16 of 20: the largest that fits")


def test_the_budget_bounds_the_choice():
    """With a budget between two predictions the smaller micro-batch is the largest tried."""
    of = recipe("train.micro_batch_size=auto", "runtime.compiled=false")
    of_data = of.with_images(32, 10)
    totals = [row.total_bytes for row in plan_memory(of_data, [1, 2, 4, 8], cuda=False)]
    bounded = recipe("train.micro_batch_size=auto", f"train.memory_budget={totals[2]}B", "runtime.compiled=false")
    experiment = build_experiment(bounded)
    said = choose_micro_batch(bounded, experiment)
    assert experiment.trainer.accumulation.micro_batch_size <= 4
    assert "is 4, predicted" in said


@pytest.mark.parametrize("stated", [True, False], ids=["", "and the micro-batch"])
def test_recompute_auto_keeps_convolutions_where_that_fits_the_budget(stated, monkeypatch):
    """Both sides of the bound; without a budget they are computed again."""
    monkeypatch.setattr(micro_batch, "_try", lambda experiment, sizes, effective: {max(sizes): 1.0})
    size = "train.micro_batch_size=4" if stated else "train.micro_batch_size=auto"
    kept, again = (
        plan_memory(recipe(f"norm.recompute={value}").with_images(32, 10), [4], cuda=False)[0].total_bytes
        for value in ("false", "true")
    )
    assert kept > 1.1 * again
    for budget, recomputes in ((kept, False), (kept - 1, True)):
        of = recipe(size, f"train.memory_budget={budget}B")
        experiment = build_experiment(of)
        assert all(layer.recompute for layer in experiment.trainer.accumulation.folded)
        said = choose_micro_batch(of, experiment, at_most=None if stated else 4)
        assert experiment.trainer.accumulation.micro_batch_size == 4
        assert [layer.recompute for layer in experiment.trainer.accumulation.folded] == [recomputes] * 7
        assert ("norm.recompute: auto" in said) != recomputes
    unbounded = recipe("train.micro_batch_size=4")
    experiment = build_experiment(unbounded)
    assert choose_micro_batch(unbounded, experiment) == ""
    assert all(layer.recompute for layer in experiment.trainer.accumulation.folded)


def test_what_runs_out_of_memory_is_not_taken():
    """A candidate at which memory runs out when it is tried is dropped, and the state is still what it was."""
    of = recipe("train.micro_batch_size=auto", "runtime.compiled=false")
    experiment = build_experiment(of)
    step = experiment.trainer.accumulation
    with FailingAllocator([*step.model.parameters(), *step.model.buffers()]) as allocator:
        allocator.set(limit_bytes=plan_memory(of.with_images(32, 10), [4], cuda=False)[0].total_bytes)
        before = state_of(experiment)["model"]
        speeds = micro_batch._try(experiment, [20, 8, 2], 20)
    assert list(speeds) == [2]
    assert_equal(before, state_of(experiment)["model"])


def test_a_run_with_auto_is_the_run_with_any_number(tmp_path):
    """Law 2: the weights of `auto` are those of micro-batch 1; the choice is in the log and in the checkpoint."""
    finals = []
    for size in ("auto", "1"):
        folder, said = RunFolder(tmp_path / size), []
        run(recipe(f"train.micro_batch_size={size}"), folder, name=size, listen=said.append)
        finals.append(load_checkpoint(folder.checkpoint)["model"])
        if size == "auto":
            notices = [record.text for record in said if isinstance(record, NoticeRecord)]
            assert sum("the largest that fits" in text for text in notices) == 1
            assert any("the largest that fits" in getattr(r, "text", "") for r in folder.records())
    for key, value in finals[0].items():
        torch.testing.assert_close(value, finals[1][key], rtol=1e-10, atol=1e-10)


def test_nothing_fits(tmp_path):
    """Exit 3 before the first step, with the largest parts; no run folder is left."""
    folder = RunFolder(tmp_path / "run")
    for size in ("auto", "4"):
        with pytest.raises(DoesNotFitError, match="the budget is") as error:
            run(recipe(f"train.micro_batch_size={size}", "train.memory_budget=100KiB"), folder, name="x")
        assert error.value.exit_code == 3
        assert not folder.checkpoint.exists()


def test_a_stated_micro_batch_within_the_budget_says_what_is_predicted(tmp_path):
    """The budget is not ignored where the micro-batch is stated."""
    of = recipe("train.micro_batch_size=4", "train.memory_budget=1GiB")
    assert "at micro-batch 4" in choose_micro_batch(of, build_experiment(of))
    assert choose_micro_batch(recipe("train.micro_batch_size=4"), build_experiment(of)) == ""


@pytest.mark.parametrize("budget", ["much", "0", "-1GiB", "4 gigs"])
def test_a_budget_is_a_size(budget):
    """Anything else is an error in the recipe."""
    with pytest.raises(UsageError, match="memory_budget"):
        recipe(f"train.memory_budget='{budget}'")


def test_free_memory_leaves_a_headroom(monkeypatch):
    """A tenth, and at least 256 MiB."""
    monkeypatch.setattr(machine, "_available_memory", lambda: 10 * 2**30)
    assert machine.free_budget(torch.device("cpu")).num_bytes == 9 * 2**30
    monkeypatch.setattr(machine, "_available_memory", lambda: 2**30)
    assert machine.free_budget(torch.device("cpu")).num_bytes == 3 * 2**28


def test_a_run_that_ends_for_want_of_memory_has_the_plans_advice(tmp_path, monkeypatch):
    """At micro-batch 1: exit 3, with settings that would help and what each is predicted to take."""

    def accumulate(self, *arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    of = recipe("train.micro_batch_size=1", "runtime.compiled=false", "train.precision=fp32")
    proposed = [Remedy("train.precision=bf16", "", 3 * 2**20)]
    with monkeypatch.context() as patch:
        patch.setattr(AccumulationStep, "accumulate", accumulate)
        patch.setattr(micro_batch, "remedies", lambda *of, **how: proposed)
        with pytest.raises(DoesNotFitError, match="tried to allocate 2") as error:
            run(of, RunFolder(tmp_path / "run"), name="x")
    assert error.value.exit_code == 3
    assert "Predicted at micro-batch 1:\n  3.00 MiB with --set train.precision=bf16" in error.value.hint
    assert remedies(of.with_images(32, 10), cuda=False, context_bytes=0)  # as the run would have asked for them


def test_the_cards_memory_is_looked_at():
    """Windows and WSL may spill to system memory, Linux does not; others count from 500 MiB beyond what this process holds."""
    assert may_spill("Windows", "10")
    assert may_spill("Linux", "5.15.153.1-microsoft-standard-WSL2")
    assert not may_spill("Linux", "6.8.0-45-generic")
    assert "system memory" in spill_notice(True)
    assert spill_notice(False) == ""
    gib = 2**30
    assert "3.00 GiB of the card's 8.00 GiB" in others_notice(4 * gib, gib, 8 * gib)
    assert others_notice(4 * gib, 4 * gib - 500 * 2**20, 8 * gib) == ""
    assert memory_notices(torch.device("cpu")) == []


def test_a_peak_on_the_cpu_is_held_against_the_stated_budget():
    """A CPU has no bound but train.memory_budget."""
    assert memory_limit(torch.device("cpu"), "1.5GiB") == 3 * 2**29
    assert memory_limit(torch.device("cpu"), None) is None


def test_matrix_products_keep_little_of_a_card(monkeypatch):
    """PyTorch's workspaces are set before CUDA starts, unless somebody has."""
    names = ("CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE")
    monkeypatch.setenv(names[0], ":4096:2")
    monkeypatch.setenv(names[1], "")  # so that it is put back
    monkeypatch.delenv(names[1])
    switches = {"num_threads": None, "deterministic": False, "cudnn_benchmark": False, "tf32": False}
    machine.set_up(torch.device("cpu"), **switches)
    assert names[1] not in os.environ
    machine.set_up(torch.device("cuda"), **switches)
    assert os.environ[names[0]] == ":4096:2"
    assert 1024 * int(os.environ[names[1]]) == machine.WORKSPACE_BYTES
    monkeypatch.delenv(names[0])
    machine.set_up(torch.device("cuda"), **switches)
    _, size, count = os.environ[names[0]].split(":")
    assert 1024 * int(size) * int(count) == machine.WORKSPACE_BYTES


@pytest.mark.gpu
def test_a_peak_on_a_card_is_held_against_what_the_allocator_may_take():
    """Without a budget that is the whole card, with one what is enforced."""
    device = torch.device("cuda")
    total = torch.cuda.get_device_properties(device).total_memory
    assert memory_limit(device, None) == total
    try:
        limit_memory(device, 2**30)
        assert memory_limit(device, None) == pytest.approx(2**30, rel=1e-6)
    finally:
        limit_memory(device, total)
