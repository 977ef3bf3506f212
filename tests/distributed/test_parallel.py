"""Several processes, one answer (docstrings are laws). Fast tests run the ranks as threads; slow ones run real processes."""

import copy
import os
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from helpers import advance, largest_difference, state, tiny_recipe

from bln_train.build.experiment import build_experiment
from bln_train.errors import UsageError
from bln_train.experiments.open_run import begin_together, check_same_batchnorm
from bln_train.norm import BatchlessNorm2d
from bln_train.norm.statistics import BatchlessStatistics
from bln_train.records import EpochRecord, StepRecord
from bln_train.train.distributed import ALONE, PIECE_BYTES, World, _pieces, reduce_step
from bln_train.train.loss_scale import LossScale

ROOT = Path(__file__).parents[2]
SGD = {"name": "sgd", "lr": 0.1, "weight_decay": 0.05}
# Batches of 10, 10 and 3 images: with four processes the third batch leaves one of them without an image.
RAGGED = {
    "data__num_train": 23,
    "train__effective_batch_size": 10,
    "train__micro_batch_size": 3,
    "train__epochs": 1,
    # Parts of two images, which 1, 2 and 3 processes share.
    "norm": {"name": "batchless-plain", "probe_images": 6, "init_images": 4, "correction_parts": 6},
}


class ThreadWorld(World):
    """A rank that is a thread of this process: the real code down to the one call that adds buffers up."""

    def __init__(self, rank, size, slots, barrier):
        super().__init__(rank, size)
        self.slots, self.meeting = slots, barrier

    def first_rank_first(self):
        return nullcontext()  # BUILDING has the threads build one after the other

    def _all_reduce(self, buffer):
        self.slots[self.rank] = buffer.clone()
        self.meeting.wait(60)
        total = sum(self.slots[1:], self.slots[0])
        self.meeting.wait(60)
        buffer.copy_(total)
        self.num_collectives += 1
        self.num_bytes += buffer.nbytes


def in_ranks(size, work):
    """work(world) of each rank, at once; raises what the first rank that failed raised."""
    slots, barrier, results = [None] * size, threading.Barrier(size), [None] * size

    def one(rank):
        try:
            results[rank] = work(ThreadWorld(rank, size, slots, barrier))
        except BaseException as error:
            results[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failed = [r for r in results if isinstance(r, BaseException)]
    for error in sorted(failed, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error
    return results


BUILDING = threading.Lock()  # torch.manual_seed is of the whole process


def trained(recipe, world=None, *, num_steps=None, resume=None, change=lambda trainer: None):
    with BUILDING:
        experiment = build_experiment(recipe, initialize=resume is None, world=world or ALONE)
    trainer = experiment.trainer
    if resume is not None:
        trainer.load_state_dict(copy.deepcopy(resume))  # an optimizer keeps the tensors it is given
    if world is not None:
        begin_together(world, recipe, experiment)
    change(trainer)
    records = advance(trainer, num_steps)
    return trainer, records


VARIANTS = {
    "sgd, clipped, nesterov, probe, correction": {"norm__correction_parts": 4},
    "three parts each": {"norm__correction_parts": 12},
    "no clipping, no probe": {
        "norm__correction_parts": 4,
        "norm__probe_images": 0,
        "optimizer": {**SGD, "clip_norm": None},
    },
    "no correction, not folded": {
        "norm": {**RAGGED["norm"], "correction_parts": "auto", "correction_rate": 0.0, "fold": False}
    },
    "into momentum, update clipped": {
        "norm__correction_parts": 4,
        "optimizer": {**SGD, "accumulate_into": "momentum", "clip_norm": 0.05},
    },
    "groups of channels": {"norm": {**RAGGED["norm"], "name": "batchless", "correction_parts": 8}},
    "paper, adam": {"norm": {"name": "batchless-paper", "init_images": 4}, "optimizer": {"name": "adam", "lr": 1e-3}},
    "group, adamw": {"norm": {"name": "group"}, "optimizer": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_several_processes_end_where_one_does(variant):
    """Law 2 over processes: every tensor of the state, for shares that are ragged and one that is empty; all ranks agree."""
    recipe = tiny_recipe(**RAGGED | VARIANTS[variant])
    alone, _ = trained(recipe)
    ranks = in_ranks(4, lambda world: trained(recipe, world))
    assert largest_difference(state(alone), state(ranks[0][0])) < 1e-10
    for other, _ in ranks[1:]:
        assert all(torch.equal(a, b) for a, b in zip(state(ranks[0][0]).values(), state(other).values(), strict=True))


def test_by_default_each_process_balances_its_own_share():
    """Two processes end where one does that balances two parts, and not where one does that balances the whole batch."""
    recipe, parts = (
        tiny_recipe(**RAGGED | {"norm": {**RAGGED["norm"], "correction_parts": number}}) for number in ("auto", 2)
    )
    found = state(in_ranks(2, lambda world: trained(recipe, world))[0][0])
    assert largest_difference(state(trained(parts)[0]), found) < 1e-10
    assert largest_difference(state(trained(recipe)[0]), found) > 1e-6


def test_resume_with_other_processes_and_micro_batches():
    """A run that goes on with another number of processes and another micro-batch ends where one that never stopped ends."""
    for variant in ({}, {"optimizer": {**SGD, "accumulate_into": "momentum", "clip_norm": 0.05}}):
        recipe = tiny_recipe(**RAGGED | variant)
        whole = state(trained(recipe)[0])
        stopped = in_ranks(2, lambda world: trained(recipe, world, num_steps=2)[0].state_dict())[0]  # noqa: B023
        finer = tiny_recipe(**RAGGED | variant | {"train__micro_batch_size": 1})
        for work in (
            lambda: in_ranks(3, lambda world: trained(finer, world, resume=stopped))[0],  # noqa: B023
            lambda: trained(finer, resume=stopped),  # noqa: B023
        ):
            assert largest_difference(whole, state(work()[0])) < 1e-10


def test_a_step_is_one_collective_of_the_gradients_size():
    """A step sends one buffer whatever the micro-batch: gradients, and per norm channel 2 probe sums and 2 statistics."""
    for micro in (1, 10):
        recipe = tiny_recipe(**RAGGED | {"train__micro_batch_size": micro})
        sent = []

        def note(trainer, sent=sent):
            world, take_step = trainer.accumulation.world, trainer.recovering_step.__call__

            def noting(*args):
                before = world.num_collectives, world.num_bytes
                found = take_step(*args)
                sent.append((world.num_collectives - before[0], world.num_bytes - before[1]))
                return found

            trainer.recovering_step = Wrapped(trainer.recovering_step, noting)

        trainer, _ = in_ranks(2, lambda world, note=note: trained(recipe, world, num_steps=2, change=note))[0]  # noqa: B023
        layers = trainer.accumulation.statistics.layers.values()
        gradients = sum(p.numel() for p in trainer.accumulation.model.parameters())
        channels = sum(layer.num_features for layer in layers)
        counts = 2 * (len(list(trainer.accumulation.model.parameters())) + 3 * len(layers) + 1) + 2
        assert {number for number, _ in sent} == {1}
        assert {size for _, size in sent} == {8 * (gradients + 4 * channels + counts)}


class Wrapped:
    """A step whose call is another function."""

    def __init__(self, step, call):
        self.step, self.call = step, call

    def __call__(self, *args):
        return self.call(*args)

    def __getattr__(self, name):
        return getattr(self.step, name)


def test_records_are_those_of_one_process():
    """Loss, accuracy, gradient norm, likelihoods and the evaluation in shares are what one process logs, in every rank."""
    recipe = tiny_recipe(**RAGGED)
    alone = trained(recipe)[1]
    for _, records in in_ranks(3, lambda world: trained(recipe, world)):
        for one, other in zip(alone, records, strict=True):
            for key in (
                "loss",
                "accuracy",
                "grad_norm",
                "nll",
                "num_images",
                "train_loss",
                "test_loss",
                "test_accuracy",
            ):
                if isinstance(one, StepRecord | EpochRecord) and getattr(one, key, None) is not None:
                    assert getattr(other, key) == pytest.approx(getattr(one, key), rel=1e-10), key


def test_an_overflow_in_one_process_skips_the_step_in_all():
    """fp16: where a gradient is infinite in one process, all skip the step and lower the loss scale, then go on alike."""
    recipe = tiny_recipe(**RAGGED)

    def scaled(trainer):
        trainer.accumulation.loss_scale = LossScale("cpu", init_scale=16.0)
        if trainer.accumulation.world.rank == 1:
            plain, accumulate = trainer.accumulation.accumulate, []

            def overflowing(*args):
                found = plain(*args)
                if not accumulate:
                    next(trainer.accumulation.model.parameters()).grad.fill_(torch.inf)
                accumulate.append(1)
                return found

            trainer.accumulation.accumulate = overflowing

    ranks = [trainer for trainer, _ in in_ranks(2, lambda world: trained(recipe, world, change=scaled))]
    assert [trainer.accumulation.loss_scale.get_scale() for trainer in ranks] == [8.0, 8.0]
    assert largest_difference(state(ranks[0]), state(ranks[1])) == 0
    assert all(tensor.isfinite().all() for tensor in state(ranks[0]).values())


def test_all_stop_after_the_same_step():
    """When one process is asked to stop, every process sees it after the same step, and no earlier."""
    recipe = tiny_recipe(**RAGGED)

    def work(world):
        seen = []

        def ask(trainer):
            world.stop_asked = lambda: world.rank == 1 and trainer.num_steps_done == 1

            seen.extend(
                world.should_stop
                for record in trainer.steps()
                if isinstance(record, StepRecord) and trainer.num_steps_done < 3
            )

        trained(recipe, world, change=ask)
        return seen

    assert in_ranks(3, work) == [[False, True]] * 3


def test_a_parameter_nobody_reaches_keeps_no_gradient():
    """A weight that no image reaches in any process is left alone, as in one process; its decay would move it."""
    recipe = tiny_recipe(**RAGGED | {"optimizer": {**SGD, "clip_norm": None}})

    def freeze(trainer):
        trainer.before = trainer.accumulation.model.fc.weight.detach().clone()
        trainer.accumulation.model.fc.weight.requires_grad_(False)

    for trainer, _ in in_ranks(2, lambda world: trained(recipe, world, num_steps=1, change=freeze)):
        assert torch.equal(trainer.accumulation.model.fc.weight, trainer.before)


def test_statistics_are_those_of_the_first_process():
    """The probe runs in every process; where its last bits differ, as they may on GPUs, the next step's sum ends the difference."""
    recipe = tiny_recipe(**RAGGED)

    def work(world):
        def disturb(trainer):
            if world.rank == 1:
                for layer in trainer.accumulation.statistics.layers.values():
                    layer.mean.data += 1e-9
                    layer.raw_std.data += 1e-9

        return trained(recipe, world, num_steps=1, change=disturb)[0]

    first, second = in_ranks(2, work)
    for name, layer in first.accumulation.statistics.layers.items():
        other = second.accumulation.statistics.layers[name]
        assert torch.equal(layer.mean, other.mean)
        assert torch.equal(layer.raw_std, other.raw_std)


def test_batchnorm_is_evaluated_and_resumed_as_it_was_trained():
    """Every process evaluates the network that rank 0 saves; with other processes BatchNorm is another run, so it is refused."""
    recipe = tiny_recipe(**RAGGED | {"norm": {"name": "batch"}})
    with BUILDING:
        saved = build_experiment(recipe, initialize=False).trainer
    ranks = in_ranks(2, lambda world: trained(recipe, world))
    losses = {records[-2].test_loss for _, records in ranks}
    assert len(losses) == 1
    saved.load_state_dict(ranks[0][0].state_dict())
    assert losses.pop() == pytest.approx(saved.evaluate(saved.data.test).loss, rel=1e-10)
    check_same_batchnorm(recipe, {"world_size": 2}, World(0, 2))
    with pytest.raises(UsageError, match="begun with 2 processes"):
        check_same_batchnorm(recipe, {"world_size": 2}, World())


def test_shares_are_contiguous_and_differ_by_one():
    """Shares of any number of items, in rank order, are the items; the first has one where any has, and none has two more."""
    for size in (1, 2, 3, 4, 7):
        for num in range(20):
            shares = [World(rank, size).share(range(num)) for rank in range(size)]
            assert [item for share in shares for item in share] == list(range(num))
            assert len(shares[0]) - len(shares[-1]) in (0, 1)


def test_the_buffer_is_bounded():
    """Pieces cover every element once, and none is larger than the bound but where one row is."""
    tensors = [
        torch.arange(n, dtype=torch.float32).view(shape)
        for n, shape in ((30, (10, 3)), (1, ()), (24, (2, 12)), (7, (7,)))
    ]
    tensors[0] = tensors[0].t()  # as it comes: not contiguous
    pieces = list(_pieces(tensors, 10))
    assert max(sum(p.numel() for p in piece) for piece in pieces) == 12
    assert sum(p.numel() for piece in pieces for p in piece) == 62
    for piece in pieces:
        torch._foreach_mul_(piece, 2)
    assert all(torch.equal(t.flatten().sort()[0], 2.0 * torch.arange(t.numel())) for t in tensors)
    assert PIECE_BYTES == 16 * 2**20


def test_no_collective_is_larger_than_the_bound():
    """A gradient of several times the bound is added up in pieces of at most that."""

    def work(world):
        sizes, send = [], world._all_reduce
        world._all_reduce = lambda buffer: (sizes.append(buffer.nbytes), send(buffer))
        gradient = torch.full((3, PIECE_BYTES // 4 - 1), 1.0 + world.rank)
        world.all_reduce_([gradient, torch.ones(5)])
        assert (gradient == 3).all()
        return sizes

    for sizes in in_ranks(2, work):
        assert max(sizes) <= PIECE_BYTES
        assert sum(sizes) == 4 * (3 * (PIECE_BYTES // 4 - 1) + 5)


def test_counts_are_exact_beyond_what_a_float_counts():
    """Positions of an effective batch of large images, more than 2^24, where float32 leaves out every other whole number."""
    count = 2**24 + 1

    def work(world):
        statistics = BatchlessStatistics(torch.nn.Sequential(BatchlessNorm2d(2)))
        (layer,) = statistics.layers.values()
        layer.account.num_images, layer.account.num_positions = 1, count
        weight = torch.nn.Parameter(torch.ones(2))
        reduce_step(world, [weight], statistics, [torch.zeros(())])
        return layer.account.num_images, layer.account.num_positions

    assert in_ranks(3, work) == [(3, 3 * count)] * 3


def test_processes_that_differ_are_named():
    """Other data, recipe or checkpoint in one process is an error that names what and who, in every process."""
    recipe, other = tiny_recipe(**RAGGED), tiny_recipe(**RAGGED | {"optimizer__lr": 0.2})
    with pytest.raises(UsageError, match="processes 2 have other recipe than process 0"):
        in_ranks(3, lambda world: trained(other if world.rank == 2 else recipe, world, num_steps=1))


def test_one_process_sends_nothing():
    """Without torchrun there is no process group, and RANK and WORLD_SIZE of a cluster's own are not torchrun's."""
    code = """
import torch.distributed, os
from bln_train.train.distributed import joined
with joined(torch.device("cpu"), 5) as world:
    world.barrier()
    assert world.size == 1 and world.num_collectives == 0 and not torch.distributed.is_initialized()
"""
    subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "RANK": "3", "WORLD_SIZE": "9"}, check=True
    )
