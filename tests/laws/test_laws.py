"""The laws a user's weeks of training rest on (float64; each test's docstring is its law)."""

import copy
import subprocess
import sys
from functools import partial

import pytest
import torch
from helpers import advance, gradients, largest_difference, perturb, state, tiny_recipe, trained
from torch.nn import functional as F

from bln_train.build.experiment import build_experiment
from bln_train.data.datasets import epoch_order
from bln_train.norm import BatchlessNorm2d
from bln_train.norm.fused.network import folded_layers, unfuse
from bln_train.norm.kernels.table import HORIZON, LARGEST_SQUARE
from bln_train.records import StepRecord
from bln_train.system.rng import instance_seeds

EVERY_NORM = ["batchless-plain", "batchless", "batchless-paper", "batchless-paper-abs", "batchless-paper-inv", "group",
              "layer", "instance", "none", "batch-frozen"]  # fmt: skip


@pytest.mark.parametrize("norm", EVERY_NORM)
@pytest.mark.parametrize("num_images", [16, 5])
def test_law_1_gradients_do_not_depend_on_the_split(norm, num_images):
    """Law 1: micro-batch 1, ragged 3, 8 and the whole effective batch give equal gradients, also for a short last batch."""
    experiment = build_experiment(tiny_recipe(norm={"name": norm}))
    perturb(experiment.model)
    whole = gradients(experiment, num_images, num_images)
    assert len(whole) == len(list(experiment.model.parameters()))
    for micro in (1, 3, 8):
        assert largest_difference(whole, gradients(experiment, micro, num_images)) < 1e-12


@pytest.mark.parametrize("model", ["paper_cnn", "resnet18", "wrn10_1"])
def test_law_1_holds_for_every_model_family(model):
    """Law 1 with dropout, dense norms, projections and pre-activation; dropout masks belong to the images."""
    experiment = build_experiment(tiny_recipe(model__name=model))
    perturb(experiment.model)
    whole = gradients(experiment, 16, 16)
    assert largest_difference(whole, gradients(experiment, 3, 16)) < 1e-12


def smallest_relu_input(recipe, weights, num_images, monkeypatch):
    """Of all relus, in the step's float64 forward without folds, where every relu is a call."""
    experiment = build_experiment(recipe)
    experiment.model.load_state_dict(weights)
    smallest, relu = [], F.relu

    def noting(x):
        smallest.append(x.detach().abs().min().item())
        return relu(x)

    with monkeypatch.context() as patch:
        patch.setattr(F, "relu", noting)
        patch.setattr(F, "relu_", noting)
        gradients(experiment, num_images, num_images)
    assert len(smallest) == 7
    return min(smallest)


@pytest.mark.parametrize(("norm", "seed"), [("batchless", 39), ("batchless-plain", 3)])
def test_law_1_in_float32(norm, seed, monkeypatch):
    """Law 1 to 1e-5 in float32, and image by image to 1e-5 of float64, in a state that two steps lead to.

    Where a relu's input is within rounding of 0 one entry of a gradient jumps, and every kind of processor rounds differently. So
    the steps are of float64, which lead to one state everywhere, and the state is one (of 120 seeds one and three) whose relus all
    keep away from 0.
    """
    changes = {"norm__name": norm, "train__seed": seed}
    double, single = (build_experiment(tiny_recipe(**changes, train__precision=p)) for p in ("fp64", "fp32"))
    advance(double.trainer, 2)
    single.model.load_state_dict(double.model.state_dict())
    double.model.load_state_dict(single.model.state_dict())  # rounded
    unfolded = tiny_recipe(**changes, norm__fold=False)
    assert smallest_relu_input(unfolded, double.model.state_dict(), 8, monkeypatch) > 8e-6
    exact, whole, by_image = gradients(double, 8, 8), gradients(single, 8, 8), gradients(single, 1, 8)
    for name, gradient in exact.items():
        bound = 1e-5 * gradient.norm()
        assert (whole[name] - by_image[name]).norm() <= bound, name
        assert (gradient - by_image[name]).norm() <= bound, name


@pytest.mark.parametrize("norm", ["batchless", "batchless-plain"])
def test_law_1_in_bfloat16(norm):
    """Law 1 to 0.2: bf16 rounds activations, differently in each split."""
    experiment = build_experiment(tiny_recipe(norm__name=norm, train__precision="bf16", train__seed=2))
    advance(experiment.trainer, 2)
    whole, single = gradients(experiment, 16, 16), gradients(experiment, 1, 16)
    for name, gradient in whole.items():
        assert (gradient - single[name]).norm() <= 0.2 * gradient.norm(), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm": {"name": "batchless-plain", "probe_images": 5}},
        {"norm": {"name": "batchless-paper-inv", "share": "layer"}},
        {"norm": {"name": "batchless-paper"}, "optimizer": {"name": "adam", "lr": 0.003}},
        {"norm": {"name": "group"}, "optimizer": {"name": "adamw", "lr": 0.003, "weight_decay": 0.05}},
        {"model__name": "paper_cnn"},
        {"norm": {"name": "batchless", "channel_groups": 4}, "model__name": "wrn10_1"},
        {"norm__name": "batchless-plain"},
    ],
    ids=["preset", "plain-probe", "paper-shared", "paper-adam", "group-adamw", "dropout", "groups", "plain"],
)
def test_law_2_whole_runs_do_not_depend_on_the_split(changes):
    """Law 2: runs of two epochs, short last batches included, end in the same weights for any micro-batch."""
    whole = state(trained(tiny_recipe(**changes)))
    for micro in (1, 3):
        other = state(trained(tiny_recipe(**changes, train__micro_batch_size=micro)))
        assert largest_difference(whole, other) < 1e-10


def test_batchnorm_breaks_law_2():
    """The law is not empty: BatchNorm's result does depend on the split."""
    recipe = tiny_recipe(norm={"name": "batch"})
    whole = state(trained(recipe))
    assert (
        largest_difference(whole, state(trained(tiny_recipe(norm={"name": "batch"}, train__micro_batch_size=4)))) > 1e-3
    )


def test_one_step_equals_a_plain_loop():
    """The accumulated step is the textbook one: autograd on the mean loss of the whole batch, a bound of 1, torch.optim.SGD."""
    recipe = tiny_recipe(norm={"name": "batch"}, train__micro_batch_size=16)
    experiment = build_experiment(recipe)
    trainer, model = experiment.trainer, copy.deepcopy(experiment.model)
    index = epoch_order(40, seed=0, epoch=0)[:16]
    seeds = instance_seeds(0, 0, index)
    optimizer = torch.optim.SGD(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 5e-4},
            {"params": [p for p in model.parameters() if p.dim() == 1]},
        ],
        lr=trainer.schedule.factor(0) * 0.1,
        momentum=0.9,
        nesterov=True,
    )
    inputs = trainer.accumulation.preprocess.train(trainer.data.train.images[index], seeds)
    model.train()
    loss = torch.nn.functional.cross_entropy(model(inputs), trainer.data.train.labels[index], label_smoothing=0.1)
    loss.backward()
    assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) > 1
    optimizer.step()
    advance(trainer, 1)
    assert largest_difference(dict(model.state_dict()), dict(experiment.model.state_dict())) < 1e-12


class Correct(torch.autograd.Function):
    """xhat, whose gradient weight * g loses weight * (A + B * xhat) / N, with the (A, B) of each image from those before it."""

    @staticmethod
    def forward(ctx, xhat, weight, prior):
        ctx.save_for_backward(xhat, weight, prior)
        return xhat.clone()

    @staticmethod
    def backward(ctx, weighted):
        xhat, weight, (shift, slope) = ctx.saved_tensors
        n, g = len(xhat), weighted / weight.view(-1, 1, 1)
        left, left_slope, out = torch.zeros_like(shift), torch.zeros_like(slope), []
        for k in range(n):
            d = (LARGEST_SQUARE / (1 + xhat[k].square().mean((1, 2)))).clamp(max=1).sqrt()
            a, b = d * (shift + left / (n - k + HORIZON)), d * (slope + left_slope / (n - k + HORIZON))
            rest = n * g[k] - a.view(-1, 1, 1) - b.view(-1, 1, 1) * xhat[k]
            out.append(rest / n)
            left, left_slope = left + d * rest.mean((1, 2)), left_slope + d * (rest * xhat[k]).mean((1, 2))
        return torch.stack(out) * weight.view(-1, 1, 1), None, None


def keep_moments(old, layer, args):
    old[layer] = (args[0].mean((0, 2, 3)), args[0].var((0, 2, 3), correction=0))


def remember(seen, layer, a, xhat, g):
    seen[layer] = (a, xhat, g)


@pytest.mark.parametrize("fold", [True, False])
def test_batchless_steps_equal_a_hand_written_loop(fold):
    """The whole step of batchless-plain, folded or not, written out on the whole batch from the formulas: autograd, natural
    statistics, correction, clipping, SGD and probe on the batch's first images; for a full batch, another, and the short last."""
    recipe = tiny_recipe(
        train__micro_batch_size=3,
        optimizer={"name": "sgd", "lr": 0.1, "clip_norm": 0.5},
        norm={"name": "batchless-plain", "probe_images": 6, "fold": fold},
    )
    experiment = build_experiment(recipe)
    assert bool(folded_layers(experiment.model)) == fold
    trainer, model = experiment.trainer, copy.deepcopy(experiment.model)
    unfuse(model)
    norms = [m for m in model.modules() if isinstance(m, BatchlessNorm2d)]
    assert all(bool(m.mean.detach().any()) for m in norms)  # they were initialised from data
    weights = [p for n, p in model.named_parameters() if not n.endswith((".mean", "raw_std"))]
    momentum = [torch.zeros_like(p) for p in weights]
    order, advanced = epoch_order(40, seed=0, epoch=0), trainer.steps()
    for step, start in enumerate(range(0, 40, 16)):
        index = order[start : start + 16]
        inputs = trainer.accumulation.preprocess.train(trainer.data.train.images[index], instance_seeds(0, 0, index))
        seen = {}  # each layer's input and output gradient

        def formula(m, args, _, seen=seen):
            mean, std, weight, bias = (t.view(-1, 1, 1) for t in (m.mean.detach(), m.std.detach(), m.weight, m.bias))
            live = (args[0] - mean) / std
            xhat = live.detach()
            out = weight * Correct.apply(live, m.weight.detach(), m.correction.clone()) + bias
            out.register_hook(partial(remember, seen, m, args[0].detach(), xhat))
            return out

        model.train()
        model.zero_grad()
        probe = inputs[:6]
        old = {}
        handles = [m.register_forward_pre_hook(partial(keep_moments, old)) for m in norms]
        with torch.no_grad():
            model(probe)
        for handle in handles:
            handle.remove()
        handles = [m.register_forward_hook(formula) for m in norms]
        torch.nn.functional.cross_entropy(
            model(inputs), trainer.data.train.labels[index], label_smoothing=0.1
        ).backward()
        for handle in handles:
            handle.remove()
        for m in norms:
            m.discard()
            a, xhat, g = seen[m]
            torch.testing.assert_close(m.weight.grad, (g * xhat).sum((0, 2, 3)), rtol=1e-9, atol=1e-12)
            positions = a.shape[2] * a.shape[3]
            variance, first = torch.var_mean(xhat, (0, 2, 3), correction=0)
            of_g, of_g_xhat = g.sum((0, 2, 3)) / positions, (g * xhat).sum((0, 2, 3)) / positions
            slope = (of_g_xhat - of_g * first) / variance.clamp(min=0.1)
            m.correction.lerp_(torch.stack((of_g - slope * first, slope)), 0.1)
            mean, std = m.mean.detach().clone(), m.std.detach().clone()
            new_mean = mean + 0.1 * (a.mean((0, 2, 3)) - mean)
            new_var = std**2 + 0.1 * ((a - mean.view(-1, 1, 1)).square().mean((0, 2, 3)) - std**2)
            m.set_statistics(new_mean, new_var.sqrt())
        norm = torch.sqrt(sum(p.grad.square().sum() for p in weights))
        clip = min(1.0, 0.5 / (float(norm) + 1e-6))
        rate = 0.1 * trainer.schedule.factor(step)
        with torch.no_grad():
            for p, buffer in zip(weights, momentum, strict=True):
                buffer.mul_(0.9).add_(clip * p.grad + (5e-4 * p if p.dim() > 1 else 0))
                p -= rate * buffer

            def follow(m, args, old=old):
                a, (mean_old, var_old) = args[0], old[m]
                guard = (1e-4 + 1 / (a.numel() / a.shape[1])) * m.std.detach() ** 2
                ratio = (a.var((0, 2, 3), correction=0) + guard) / (var_old + guard)
                m.set_statistics(m.mean + a.mean((0, 2, 3)) - mean_old, m.std * ratio.sqrt())

            handles = [m.register_forward_pre_hook(follow) for m in norms]
            model(probe)
            for handle in handles:
                handle.remove()
        record = next(r for r in advanced if isinstance(r, StepRecord))
        assert record.step == step + 1
        assert record.grad_norm == pytest.approx(float(norm), rel=1e-9)
        assert largest_difference(dict(model.state_dict()), dict(experiment.model.state_dict())) < 1e-9, step


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm": {"name": "batchless-paper"}, "optimizer": {"name": "adam", "lr": 0.003}},
        {"norm": {"name": "batch"}},
        {"norm__name": "batchless-plain"},
    ],
    ids=["preset", "paper-adam", "batch", "plain"],
)
def test_law_4_resume_is_bitwise(stop, changes, tmp_path):
    """Law 4: stopping after any step, mid-epoch included, and going on in a new process state changes no bit."""
    from bln_train.runs.checkpoint import load_checkpoint, save_checkpoint

    recipe = tiny_recipe(**changes, train__precision="fp32", model__name="paper_cnn")
    straight = build_experiment(recipe).trainer
    records = advance(straight)
    first = trained(recipe, stop)
    save_checkpoint(tmp_path / "checkpoint.pt", first.state_dict())
    second = build_experiment(recipe, initialize=False).trainer
    second.load_state_dict(load_checkpoint(tmp_path / "checkpoint.pt"))
    more = advance(second)
    expected, found = state(straight), state(second)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)

    def figures(all_records):
        return [
            (r.step, getattr(r, "loss", None), getattr(r, "train_loss", None), getattr(r, "test_loss", None))
            for r in all_records
            if hasattr(r, "step")
        ]

    assert figures(records)[-len(figures(more)) :] == figures(more)


def test_law_8_help_needs_no_torch():
    """Law 8: `--help` and `check` import no torch."""
    code = (
        "import sys; from typer.testing import CliRunner; from bln_train.cli.app import app; r = CliRunner();"
        "assert r.invoke(app, ['--help']).exit_code == 0; assert r.invoke(app, ['check', 'quickstart']).exit_code == 0;"
        "assert r.invoke(app, ['recipes', 'list']).exit_code == 0; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
