"""Gradients that gather in the momentum buffer: the same training, one weight-sized buffer less (docstrings are laws)."""

import copy
import math

import pytest
import torch
from helpers import advance, largest_difference, state, tiny_recipe, trained
from torch import nn
from torch.nn import functional as F

from bln_train.build.experiment import build_experiment
from bln_train.data.datasets import epoch_order
from bln_train.errors import CheckpointError, DivergedError, RecipeError
from bln_train.experiments.run import run
from bln_train.memory.peak import PeakMeter
from bln_train.memory.tracker import storage_bytes
from bln_train.recipe.load import dump_recipe, parse_recipe
from bln_train.recipe.recipe import Recipe
from bln_train.records import StepRecord, record_from_dict, record_to_dict
from bln_train.runs.checkpoint import load_checkpoint, save_checkpoint
from bln_train.runs.folder import RunFolder, same_trajectory
from bln_train.train.batches import EffectiveBatch
from bln_train.train.optim import MomentumAccumulatingSGD

SGD = {"name": "sgd", "lr": 0.1, "weight_decay": 0.05}
PLAIN = {**SGD, "clip_norm": None}
INTO_MOMENTUM = {**SGD, "accumulate_into": "momentum", "clip_norm": None}


@pytest.mark.parametrize("micro_batch_size", [1, 3, 16])
@pytest.mark.parametrize("norm", ["batchless-plain", "batchless-paper", "group", "none"])
def test_whole_runs_equal_sgd(norm, micro_batch_size):
    """Whole runs, short last batches and weight decay included, end where torch.optim.SGD's end, in every tensor of the state."""
    changes = {"norm": {"name": norm}, "train__micro_batch_size": micro_batch_size}
    plain = state(trained(tiny_recipe(**changes, optimizer=PLAIN)))
    assert largest_difference(plain, state(trained(tiny_recipe(**changes, optimizer=INTO_MOMENTUM)))) < 1e-12


@pytest.mark.parametrize("norm", ["batchless-plain", "group"])
def test_clipped_runs_do_not_depend_on_the_split(norm):
    """Law 2 in this mode where the update is clipped, short last batches included."""
    changes = {"norm": {"name": norm}, "optimizer": {**INTO_MOMENTUM, "clip_norm": 0.05}}
    whole = state(trained(tiny_recipe(**changes)))
    for micro in (1, 3):
        assert largest_difference(whole, state(trained(tiny_recipe(**changes, train__micro_batch_size=micro)))) < 1e-10


def test_steps_equal_torchs_sgd_on_a_plain_network():
    """Three steps of a two-layer network in micro-batches are torch.optim.SGD's on the whole batch, biases included."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    theirs = copy.deepcopy(ours)
    accumulating = MomentumAccumulatingSGD(ours.parameters(), lr=0.3, momentum=0.8, weight_decay=0.1)
    plain = torch.optim.SGD(theirs.parameters(), lr=0.3, momentum=0.8, weight_decay=0.1)
    for _ in range(3):
        x, y = torch.randn(7, 5, dtype=torch.float64), torch.randint(3, (7,))
        accumulating.begin()
        for part in (slice(0, 4), slice(4, 7)):
            (F.cross_entropy(ours(x[part]), y[part], reduction="sum") / 7).backward()
        gathered = [p.grad.clone() for p in ours.parameters() if p.dim() > 1]
        accumulating.step()
        assert all(p.grad is None for p in ours.parameters() if p.dim() > 1)
        F.cross_entropy(theirs(x), y).backward()
        plain.step()
        buffers = [plain.state[p]["momentum_buffer"] for p in theirs.parameters() if p.dim() > 1]
        torch.testing.assert_close(gathered, buffers, rtol=1e-13, atol=1e-15)
        for small, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert small.dim() > 1 or torch.allclose(small.grad, other.grad, rtol=1e-13)  # pure: no momentum, no decay
        ours.zero_grad()
        plain.zero_grad()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-13, atol=1e-15)


def continued(recipe, path):
    trainer = build_experiment(recipe, initialize=False).trainer
    trainer.load_state_dict(load_checkpoint(path))
    return trainer


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_resume_is_bitwise(stop, tmp_path):
    """Law 4 in this mode: stopping after any step and going on changes no bit, clipping of updates included."""
    recipe = tiny_recipe(train__precision="fp32", optimizer={**INTO_MOMENTUM, "clip_norm": 0.1})
    straight = state(trained(recipe))
    save_checkpoint(tmp_path / "checkpoint.pt", trained(recipe, stop).state_dict())
    second = continued(recipe, tmp_path / "checkpoint.pt")
    advance(second)
    found = state(second)
    assert straight.keys() == found.keys()
    assert all(torch.equal(straight[key], found[key]) for key in straight)


@pytest.mark.parametrize("stop", [1, 4])
@pytest.mark.parametrize(("first", "second"), [(PLAIN, INTO_MOMENTUM), (INTO_MOMENTUM, PLAIN)], ids=["into", "out-of"])
def test_a_run_may_change_the_mode_when_it_resumes(first, second, stop, tmp_path):
    """A checkpoint of either mode goes on in the other as if it had been written there."""
    first, second = tiny_recipe(optimizer=first), tiny_recipe(optimizer=second)
    assert same_trajectory(first, second)
    save_checkpoint(tmp_path / "checkpoint.pt", trained(first, stop).state_dict())
    trainer = continued(second, tmp_path / "checkpoint.pt")
    advance(trainer)
    assert largest_difference(state(trained(first)), state(trainer)) < 1e-12


def test_another_clipping_is_another_run():
    """A folder's run goes on in the other mode only where nothing is clipped."""
    clipped = tiny_recipe(optimizer=SGD)
    assert same_trajectory(clipped, tiny_recipe(optimizer={**SGD, "clip_norm": 1.0}))
    assert not same_trajectory(clipped, tiny_recipe(optimizer={**SGD, "accumulate_into": "momentum"}))
    assert not same_trajectory(clipped, tiny_recipe(optimizer=INTO_MOMENTUM))
    assert same_trajectory(*(tiny_recipe(optimizer=o) for o in (PLAIN, INTO_MOMENTUM)))


def test_the_state_dict_is_that_of_sgd():
    """The same keys in the same order, group settings and shapes; torch.optim.SGD itself loads it."""
    plain, into = (trained(tiny_recipe(optimizer=o), 2).accumulation.optimizer for o in (PLAIN, INTO_MOMENTUM))
    expected, found = plain.state_dict(), into.state_dict()
    assert list(found["state"]) == list(expected["state"])
    for n, entry in expected["state"].items():
        assert found["state"][n].keys() == entry.keys() == {"momentum_buffer"}
        assert found["state"][n]["momentum_buffer"].stride() == entry["momentum_buffer"].stride()
    assert found["param_groups"] == expected["param_groups"]
    torch.optim.SGD(into.param_groups, lr=0.1).load_state_dict(found)


def test_a_state_with_nesterov_is_refused():
    """A checkpoint whose settings this mode cannot follow is an error, not another training."""
    nesterov = trained(tiny_recipe(optimizer={**PLAIN, "nesterov": True}), 1).state_dict()
    with pytest.raises(CheckpointError, match="nesterov"):
        build_experiment(tiny_recipe(optimizer=INTO_MOMENTUM)).trainer.load_state_dict(nesterov)


TEXT = """\
data: {name: shapes}
model: {name: resnet8}
norm: {name: batchless}
train: {epochs: 3, micro_batch_size: 4}
optimizer:
  name: sgd
  lr: 0.1
  accumulate_into: momentum
"""


def refusals(*overrides):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(TEXT, origin="r.yaml", overrides=overrides)
    return dict(caught.value.problems)


@pytest.mark.parametrize(
    ("setting", "way_out"),
    [
        ("optimizer.nesterov=true", "set it to false, or accumulate_into: gradient"),
        ("optimizer.momentum=0", "raise it, or accumulate_into: gradient"),
        ("train.precision=fp16", "use bf16, or optimizer.accumulate_into: gradient"),
    ],
)
def test_what_needs_a_gradient_apart_is_refused(setting, way_out):
    """Nesterov, no momentum and a loss scale are refused at their place with the way out."""
    ((place, what),) = refusals(setting).items()
    assert place == f"--set {setting}"
    assert way_out in what


def test_all_refusals_come_at_once():
    """A recipe with everything wrong about this mode names it all."""
    problems = refusals("optimizer.nesterov=true", "optimizer.momentum=0", "train.precision=fp16")
    assert len(problems) == 3


def test_settings_that_would_be_ignored_are_refused():
    """Where gradients gather, with Adam, which has one place for them."""
    ((_, what),) = refusals("optimizer={name: adamw, lr: 0.1, accumulate_into: momentum}").items()
    assert what.startswith("`adamw` has no such setting; it belongs to sgd")


@pytest.mark.parametrize("overrides", [(), ("norm=group",), ("norm=batch",), ("optimizer.accumulate_into=gradient",),
                                       ("optimizer={name: adam, lr: 0.1}",)])  # fmt: skip
def test_the_bound_is_one_constant(overrides):
    """1 for every norm, optimizer and place of the gradients; another one, or none, is as stated."""
    assert parse_recipe(TEXT, origin="r.yaml", overrides=overrides).optimizer.clip_norm == 1.0
    for value in (3.0, None):
        setting = f"optimizer.clip_norm={'null' if value is None else value}"
        recipe = parse_recipe(TEXT, origin="r.yaml", overrides=[*overrides, setting])
        assert recipe.optimizer.clip_norm == value
        assert parse_recipe(dump_recipe(recipe), origin="dump.yaml") == recipe
        assert Recipe.model_validate(recipe.model_dump()) == recipe


def test_auto_is_no_bound():
    """A recipe of before says at its place what is expected now."""
    ((place, what),) = refusals("optimizer.clip_norm=auto").items()
    assert place == "--set optimizer.clip_norm=auto"
    assert "above 0" in what
    assert "auto" in what


def buffer_norm(trainer):
    """Global norm of all momentum buffers."""
    buffers = [entry["momentum_buffer"] for entry in trainer.accumulation.optimizer.state_dict()["state"].values()]
    return math.sqrt(sum(float(b.square().sum()) for b in buffers))


def test_clipping_bounds_the_momentum():
    """No step leaves buffers above clip_norm / (1 - momentum); one that reaches it is scaled to it exactly, small ones with
    it, and moves the weights by the rate times that."""
    optimizer = {**INTO_MOMENTUM, "clip_norm": 0.05}
    experiment = build_experiment(
        tiny_recipe(norm={"name": "group"}, optimizer=optimizer, schedule={"name": "constant"})
    )
    trainer, clipped = experiment.trainer, 0
    for record in trainer.steps():
        if not isinstance(record, StepRecord):
            continue
        after, bound = buffer_norm(trainer), 0.05 / (1 - 0.9)
        assert after == pytest.approx(min(record.update_norm, bound), rel=1e-12)
        clipped += record.update_norm > bound
    assert clipped >= 1
    first = build_experiment(
        tiny_recipe(norm={"name": "group"}, optimizer={**optimizer, "clip_norm": 1e-3}, schedule={"name": "constant"})
    )
    before = [p.detach().clone() for p in first.model.parameters()]
    advance(first.trainer, 1)
    moved = [p.detach() - q for p, q in zip(first.model.parameters(), before, strict=True)]
    assert all(bool(m.any()) for m in moved)
    assert math.sqrt(sum(float(m.square().sum()) for m in moved)) == pytest.approx(0.1 * 1e-2, rel=1e-9)


def test_clipping_keeps_the_direction():
    """A clipped first step is the unclipped one, shortened: every parameter's buffer by the same factor."""
    norm = {"name": "group"}
    free, bound = (
        trained(tiny_recipe(norm=norm, optimizer={**INTO_MOMENTUM, "clip_norm": clip}), 1) for clip in (None, 1e-3)
    )
    factor = 1e-3 / (1 - 0.9) / buffer_norm(free)
    for n, entry in free.accumulation.optimizer.state_dict()["state"].items():
        found = bound.accumulation.optimizer.state_dict()["state"][n]["momentum_buffer"]
        torch.testing.assert_close(found, factor * entry["momentum_buffer"], rtol=1e-9, atol=1e-15)


def test_update_norm_and_gradient_norm_are_never_mixed():
    """A record has the one that was taken; both survive JSON, and a record from before update_norm loads."""
    for optimizer, taken, other in ((PLAIN, "grad_norm", "update_norm"), (INTO_MOMENTUM, "update_norm", "grad_norm")):
        record = advance(build_experiment(tiny_recipe(optimizer=optimizer)).trainer, 1)[0]
        assert getattr(record, taken) > 0
        assert getattr(record, other) is None
        assert record_from_dict(record_to_dict(record)) == record
    old = {key: value for key, value in record_to_dict(record).items() if key != "update_norm"}
    assert record_from_dict(old).update_norm is None


def test_divergence_of_the_update_is_named():
    """Momentum that is not finite, where gradients gather, stops training and names the setting that bounds it."""
    trainer = build_experiment(tiny_recipe(optimizer=INTO_MOMENTUM)).trainer
    advance(trainer, 1)
    next(iter(trainer.accumulation.optimizer.state.values()))["momentum_buffer"].fill_(torch.inf)
    with pytest.raises(DivergedError, match="step 2: a gradient is not finite") as caught:
        advance(trainer, 2)
    assert "optimizer.clip_norm=1.0" in caught.value.hint


@pytest.mark.parametrize(("clip_norm", "num_notices"), [(1.0, 1), (None, 0)])
def test_a_run_says_once_that_the_update_is_clipped(clip_norm, num_notices, tmp_path):
    """The notice is there where clipping is, with its bound, and once in the metrics, resumed or not."""
    recipe = tiny_recipe(
        norm={"name": "group"}, optimizer={**INTO_MOMENTUM, "clip_norm": clip_norm}, train__max_steps=1
    )
    folder = RunFolder(tmp_path / "run")
    for resume in (False, True):
        run(recipe, folder, name="tiny", resume=resume)
    texts = [r.text for r in folder.records() if type(r).__name__ == "NoticeRecord"]
    texts = [text for text in texts if text.startswith("The update is clipped, not the gradient")]
    assert len(texts) == num_notices
    assert all("1 / (1 - 0.9)" in text for text in texts)


def measured(optimizer, **changes):
    changes = {"train__micro_batch_size": 1, "train__precision": "fp32", **changes}
    trainer = build_experiment(tiny_recipe(optimizer=optimizer, **changes)).trainer
    advance(trainer, 2)
    return trainer.memory_record(), trainer.accumulation


def parts(record):
    names = ("parameter", "gradient", "optimizer", "activation", "other")
    return {name: getattr(record, f"{name}_bytes") for name in names}


@pytest.mark.parametrize("norm", ["none", "group", "batchless-plain"])
def test_the_peak_is_lower_by_the_weights(norm):
    """At the peak the weights' gradients are not there; what is momentum counts as momentum, once, and the parts sum up."""
    changes = {"norm": {"name": norm}, "model": {"name": "resnet8", "weight_standardization": False}}
    if norm == "batchless-plain":  # resnet8 is so shallow that a probe of four images takes more than training one
        changes["norm"]["probe_images"] = 2
    plain, _ = measured(PLAIN, **changes)
    into, step = measured(INTO_MOMENTUM, **changes)
    weights = storage_bytes(p for p in step.parameters if p.dim() > 1)
    assert plain.peak_bytes - into.peak_bytes == pytest.approx(weights, rel=0.05)  # the peak's moment moves
    for record in (plain, into):
        assert sum(parts(record).values()) == record.peak_bytes
    small = storage_bytes(p for p in step.parameters if p.dim() <= 1)
    assert weights <= into.optimizer_bytes <= weights + small  # in the first step the small buffers are not there yet
    assert 0 < into.gradient_bytes <= plain.gradient_bytes - 0.95 * weights


@pytest.mark.parametrize("norm", ["batchless-plain", "group"])
def test_no_byte_is_counted_twice(norm):
    """Also where weights are standardised and the probe runs, the parts sum up to the peak."""
    record, _ = measured(INTO_MOMENTUM, norm={"name": norm})
    assert min(parts(record).values()) >= 0
    assert sum(parts(record).values()) == record.peak_bytes


def test_the_note_on_cuda_counts_momentum_once(monkeypatch):
    """What the allocator path notes when all gradients exist: momentum as optimizer state, gradients only what is beside."""
    trainer = build_experiment(tiny_recipe(optimizer=INTO_MOMENTUM)).trainer
    advance(trainer, 1)
    step = trainer.accumulation
    meter = PeakMeter(step.model, step.optimizer, step.gradients, torch.device("cuda"))
    step.optimizer.begin()
    index = epoch_order(40, seed=0, epoch=0)[:16]
    step.accumulate(EffectiveBatch(trainer.data.train, index, 0, 0), meter._note_cuda)
    everything = [*step.model.parameters(), *meter._optimizer_state(), *(p.grad for p in step.model.parameters())]
    assert meter._parts["optimizer_bytes"] == storage_bytes(meter._optimizer_state())
    known = sum(meter._parts.values())
    copies = storage_bytes(m.weight for m in step.standardized)  # gradients gather at the standardised weights' copies
    assert storage_bytes(everything) <= known <= storage_bytes(everything) + copies


def test_steps_out_of_turn_are_refused():
    """begin twice, step without begin, a state in between, and gradients that are no longer the momentum: all say so."""
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = MomentumAccumulatingSGD([weight], lr=0.1, momentum=0.9)
    with pytest.raises(RuntimeError, match="begin"):
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.begin()
    for call in (optimizer.begin, optimizer.state_dict):
        with pytest.raises(RuntimeError, match="step"):
            call()
    weight.grad = torch.ones(2, 2)
    with pytest.raises(RuntimeError, match="replaced"):
        optimizer.step()
    optimizer.load_state_dict(saved)  # the way out of a step that was given up
    assert weight.grad is None
    weight.grad = torch.ones(2, 2)
    with pytest.raises(RuntimeError, match="has a gradient already"):
        optimizer.begin()
    weight.grad = None
    optimizer.begin()
    weight.sum().backward()
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), 0.9))


@pytest.mark.parametrize("settings", [{"momentum": 0.0}, {"momentum": 1.0}])
def test_momentum_must_be_usable(settings):
    """Without momentum there is no buffer, and with 1 no bound."""
    with pytest.raises(ValueError, match="above 0 and below 1"):
        MomentumAccumulatingSGD([nn.Parameter(torch.ones(2, 2))], lr=0.1, **settings)
