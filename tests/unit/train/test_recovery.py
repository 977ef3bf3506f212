"""Out of memory inside a run leaves no scar: the step is rolled back, taken again in halves, and the result is the same."""

import random
from contextlib import contextmanager
from functools import cache
from itertools import pairwise

import pytest
import torch
from failing_allocator import FailingAllocator
from helpers import advance, largest_difference, state, tiny_recipe
from typer.testing import CliRunner

from bln_train.build.experiment import build_experiment
from bln_train.cli import app as cli
from bln_train.data.datasets import DataSet, ImageSet
from bln_train.errors import DoesNotFitError
from bln_train.experiments.run import run
from bln_train.norm.statistics import BatchlessStatistics
from bln_train.records import MemoryRecord, NoticeRecord
from bln_train.runs.checkpoint import load_checkpoint
from bln_train.runs.folder import RunFolder
from bln_train.train.evaluate import Evaluation, evaluate
from bln_train.train.loss_scale import LossScale
from bln_train.train.optim import MomentumAccumulatingSGD
from bln_train.train.recovery import Snapshot, is_out_of_memory
from bln_train.train.step import AccumulationStep

SIZE = 8  # pixels


def images(number):
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (number, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    return ImageSet(pixels, torch.randint(0, 4, (number,), generator=generator))


DATA = DataSet(images(17), images(5), ("a", "b", "c", "d"), "drawn")  # steps of 6, 6 and 5 images

CONFIGS = {
    "preset": {},
    "unfolded": {"norm": {"name": "batchless", "probe_images": 4, "init_images": 4, "fold": False}},
    "momentum": {"optimizer": {"name": "sgd", "lr": 0.1, "accumulate_into": "momentum"}},
    "paper-adam": {"norm": {"name": "batchless-paper", "init_images": 4}, "optimizer": {"name": "adam", "lr": 0.003}},
    "kept": {"norm": {"name": "batchless", "probe_images": 4, "init_images": 4, "recompute": False}},
    "group": {"norm": {"name": "group"}},
}


def small_trainer(config="preset", micro_batch_size=4, **changes):
    settings = {
        "data": {"name": "shapes", "augment": {"flip": True, "crop_padding": 2, "cutout": 2}},
        "norm": {"name": "batchless", "probe_images": 4, "init_images": 4},
        "train": {"epochs": 1, "effective_batch_size": 6, "micro_batch_size": micro_batch_size, "precision": "fp64"},
        "optimizer": {"name": "sgd", "lr": 0.1, "nesterov": True},
        "schedule": {"name": "constant"},
    }
    return build_experiment(tiny_recipe(**{**settings, **CONFIGS[config], **changes}), data=DATA).trainer


@contextmanager
def watched(allocator, trainer):
    """Collects the live bytes at each attempt of each step, as (step, bytes), and the numbers of allocations on the device's side:
    in steps and evaluation, not in what the host does in between."""
    attempts, numbers = [], []

    def counted(function, is_step):
        def call(*arguments):
            if is_step:
                attempts.append((trainer.num_steps_done, allocator.live_bytes))
            first = allocator.num_allocations
            out = function(*arguments)
            numbers.extend(range(first + 1, allocator.num_allocations + 1))
            return out

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AccumulationStep, "__call__", counted(AccumulationStep.__call__, True))
        patch.setattr(trainer, "evaluate", counted(trainer.evaluate, False))
        yield attempts, numbers


def warm_up(step):
    """Let the preprocessing make its tables, which stay."""
    one = DATA.train.images[:1]
    step.preprocess.train(one, one[:, 0, 0, 0].long())


@cache
def undisturbed(config):
    """The final state of a run, and where its allocations are."""
    trainer = small_trainer(config)
    _, notices, _, numbers = failing_run(trainer)
    assert not notices
    return state(trainer), numbers


def failing_run(trainer, **settings):
    """Train under an allocator that fails; returns it, the notices, what was alive at each attempt, and where it may fail."""
    step = trainer.accumulation
    existing = [*step.model.parameters(), *step.model.buffers(), step.preprocess.mean, step.preprocess.std]
    existing += [tensor for part in (DATA.train, DATA.test) for tensor in (part.images, part.labels)]
    allocator = FailingAllocator(existing)
    with watched(allocator, trainer) as (attempts, numbers), allocator:
        warm_up(step)
        allocator.set(**settings)
        records = advance(trainer)
    return allocator, [r for r in records if isinstance(r, NoticeRecord)], attempts, numbers


def check_no_scar(trainer, allocator, attempts, expected):
    """One failure, one more attempt at half the micro-batch, from the live bytes that the first began with."""
    again = [(before, after) for before, after in pairwise(attempts) if before[0] == after[0]]
    if len(attempts) == 3:
        assert trainer.accumulation.micro_batch_size == 4  # evaluation alone was disturbed
    else:
        ((before, after),) = again
        assert before[1] - 8 <= after[1] <= before[1]  # MomentumAccumulatingSGD's last norm is let go
        assert trainer.accumulation.micro_batch_size == 2
    assert allocator.num_failures == 1
    assert largest_difference(expected, state(trainer)) < 1e-10


@pytest.mark.parametrize(
    ("config", "number"), [pytest.param("preset", 30, marks=pytest.mark.slow), *((name, 3) for name in CONFIGS)]
)
def test_out_of_memory_anywhere_changes_nothing(config, number):
    """Law 2: whichever allocation of a run fails, the final weights, statistics and momentum are those of the undisturbed run, and
    the step is taken again from the live bytes it began with."""
    expected, numbers = undisturbed(config)
    for fail_at in sorted(random.Random(config).sample(numbers, number)):
        trainer = small_trainer(config)
        allocator, notices, attempts, _ = failing_run(trainer, fail_at=fail_at)
        assert len(notices) == 1, fail_at
        check_no_scar(trainer, allocator, attempts, expected)


PARTS = {
    "preset": [(torch.Tensor, "backward"), (BatchlessStatistics, "update"), (torch.optim.SGD, "step"),
               (BatchlessStatistics, "follow")],
    "momentum": [(MomentumAccumulatingSGD, "begin"), (torch.Tensor, "backward"), (MomentumAccumulatingSGD, "step"),
                 (BatchlessStatistics, "follow")],
    "paper-adam": [(torch.optim.Adam, "step")],
}  # fmt: skip


@cache
def places(config):
    """The number of the last allocation in each part of a step: {(part, step): number}."""
    found, trainer = {}, small_trainer(config)
    model = trainer.accumulation.model
    allocator = FailingAllocator([*model.parameters(), *model.buffers()])

    def noted(name, function):
        def call(*arguments, **settings):
            first = allocator.num_allocations
            out = function(*arguments, **settings)
            if allocator.num_allocations > first:
                found[name, trainer.num_steps_done] = allocator.num_allocations
            return out

        return call

    with pytest.MonkeyPatch.context() as patch, allocator:
        for owner, name in PARTS[config]:
            patch.setattr(owner, name, noted(name, getattr(owner, name)))
        warm_up(trainer.accumulation)
        allocator.set()
        advance(trainer)
    return found


@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize(("config", "part"), [(config, name) for config, parts in PARTS.items() for _, name in parts])
def test_every_part_of_a_step_is_rolled_back(config, part, step):
    """In the first step, whose optimizer state must vanish again, and in a later one: backward, statistics, optimizer, probe."""
    if (part, step) not in places(config):
        assert (config, part, step) == ("momentum", "begin", 2)  # all in place
        return
    trainer = small_trainer(config)
    allocator, notices, attempts, _ = failing_run(trainer, fail_at=places(config)[part, step])
    assert len(attempts) == 4
    assert notices[0].step == step + 1
    check_no_scar(trainer, allocator, attempts, undisturbed(config)[0])


def everything(trainer):
    """All that a step may change, as values and as places in memory."""
    step, optimizer = trainer.accumulation, trainer.accumulation.optimizer
    entries = {
        (n, key): value for n, p in enumerate(step.parameters) for key, value in optimizer.state.get(p, {}).items()
    }
    tensors = {**step.model.state_dict(keep_vars=True), **{k: v for k, v in entries.items() if torch.is_tensor(v)}}
    places = {name: (t.data_ptr(), t.detach().clone(), t.grad is None) for name, t in tensors.items()}
    rest = {k: v for k, v in entries.items() if not torch.is_tensor(v)}
    return places, rest, torch.get_rng_state(), step.loss_scale.state_dict()


@pytest.mark.parametrize("config", [*CONFIGS, "batch", "scaled"])
@pytest.mark.parametrize("num_before", [0, 1])
def test_a_snapshot_is_exact_and_in_place(config, num_before):
    """After a whole step `restore` gives back every bit, in the same memory: weights, buffers of BatchNorm, optimizer, loss scale,
    random numbers; what the step made is gone."""
    changes = {"norm": {"name": "batch"}} if config == "batch" else {}
    trainer = small_trainer(config if config in CONFIGS else "preset", **changes)
    if config == "scaled":
        trainer.accumulation.loss_scale = LossScale("cpu", init_scale=2.0**8, growth_interval=1)
    if num_before:
        advance(trainer, num_before)
    before, snapshot = everything(trainer), Snapshot(trainer.accumulation)
    snapshot.take()
    advance(trainer, num_before + 1)
    torch.rand(3)
    snapshot.restore()
    after = everything(trainer)
    assert before[0].keys() == after[0].keys()
    for name, (place, value, no_grad) in before[0].items():
        assert after[0][name][0] == place, name
        assert torch.equal(after[0][name][1], value), name
        assert after[0][name][2] == no_grad, name
    assert before[1] == after[1]
    assert torch.equal(before[2], after[2])
    assert before[3] == after[3]


def test_snapshots_are_no_memory_of_training():
    """The tracked peak of a run that keeps snapshots, the optimizer's state appearing in it, is that of bare steps."""
    bare = small_trainer()
    bare.recovering_step = bare.accumulation
    first, second = (
        [r for r in advance(trainer) if isinstance(r, MemoryRecord)][-1] for trainer in (bare, small_trainer())
    )
    for name in ("peak", "parameter", "gradient", "optimizer", "activation", "other"):
        assert getattr(first, f"{name}_bytes") == getattr(second, f"{name}_bytes") != 0, name


def peak_of(micro_batch_size):
    trainer = small_trainer("momentum", micro_batch_size)
    trainer.evaluate = lambda _: Evaluation(1.0, 0.0, 1)
    return failing_run(trainer)[0].peak_bytes


def test_a_limit_leads_to_the_micro_batch_that_fits():
    """Under a size that micro-batch 2 needs and 3 exceeds, a run asked for 6 goes 6, 3, 1 in one step, in one notice; the peak on
    record is that of the micro-batch in use."""
    single, three = peak_of(1), peak_of(3)
    trainer = small_trainer("momentum", 6)
    trainer.evaluate = lambda _: Evaluation(1.0, 0.0, 1)
    allocator, notices, _, _ = failing_run(trainer, limit_bytes=(single + three) // 2)
    assert allocator.num_failures >= 2
    (notice,) = notices
    assert "step 1: out of memory at micro-batch 6, 3 (tried to allocate " in notice.text
    assert "goes on with micro-batch 1" in notice.text
    record, alone = trainer.memory_record(), small_trainer("momentum", 1)
    warm_up(alone.accumulation)
    advance(alone)
    assert record.micro_batch_size == 1
    assert record.peak_bytes == alone.memory_record().peak_bytes
    assert largest_difference(state(alone), state(trainer)) < 1e-10


def test_batchnorm_is_told_that_its_result_changes():
    """With BatchNorm the smaller micro-batch is another training, and the notice says so."""
    trainer = small_trainer(norm={"name": "batch"})
    _, (notice,), _, _ = failing_run(trainer, fail_at=30)
    assert "changes the result" in notice.text


def test_a_step_that_was_reduced_is_not_taken_again():
    """Once gradients have been added up over processes one of them cannot take the step again by itself: exit 3, the way on."""
    trainer = small_trainer()
    place = places("preset")["step", 0]
    with pytest.MonkeyPatch.context() as patch:
        original = BatchlessStatistics.update

        def update(*arguments):
            trainer.accumulation.reduced = True  # as the reduction before it would
            return original(*arguments)

        patch.setattr(BatchlessStatistics, "update", update)
        with pytest.raises(DoesNotFitError, match="--resume"):
            failing_run(trainer, fail_at=place)


def test_other_errors_pass():
    """An error that is none of memory is not retried; those that PyTorch reports as RuntimeError are told apart by their text."""
    trainer = small_trainer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchlessStatistics, "update", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            advance(trainer)
    assert trainer.accumulation.micro_batch_size == 4
    for text in ("CUDA error: out of memory", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
                 "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"):  # fmt: skip
        assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_the_found_micro_batch_is_remembered():
    """A checkpoint holds the micro-batch in use and the one asked for: the same request goes on with what was found, and says so;
    another request is taken."""
    trainer = small_trainer()
    failing_run(trainer, fail_at=30)
    saved = trainer.state_dict()
    saved["step"] = 2
    assert (saved["micro_batch_size"], saved["asked_micro_batch_size"]) == (2, 4)
    for asked, used in ((4, 2), (3, 3), (1, 1)):
        resumed = small_trainer(micro_batch_size=asked)
        resumed.load_state_dict(saved)
        assert resumed.accumulation.micro_batch_size == used
        texts = [r.text for r in advance(resumed) if isinstance(r, NoticeRecord)]
        assert len(texts) == (asked == 4)
        assert asked != 4 or "goes on with micro-batch 2, not 4" in texts[0]
        assert resumed.state_dict()["asked_micro_batch_size"] == asked


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_evaluation_goes_on_in_halves(place):
    """Loss and accuracy are the same, whichever allocation fails, no image counted twice or left out."""
    trainer = small_trainer()
    step, was_training = trainer.accumulation, trainer.accumulation.model.training
    settings = {"device": step.device, "batch_size": 4, "autocast": step.autocast}
    whole = FailingAllocator([])
    with whole:
        expected = evaluate(step.model, DATA.train, step.preprocess, **settings)
    assert expected.notices == ()
    per_batch = (whole.num_allocations - 2) // 5  # two sums, then batches of 4, 4, 4, 4 and 1 image
    fail_at = 2 + per_batch + {"first": 1, "middle": per_batch // 2, "last": per_batch}[place]
    with FailingAllocator([], fail_at=fail_at):
        found = evaluate(step.model, DATA.train, step.preprocess, **settings)
    assert abs(found.loss - expected.loss) < 1e-12
    assert found[1:3] == expected[1:3]
    assert len(found.notices) == 1
    assert step.model.training == was_training
    with FailingAllocator([], limit_bytes=2000), pytest.raises(DoesNotFitError, match="one image in evaluation"):
        evaluate(step.model, DATA.train, step.preprocess, **settings)


def test_a_run_that_cannot_fit_keeps_its_checkpoint(tmp_path):
    """At micro-batch 1 nothing is left to halve: exit 3, what would help, and the checkpoint of before, from which the run goes on
    to the result of one that was never stopped. A run that recovers logs one notice."""
    recipe = tiny_recipe(
        train__max_steps=3, train__micro_batch_size=2, runtime={"device": "cpu", "checkpoint_every_steps": 1}
    )
    folder, allocator = RunFolder(tmp_path / "run"), FailingAllocator([])

    def limit(record):
        if isinstance(record, MemoryRecord):  # after the checkpoint of step 2
            allocator.limit_bytes = allocator.live_bytes

    with allocator, pytest.raises(DoesNotFitError, match="out of memory at micro-batch 1") as caught:
        run(recipe, folder, name="run", listen=limit)
    assert caught.value.exit_code == 3
    assert "bf16" in caught.value.hint
    assert load_checkpoint(folder.checkpoint)["step"] == 2
    summary = run(recipe, folder, name="run", resume=True)
    straight = run(recipe, RunFolder(tmp_path / "straight"), name="run")
    assert summary["test_loss"] == straight["test_loss"]

    recovered, allocator = RunFolder(tmp_path / "recovered"), FailingAllocator([])

    def fail_once(record):
        if isinstance(record, MemoryRecord) and allocator.num_failures == 0:  # before step 3
            allocator.set(fail_at=100)

    with allocator:
        again = run(recipe, recovered, name="run", listen=fail_once)
    (text,) = [r.text for r in recovered.records() if isinstance(r, NoticeRecord) and "out of memory" in r.text]
    assert "goes on with micro-batch 1" in text
    assert again["test_loss"] == pytest.approx(straight["test_loss"], abs=1e-9)


def test_the_command_line_says_what_to_do(tmp_path):
    """`bln-train run` that does not fit: exit 3, no traceback, the way out."""
    arguments = ["run", "quickstart", "--device", "cpu", "--out", str(tmp_path / "run"), "--set", "train.max_steps=1"]
    arguments += ["--set", "data.num_train=40", "--set", "data.num_test=10", "--set", "norm.init_images=4"]
    arguments += ["--set", "train.micro_batch_size=2", "--set", "norm.probe_images=2"]

    def begin(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity ...")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AccumulationStep, "__call__", begin)
        result = CliRunner().invoke(cli.app, arguments)
    error = result.exception
    assert isinstance(error, DoesNotFitError)
    assert error.exit_code == 3
    assert error.problem == "out of memory at micro-batch 1: tried to allocate 20.00 MiB"
