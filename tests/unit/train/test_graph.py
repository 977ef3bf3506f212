"""Law 6: replayed micro-steps equal eager ones. On the CPU operators are recorded, on CUDA graphs."""

import copy

import pytest
import torch
from helpers import tiny_recipe
from recorder import OperatorRecorder

from bln_train.build.experiment import build_experiment
from bln_train.errors import UsageError
from bln_train.norm.kernels.table import use_kernels
from bln_train.records import NoticeRecord
from bln_train.train.batches import EffectiveBatch
from bln_train.train.cuda_graphs import NUM_STEPS_TO_RECORD, GraphedSteps
from bln_train.train.recovery import Snapshot

CASES = {
    "folded": {},
    "micro-batch 3, short last batch": {"train__micro_batch_size": 3, "data__num_train": 20},
    "published": {"norm": {"name": "batchless-paper"}},
    "not folded": {"norm": {"name": "batchless-plain", "fold": False}, "model__weight_standardization": False},
    "momentum": {"optimizer": {"name": "sgd", "lr": 0.1, "accumulate_into": "momentum"}},
    "adamw": {"optimizer": {"name": "adamw", "lr": 0.01}},
    "plain": {"norm__name": "batchless-plain"},
    "kept": {"norm": {"name": "batchless-plain", "recompute": False}},
    "groups": {"norm": {"name": "batchless", "channel_groups": 4}},
    "batch": {"norm": {"name": "batch"}, "train__micro_batch_size": 2},
    "group": {"norm": {"name": "group"}, "model__weight_standardization": False},
    "one micro-batch": {"train__micro_batch_size": 8},
    "no probe": {"norm": {"name": "batchless-plain", "probe_images": 0}},
}


def train(recipe, recorder=None, device="cpu"):
    experiment = build_experiment(recipe)
    if device == "cpu":
        use_kernels(False)  # kernels in C are no operators
    step = experiment.trainer.accumulation
    if recorder is not None:
        step.graphs = GraphedSteps(step, 32, recorder=recorder)
    records = list(experiment.trainer.steps())
    return experiment.model.state_dict(), records


@pytest.fixture(autouse=True)
def _restore():
    yield
    use_kernels(True)


@pytest.mark.parametrize("case", CASES)
def test_law_6_replay_equals_eager(case):
    """Whole runs, to the last bit: weights, statistics, corrections, losses."""
    recipe = tiny_recipe(**CASES[case])
    expected, eager = train(recipe)
    recorder = OperatorRecorder()
    found, records = train(recipe, recorder)
    assert recorder.num_recorded > 0
    assert recorder.num_replayed > 0
    assert [r for r in records if isinstance(r, NoticeRecord)] == [r for r in eager if isinstance(r, NoticeRecord)]
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert [getattr(r, "train_loss", None) for r in records] == [getattr(r, "train_loss", None) for r in eager]


def test_every_part_of_a_step_is_recorded_once():
    """After some steps nothing but replays, and no part is forgotten."""
    experiment = build_experiment(tiny_recipe(train__epochs=6, train__micro_batch_size=1))
    use_kernels(False)
    trainer, recorder = experiment.trainer, OperatorRecorder()
    step = trainer.accumulation
    step.graphs = GraphedSteps(step, 8, recorder=recorder)
    parts = ["begin fold", "micro-step", "end fold", "update", "follow"]
    for n in range(NUM_STEPS_TO_RECORD + 1):
        num_replayed, num_recorded = recorder.num_replayed, recorder.num_recorded
        totals = step(EffectiveBatch(trainer.data.train, torch.arange(8), 0, n))
        assert all(layer.old_moments is None for layer in step.statistics.layers.values())
    micro_steps = len([kind for kind in step.graphs._recordings if kind[0] == "micro-step"])
    assert {kind[0] for kind in step.graphs._recordings} == set(parts)
    assert recorder.num_recorded == num_recorded
    assert recorder.num_recorded == len(step.graphs._recordings) == len(parts) - 1 + micro_steps
    assert recorder.num_replayed - num_replayed == len(parts) - 1 + 8
    nll = totals.nll.clone()
    step(EffectiveBatch(trainer.data.train, torch.arange(8, 16), 0, 0))
    assert torch.equal(totals.nll, nll), "a step's totals are the caller's"
    assert len(step.graphs._num_eager) <= 2, "the probe before the update was recorded"


def test_a_large_probe_is_not_recorded_and_changes_nothing():
    """Micro-steps of one image are, and what they read; the rest runs eagerly."""
    recipe = tiny_recipe(train__micro_batch_size=1)
    expected, _ = train(recipe)
    experiment = build_experiment(recipe)
    use_kernels(False)
    step = experiment.trainer.accumulation
    assert step.probe_images > 2
    step.graphs = GraphedSteps(step, 32, recorder=OperatorRecorder(), most_pixels=2 * 32**2)
    list(experiment.trainer.steps())
    assert {kind[0] for kind in step.graphs._recordings} == {"begin fold", "micro-step"}
    found = experiment.model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_what_cannot_be_recorded_runs_eagerly_and_is_said():
    recipe = tiny_recipe()
    expected, _ = train(recipe)
    found, records = train(recipe, OperatorRecorder(fails=True))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    notices = [r.text for r in records if isinstance(r, NoticeRecord)]
    assert sum("CUDA graphs are off" in text and "not permitted" in text for text in notices) == 1


def test_the_size_decides_and_a_rollback_forgets_nothing():
    """Too large micro-batches run eagerly; new momentum buffers are recorded anew."""
    recipe = tiny_recipe(optimizer={"name": "sgd", "lr": 0.1, "accumulate_into": "momentum"})
    experiment = build_experiment(recipe)
    use_kernels(False)
    trainer, recorder = experiment.trainer, OperatorRecorder()
    step = trainer.accumulation
    step.graphs = GraphedSteps(step, 32, recorder=recorder, most_pixels=1023)
    batch = EffectiveBatch(trainer.data.train, torch.arange(8), 0, 0)
    step(batch)
    step(batch)
    assert recorder.num_recorded == 0
    step.graphs.most_pixels = None
    for _ in range(4):
        totals = step(batch)
    first, loss = recorder.num_recorded, float(totals.loss)
    assert first > 0
    trainer.load_state_dict(copy.deepcopy(trainer.state_dict()))
    for _ in range(4):
        step(batch)
    assert recorder.num_recorded == 2 * first
    assert float(totals.loss) == loss, "a step's totals are the caller's"


def test_a_rollback_lets_the_recordings_go_and_training_goes_on_the_same():
    """What `auto` tries out and what ran out of memory leave nothing behind."""
    recipe = tiny_recipe()
    results = []
    for recorder in (None, OperatorRecorder()):
        experiment = build_experiment(recipe)
        use_kernels(False)
        step, batch = experiment.trainer.accumulation, EffectiveBatch(experiment.data.train, torch.arange(8), 0, 0)
        if recorder is not None:
            step.graphs = GraphedSteps(step, 32, recorder=recorder)
        for size in (2, 1):
            snapshot = Snapshot(step)
            snapshot.take()
            step.micro_batch_size = size
            for _ in range(3):
                step(batch)
            snapshot.restore()
        if recorder is not None:
            assert recorder.num_recorded > 1
            assert not step.graphs._recordings
        for _ in range(3):
            step(batch)
        results.append(experiment.model.state_dict())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_graphs_without_cuda_are_refused():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(UsageError, match=r"runtime\.graphs"):
        build_experiment(tiny_recipe(runtime__graphs=True))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_law_6_on_cuda(case):
    recipe = {**CASES[case], "runtime__device": "cuda", "runtime__deterministic": True}
    expected, eager = train(tiny_recipe(**recipe, runtime__graphs=False), device="cuda")
    found, records = train(tiny_recipe(**recipe, runtime__graphs=True), device="cuda")
    assert not [r for r in records if isinstance(r, NoticeRecord) and "CUDA graphs" in r.text]
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert [getattr(r, "train_loss", None) for r in records] == [getattr(r, "train_loss", None) for r in eager]
