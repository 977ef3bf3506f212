"""Schedule, groups, loss scaling, models and records against PyTorch's own and published counts."""

import json
import math
import warnings

import pytest
import torch
from helpers import advance, largest_difference, state, tiny_recipe, trained
from torch import nn

from bln_train.build.experiment import build_experiment
from bln_train.errors import DivergedError, UsageError
from bln_train.models.build import build_model, norm_factory
from bln_train.norm.dropout import InstanceDropout
from bln_train.norm.statistics import BatchlessStatistics
from bln_train.recipe.load import load_recipe
from bln_train.records import EpochRecord, MemoryRecord, StepRecord, TimelineRecord, record_from_dict, record_to_dict
from bln_train.system.rng import draw_integers, draw_uniform, instance_seeds, keep_mask
from bln_train.train.loss_scale import LossScale
from bln_train.train.optim import Schedule, parameter_groups


def rates(schedule, num_steps):
    return [schedule.factor(step) for step in range(num_steps)]


def torch_rates(make, num_steps):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, found = make(optimizer), []
    for _ in range(num_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_schedules_equal_pytorchs():
    """Cosine and step are CosineAnnealingLR and MultiStepLR, step by step; warm-up ends at the peak."""
    cosine = Schedule("cosine", steps_per_epoch=7, epochs=5, final_fraction=0.1)
    expected = torch_rates(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 35, eta_min=0.1), 35)
    assert rates(cosine, 35) == pytest.approx(expected, abs=1e-12)
    steps = Schedule("step", steps_per_epoch=7, epochs=5, milestones=(1, 3.0), gamma=0.2)
    expected = torch_rates(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [7, 21], gamma=0.2), 35)
    assert rates(steps, 35) == pytest.approx(expected, abs=1e-12)
    warm = rates(Schedule("constant", steps_per_epoch=4, epochs=3, warmup_epochs=1.0), 12)
    assert warm == pytest.approx([0.25, 0.5, 0.75, *[1.0] * 9])


def test_parameter_groups():
    """Weights decay; biases and norms do not; statistics have their own rate, or no optimizer when natural."""
    for name, expected in (("batchless", {"decay", "no_decay"}), ("paper", {"decay", "no_decay", "statistics"})):
        model = build_model("resnet8", 10, norm=norm_factory(name))
        groups = {
            g["name"]: g
            for g in parameter_groups(model, BatchlessStatistics(model), weight_decay=0.1, statistics_lr=0.7)
        }
        assert set(groups) == expected
        assert all(p.dim() > 1 for p in groups["decay"]["params"])
        assert groups["decay"]["weight_decay"] == 0.1
        assert groups["no_decay"]["weight_decay"] == 0.0
    assert groups["statistics"]["lr"] == 0.7
    assert sum(len(g["params"]) for g in groups.values()) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        ("resnet20", 269_722),
        ("resnet32", 464_154),
        ("resnet44", 658_586),
        ("resnet56", 853_018),
        ("resnet110", 1_727_962),
        ("resnet18", 11_173_962),
        ("wrn28_10", 36_479_194),
    ],
)
def test_models_have_the_published_number_of_parameters(name, num_parameters):
    """With BatchNorm, the widths and depths are those of the papers (counts of akamaster's, kuangliu's, Zagoruyko's code)."""
    with torch.device("meta"):
        model = build_model(name, 10, norm=norm_factory("batch"))
    assert sum(p.numel() for p in model.parameters()) == num_parameters


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "wrn10_1", "paper_cnn"])
@pytest.mark.parametrize("norm", ["batch", "batch-frozen", "group", "layer", "none", "batchless", "instance"])
def test_every_model_takes_every_norm(name, norm):
    """(N, 3, 32, 32) to (N, classes), in both memory formats alike; instance norm refuses dense layers with a reason."""
    if name == "paper_cnn" and norm == "instance":
        with pytest.raises(ValueError, match="dense layer"):
            build_model(name, 7, norm=norm_factory(norm))
        return
    model = build_model(name, 7, norm=norm_factory(norm), weight_standardization=norm == "group").double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    out = model(x)
    assert out.shape == (2, 7)
    last = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, out, rtol=1e-9, atol=1e-9)


def test_zero_init_residual_starts_blocks_as_identities():
    """With the last scale at 0, a block without change of shape is relu(x)."""
    model = build_model("resnet8", 10, norm=norm_factory("batchless"), zero_init_residual=True).eval()
    x = torch.rand(2, 16, 8, 8)
    torch.testing.assert_close(model.blocks[0](x), x)


def test_dropout_masks_belong_to_images():
    """The same seeds give the same mask in any split; about p of the entries are dropped, and the mean is kept."""
    dropout = InstanceDropout(0.25, purpose=3)
    seeds, x = instance_seeds(0, 0, torch.arange(64)), torch.ones(64, 5, 9, 9)
    dropout.seeds = seeds
    whole = dropout(x)
    dropout.seeds = seeds[10:13]
    assert torch.equal(dropout(x[10:13]), whole[10:13])
    assert abs(float((whole == 0).double().mean()) - 0.25) < 0.01
    assert whole.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert torch.equal(dropout.eval()(x), x)


def test_draws_are_uniform_and_unrelated():
    """Means, variances and correlations of consecutive images, purposes and epochs are those of independent uniforms."""
    index = torch.arange(100_000)
    draws = [
        draw_uniform(instance_seeds(seed, epoch, index), purpose)
        for seed in (0, 1)
        for epoch in (0, 1)
        for purpose in (0, 1)
    ]
    table = torch.stack([*draws, draws[0].roll(1)])
    assert bool((table >= 0).all())
    assert bool((table < 1).all())
    assert float((table.mean(1) - 0.5).abs().max()) < 0.005
    assert float((table.var(1) - 1 / 12).abs().max()) < 0.002
    assert float((torch.corrcoef(table) - torch.eye(len(table))).abs().max()) < 0.02
    counts = draw_integers(instance_seeds(5, 2, index), 7, 9).bincount()
    assert len(counts) == 9
    assert float((counts / 100_000 - 1 / 9).abs().max()) < 0.005
    mask = keep_mask(instance_seeds(0, 0, index[:1000]), 1, (100,), 0.75).double()
    assert float((mask.mean(0) - 0.75).abs().max()) < 0.06
    assert float((mask.mean(1) - 0.75).abs().max()) < 0.2


def with_scaler(recipe, scale):
    trainer = build_experiment(recipe).trainer
    trainer.accumulation.loss_scale = LossScale("cpu", init_scale=scale)
    return trainer


@pytest.mark.parametrize("norm", ["batchless", "batchless-paper"])
def test_loss_scaling_changes_nothing(norm):
    """A scaled loss gives the same run: statistics, correction and clipping see unscaled gradients (a power of 2 is exact)."""
    recipe = tiny_recipe(norm={"name": norm}, train__micro_batch_size=3)
    plain, scaled = trained(recipe), with_scaler(recipe, 2.0**12)
    advance(scaled)
    assert largest_difference(state(plain), state(scaled)) < 1e-10


def test_overflowing_loss_scale_skips_the_step():
    """Where the scaled gradient overflows, no parameter, statistic or correction moves, and the scale is halved."""
    trainer = with_scaler(tiny_recipe(train__precision="fp32"), 3e38)
    with torch.no_grad():
        trainer.accumulation.model.fc.weight.mul_(20)  # larger gradients below
    before = {k: v.clone() for k, v in trainer.accumulation.model.state_dict().items()}
    advance(trainer, 1)
    assert all(torch.equal(before[k], v) for k, v in trainer.accumulation.model.state_dict().items())
    assert trainer.accumulation.loss_scale.get_scale() < 3e38


def test_clipping_bounds_the_update():
    """clip_norm bounds the global norm of the mean gradient; the record reports the norm before clipping."""
    recipe = tiny_recipe(norm={"name": "group"}, optimizer={"name": "sgd", "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0,
                                                            "clip_norm": 0.01}, schedule={"name": "constant"})  # fmt: skip
    trainer = build_experiment(recipe).trainer
    before = {k: v.clone() for k, v in trainer.accumulation.model.state_dict().items()}
    (record,) = advance(trainer, 1)
    moved = math.sqrt(
        sum(float((v - before[k]).square().sum()) for k, v in trainer.accumulation.model.state_dict().items())
    )
    assert record.grad_norm > 0.01
    assert moved == pytest.approx(0.01, rel=1e-4)


def test_records_come_in_order_and_survive_json():
    """Steps, memory and timeline after the second, an epoch's record after its last step; each equals itself through JSON."""
    records = advance(build_experiment(tiny_recipe()).trainer)
    kinds = [type(r) for r in records]
    step, epoch, memory, timeline = StepRecord, EpochRecord, MemoryRecord, TimelineRecord
    assert kinds == [step, step, memory, timeline, step, epoch, step, step, step, epoch, memory]
    assert [r.num_images for r in records if isinstance(r, step)] == [16, 16, 8] * 2
    first = [r for r in records if isinstance(r, step)][:3]
    assert records[5].train_loss == pytest.approx(sum(r.loss * r.num_images for r in first) / 40)
    assert [record_from_dict(json.loads(json.dumps(record_to_dict(r)))) for r in records] == records


def test_max_steps_and_rare_evaluation():
    """max_steps stops early, with an evaluation at the end; epochs in between are evaluated as asked."""
    records = advance(build_experiment(tiny_recipe(train__max_steps=4, train__eval_every_epochs=2)).trainer)
    epochs = [r for r in records if isinstance(r, EpochRecord)]
    assert [(r.step, r.test_loss is None) for r in epochs] == [(3, True), (4, False)]


def test_divergence_is_named():
    """A non-finite loss stops the run with the step's number."""
    recipe = tiny_recipe(norm={"name": "none"}, optimizer={"name": "sgd", "lr": 1e12})
    with pytest.raises(DivergedError, match=r"step \d"):
        advance(build_experiment(recipe).trainer)


def test_effective_batch_larger_than_the_data():
    """All images make one step; the record says how many there were, and the notice says so."""
    experiment = build_experiment(tiny_recipe(train__effective_batch_size=64, train__micro_batch_size=3))
    assert "40 images, not 64" in " ".join(experiment.notices)
    (record,) = advance(experiment.trainer, 1)
    assert record.num_images == 40


def test_cuda_absent_is_a_usage_error():
    """A device that is not there is named, with the way out."""
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(UsageError, match="no CUDA device"):
        build_experiment(tiny_recipe(runtime={"device": "cuda"}))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16", "fp16"])
def test_gpu_runs_equal_cpu_runs(precision):
    """On CUDA: float64 agrees with the CPU, lower precisions run, and the peak comes from the allocator."""
    recipe = tiny_recipe(train__precision=precision, train__micro_batch_size=3, runtime={"device": "cuda"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trained(recipe)
    record = trainer.memory_record()
    assert record.method == "allocator"
    assert record.peak_bytes
    assert record.peak_bytes <= record.reserved_bytes <= record.device_bytes
    if precision == "fp64":
        cpu = state(trained(tiny_recipe(train__micro_batch_size=16)))
        assert largest_difference(cpu, {k: v.cpu() for k, v in state(trainer).items()}) < 1e-8


@pytest.mark.slow
def test_the_quickstart_learns():
    """The demo's recipe, in whole batches: it starts at its full rate, which a looser default of clipping did not survive."""
    experiment = build_experiment(load_recipe("quickstart", ["train.micro_batch_size=32", "train.eval_every_epochs=5"]))
    last = [record for record in experiment.trainer.steps() if isinstance(record, EpochRecord)][-1]
    assert last.test_accuracy > 0.4
