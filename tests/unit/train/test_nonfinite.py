"""Numbers going wrong: a step that is not finite is never taken, its first layer is named, what is on disk is from before."""

from __future__ import annotations

import math
import re

import pytest
import torch
from helpers import advance, state, tiny_recipe, trained
from torch import nn

from bln_train.build.experiment import build_experiment
from bln_train.errors import DivergedError
from bln_train.experiments.run import run
from bln_train.norm import BatchlessChannelNorm, BatchlessNorm2d
from bln_train.recipe.load import parse_recipe
from bln_train.records import EpochRecord, NoticeRecord, StepRecord
from bln_train.runs.checkpoint import load_checkpoint
from bln_train.runs.folder import RunFolder
from bln_train.train import trainer as trainer_module
from bln_train.train.health import HealthWatch, layer_health
from bln_train.train.loss_scale import LossScale
from bln_train.train.trainer import MAX_SKIPPED_IN_A_ROW

SKIP = {"train__on_nonfinite": "skip", "train__effective_batch_size": 4, "train__micro_batch_size": 4}


class Poison:
    """Preprocessing that hands out NaN images while `steps` says so, counting the steps of a trainer."""

    def __init__(self, trainer, steps):
        self.inner, self.trainer, self.steps = trainer.accumulation.preprocess, trainer, steps
        trainer.accumulation.preprocess = self

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def train(self, images, seeds):
        inputs = self.inner.train(images, seeds)
        if self.trainer.num_steps_done in self.steps:
            inputs[-1] = math.nan
        return inputs


def poisoned(steps, **changes):
    trainer = build_experiment(tiny_recipe(**changes)).trainer
    Poison(trainer, steps)
    return trainer


def fault(trainer):
    with pytest.raises(DivergedError) as caught:
        advance(trainer)
    assert caught.value.hint
    return caught.value.problem


# Stopping


@pytest.mark.parametrize("norm", ["batchless", "batchless-paper", "batch", "group", "none"])
def test_a_bad_step_changes_nothing(norm):
    """A step that is not finite raises before it moves a weight, momentum, statistic or correction, BatchNorm's included."""
    trainer = poisoned({2}, norm={"name": norm}, train__micro_batch_size=5)
    expected = {
        key: value.clone()
        for key, value in state(trained(tiny_recipe(norm={"name": norm}, train__micro_batch_size=5), 2)).items()
    }
    assert "step 3: the loss is nan; in the forward pass, layer stem" in fault(trainer)
    found = state(trainer)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert trainer.num_steps_done == 2


def statistics_of(norm):
    return norm.batchless if isinstance(norm, BatchlessChannelNorm) else norm


def spoil(model, how):
    norm, conv = model.blocks[1].norm2, model.blocks[1].conv2
    with torch.no_grad():
        if how == "weight":
            conv.weight[0, 0, 0, 0] = math.inf
        elif how == "statistic":
            statistics_of(norm).mean[3] = math.nan
        elif how == "collapsed":
            statistics_of(norm).raw_std[3] = -120.0  # exp: its square is no float32
        elif how == "affine":
            norm.weight.fill_(1e38)


@pytest.mark.parametrize("micro_batch_size", [3, 16])
@pytest.mark.parametrize("name", ["batchless", "batchless-plain"])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("weight", r"before the step, weight of layer blocks\.1\.conv2 \(\w+\) is not finite in 1 of \d+ entries"),
        (
            "statistic",
            r"before the step, mean of layer blocks\.1\.norm2(\.0)? \(BatchlessNorm2d\) is not finite in 1 of",
        ),
        (
            "collapsed",
            r"in the forward pass, layer blocks\.1\.norm2(\.0)? \(BatchlessNorm2d\): mu .* to .*, sigma 0 to",
        ),
        (
            "affine",
            r"in the forward pass, layer blocks\.1\.norm2( \(BatchlessNorm2d\): mu .*input of mean|\.1 \(GroupNorm)",
        ),
    ],
)
def test_the_first_layer_is_named(how, message, name, micro_batch_size):
    """Whatever went wrong in a layer in the middle, it is that layer which is named, with its statistics, folded as it is."""
    experiment = build_experiment(
        tiny_recipe(norm__name=name, train__precision="fp32", train__micro_batch_size=micro_batch_size)
    )
    spoil(experiment.model, how)
    found = fault(experiment.trainer)
    assert found.startswith("step 1: ")
    assert re.search(message, found), found
    assert "blocks.1." in found


class SpoilsGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, value):
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.value, None


class Spoiler(nn.Module):
    def __init__(self, inner, value):
        super().__init__()
        self.inner, self.value = inner, value

    def forward(self, x):
        return SpoilsGradient.apply(self.inner(x), self.value)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_bad_gradient_is_named(norm):
    """Where the forward pass is finite and the backward is not, the first layer on the way back is named."""
    experiment = build_experiment(tiny_recipe(norm={"name": norm}))
    experiment.model.blocks[1].conv2 = Spoiler(experiment.model.blocks[1].conv2, math.nan)
    found = fault(experiment.trainer)
    assert (
        "step 1: a gradient is not finite; in the backward pass, the gradient of the output of layer blocks.1.conv2"
        in found
    )


def test_a_sum_that_overflows_is_named():
    """Where each micro-batch is finite and their sum's norm is not, the layer of the largest gradient is named."""
    experiment = build_experiment(tiny_recipe(norm={"name": "group"}, train__precision="fp32"))
    experiment.model.blocks[1].conv2 = Spoiler(experiment.model.blocks[1].conv2, 1e25)
    found = fault(experiment.trainer)
    assert "a gradient is not finite; no micro-batch by itself" in found
    assert re.search(r"largest entry is \d\S*e\+2\d", found), found


def test_gradients_of_statistics_count():
    """A likelihood that overflows while loss and weights' gradients are finite stops the run too: no optimizer sees it."""
    experiment = build_experiment(tiny_recipe(norm={"name": "batchless", "fold": False}))
    trainer = experiment.trainer
    watched = experiment.model.blocks[0].norm1.batchless.mean
    watched.register_hook(lambda g: g * math.inf)
    assert "a gradient is not finite" in fault(trainer)
    assert bool(watched.isfinite().all())


def test_momentum_that_gathers_gradients_stops_too():
    """With accumulate_into: momentum a bad step stops before the weights move, with the layer's name; skip is refused."""
    section = {"name": "sgd", "lr": 0.1, "accumulate_into": "momentum"}
    trainer = poisoned({2}, optimizer=section)
    before = None
    for _ in trainer.steps():
        if trainer.num_steps_done == 2:
            before = {k: v.clone() for k, v in trainer.accumulation.model.state_dict().items()}
            break
    assert "layer stem" in fault(trainer)
    assert all(torch.equal(before[k], v) for k, v in trainer.accumulation.model.state_dict().items())
    with pytest.raises(ValueError, match="cannot leave a step out"):
        tiny_recipe(optimizer=section, train__on_nonfinite="skip")


# What is on disk


def run_poisoned(tmp_path, monkeypatch, steps, **changes):
    steps_of = trainer_module.Trainer.steps

    def poisoned_steps(self, *stop_asked):
        Poison(self, steps)
        return steps_of(self, *stop_asked)

    monkeypatch.setattr(trainer_module.Trainer, "steps", poisoned_steps)
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(DivergedError) as caught:
        run(tiny_recipe(**changes), folder, name="tiny")
    monkeypatch.undo()
    return folder, caught.value


def test_the_checkpoint_is_from_before(tmp_path, monkeypatch):
    """After a bad step the checkpoint is that of before, its step is said with a command, and that command's run goes on."""
    folder, error = run_poisoned(tmp_path, monkeypatch, {4})
    assert load_checkpoint(folder.checkpoint)["step"] == 3
    assert f"{folder.checkpoint} is of step 3, before that" in error.hint
    assert f"--out {folder.path} --resume --set train.on_nonfinite=skip" in error.hint
    text = (folder.path / "recipe.yaml").read_text()
    recipe = parse_recipe(text, origin="recipe.yaml", overrides=["train.on_nonfinite=skip"])
    assert run(recipe, folder, name="tiny", resume=True)["steps"] == 6


def test_without_a_checkpoint_that_is_said(tmp_path, monkeypatch):
    """A run that diverges before its first checkpoint leaves none, and says so."""
    folder, error = run_poisoned(tmp_path, monkeypatch, {1})
    assert "No checkpoint had been written yet" in error.hint
    assert not folder.checkpoint.exists()


def test_a_spoilt_state_is_never_saved():
    """Weights, statistics or momentum that are not finite are no state to go on from: it is refused by name."""
    trainer = trained(tiny_recipe(), 2)
    assert trainer.state_dict()
    trainer.accumulation.model.blocks[0].norm1.batchless.raw_std.data[1] = math.inf
    with pytest.raises(DivergedError, match=r"after step 2: blocks\.0\.norm1\.0\.raw_std is not finite"):
        trainer.state_dict()
    trainer = trained(tiny_recipe(), 2)
    weight = trainer.accumulation.model.blocks[0].conv1.weight
    trainer.accumulation.optimizer.state[weight]["momentum_buffer"][0] = math.nan
    with pytest.raises(DivergedError, match=r"momentum_buffer of blocks\.0\.conv1\.weight is not finite"):
        trainer.state_dict()


# Skipping


@pytest.mark.parametrize(("norm", "optimizer"), [("batchless", "sgd"), ("batchless-paper", "adam"), ("batch", "sgd")])
def test_skipped_steps_leave_no_trace(norm, optimizer):
    """Skipping, the state after a bad step is bitwise that of before it, the step counts, and training goes on."""
    changes = {"norm": {"name": norm}, "optimizer": {"name": optimizer, "lr": 0.01}, "train__micro_batch_size": 5}
    trainer = poisoned({1, 4}, **changes, train__on_nonfinite="skip")
    snapshots, records = {}, []
    for record in trainer.steps():
        records.append(record)
        snapshots[trainer.num_steps_done] = {key: value.clone() for key, value in state(trainer).items()}
    for before, after in ((1, 2), (4, 5)):
        if after in snapshots:
            assert all(torch.equal(snapshots[before][k], snapshots[after][k]) for k in snapshots[before])
    assert not any(torch.equal(snapshots[2][k], snapshots[6][k]) for k in snapshots[2] if k.endswith("conv1.weight"))
    assert all(bool(value.isfinite().all()) for value in state(trainer).values())
    assert [r.step for r in records if isinstance(r, StepRecord)] == [1, 3, 4, 6]
    notices = [r.text for r in records if isinstance(r, NoticeRecord) and "skipped" in r.text]
    assert len(notices) == 1
    assert notices[0].startswith("step 2: the loss is nan; in the forward pass, layer stem")
    epochs = [r for r in records if isinstance(r, EpochRecord)]
    assert [r.num_skipped_steps for r in epochs] == [1, 1]
    assert all(math.isfinite(r.train_loss) for r in epochs)


@pytest.mark.slow
def test_the_split_does_not_change_what_is_skipped():
    """Law 2 with a skipped step: any micro-batch ends in the same weights."""
    ends = [
        state(_run_out(poisoned({1}, train__micro_batch_size=size, train__on_nonfinite="skip"))) for size in (1, 3, 16)
    ]
    for other in ends[1:]:
        assert max(float((ends[0][k] - other[k]).abs().max()) for k in ends[0]) < 1e-10


def _run_out(trainer):
    advance(trainer)
    return trainer


def test_skipping_has_an_end():
    """After ten skipped steps in a row the next one stops the run; a good one in between begins the count anew."""
    many = {**SKIP, "train__max_steps": 16}
    trainer = poisoned(set(range(3, 16)), **many)
    assert f"after {MAX_SKIPPED_IN_A_ROW} skipped steps in a row" in fault(trainer)
    assert trainer.num_steps_done == 3 + MAX_SKIPPED_IN_A_ROW
    trainer = poisoned(set(range(3, 16)) - {9}, **many)
    assert [r.num_skipped_steps for r in advance(trainer) if isinstance(r, EpochRecord)] == [6, 6]


def test_resume_remembers_the_count():
    """How many were skipped in a row is part of the state."""
    recipe = {**SKIP, "train__max_steps": 16}
    first = poisoned(set(range(3, 30)), **recipe)
    for _ in first.steps():
        if first.num_steps_done > 8:
            break
    second = poisoned(set(range(3, 30)), **recipe)
    second.load_state_dict(first.state_dict())
    fault(second)
    assert second.num_steps_done == 3 + MAX_SKIPPED_IN_A_ROW


def test_fp16_overflow_is_the_scalers():
    """A gradient that overflows at a loss scale is no fault, stopping or skipping; a loss that is not finite is."""
    for mode in ("stop", "skip"):
        trainer = build_experiment(tiny_recipe(train__precision="fp32", train__on_nonfinite=mode)).trainer
        trainer.accumulation.loss_scale = LossScale("cpu", init_scale=3e38)
        with torch.no_grad():
            trainer.accumulation.model.fc.weight.mul_(20)  # larger gradients below
        records = advance(trainer, 2)
        assert len([r for r in records if isinstance(r, StepRecord)]) == 2
        assert trainer._skipped == 0
        assert trainer.accumulation.loss_scale.get_scale() < 3e38
    trainer = poisoned({1}, train__precision="fp32")
    trainer.accumulation.loss_scale = LossScale("cpu", init_scale=2.0)
    assert "step 2: the loss is nan" in fault(trainer)
    assert trainer.accumulation.loss_scale.get_scale() == 2.0


# Statistics gone astray


def watched_layer():
    layer = BatchlessNorm2d(6, eps=1e-3)
    initial = torch.tensor([1.0, 1.0, 1.0, 1e-3, 1.0, 1.0])
    layer.set_statistics(torch.zeros(6), torch.tensor([1.0, 1e-3, 2e3, 1e-3, 5e-3, 1.0]))
    layer.second_moment = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1e-9])
    return layer, initial


def test_health_counts_channels():
    """Floors that are new, growth and shrinkage beyond a thousand, and inputs that do not vary are counted per channel."""
    layer, initial = watched_layer()
    initial[4] = 6.0
    health = layer_health(layer, initial)
    assert (health.at_floor, health.grown, health.shrunk, health.dead) == (1, 1, 2, 1)
    assert health.min_std == pytest.approx(1e-3)
    assert health.max_std == pytest.approx(2e3)


def test_health_is_said_when_it_changes():
    """One line for each kind with its layers; nothing while nothing changes, also after a resume; again when it does."""
    layer, _ = watched_layer()
    other, _ = watched_layer()
    for each in (layer, other):
        each.second_moment = torch.ones(6)
    watch = HealthWatch({"a": layer, "b": other})
    assert list(watch.notices()) == []
    layer.second_moment = torch.tensor([0.0, 0, 1, 1, 1, 1])
    other.second_moment = torch.tensor([0.0, 1, 1, 1, 1, 1])
    (line,) = watch.notices()
    assert line.startswith("Channels that are dead")
    assert "a (2 of 6, sigma" in line
    assert "b (1 of 6, sigma" in line
    assert list(watch.notices()) == []
    again = HealthWatch({"a": layer, "b": other})
    again.load_state_dict(watch.state_dict())
    assert list(again.notices()) == []
    layer.set_statistics(torch.zeros(6), torch.full((6,), 1e5))
    assert any("more than 1000 times" in line for line in again.notices())


def test_a_dead_channel_is_noticed_in_a_run():
    """A filter that gives a constant is reported at the end of the epoch, by its layer."""
    experiment = build_experiment(tiny_recipe(norm__name="batchless-plain", model__weight_standardization=False))
    with torch.no_grad():
        experiment.model.blocks[1].conv2.weight[5] = 0.0
        experiment.model.blocks[1].norm2.mean[5] = 0.0
        experiment.model.blocks[1].norm2.weight[5] = 0.0
    notices = [r.text for r in advance(experiment.trainer) if isinstance(r, NoticeRecord)]
    assert any("dead" in text and "blocks.1.norm2 (1 of" in text for text in notices), notices
