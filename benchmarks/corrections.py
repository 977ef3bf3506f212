"""What corrections of the backward pass bring: batchless norms that take theirs from anywhere, trained on whole batches.

    python benchmarks/corrections.py --correction balanced --horizon 64 --gain 1 \\
        --set model.name=resnet20 --set train.epochs=6
    python benchmarks/corrections.py --correction regression --gain 1 --errors 30 --set model.name=resnet20 \\
        --set train.epochs=6 --set train.max_steps=80

Research, not the product: unfolded, whole batches, plain SGD. The layer is that of `batchless` in exact mode, except for where the
backward correction (A, B) comes from:

    average     running means of E[g] and E[g xhat] over earlier batches
    batch       those of the batch itself
    regression  the batch's own regression of g on 1 and xhat, which is BatchNorm's backward for any statistics in force
    balanced    as in the product (kernels/feedback.py): running means of the regression's coefficients, and what the batch's images
                before left over
    settled     averages, and afterwards a pass without loss through the batch's first images, scaled up, which takes out what the
                averages left; --apart one image at a time, else those images together

Prints the train loss of each epoch and the accuracy on the held-out images, 10,000 training images each (recipes/RESULTS.md).
With --errors N the weights then stay, and over N batches the gradients of convolutions are compared with those of `regression`:
the energy of the difference over that of the gradient, of the first convolution, the middle one and the last, and the same of
sums over batches.
"""

import argparse

import torch
from torch import nn

from bln_train.build.experiment import build_experiment
from bln_train.norm.kernels import feedback
from bln_train.norm.kernels.table import StateRow
from bln_train.recipe.load import load_recipe
from bln_train.records import EpochRecord
from bln_train.train.batches import EffectiveBatch

RATE, PROBE_IMAGES, INIT_IMAGES, EPS = 0.1, 8, 128, 1e-6


def per_channel(vector):
    """(C,) or (N, C), to be broadcast over images of C channels."""
    return vector[..., None, None]


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, layer):
        ctx.layer, ctx.std = layer, layer.std.clone()
        xhat = (x - per_channel(layer.mean)) / per_channel(layer.std)
        ctx.save_for_backward(xhat, weight)
        return xhat * per_channel(weight) + per_channel(bias)

    @staticmethod
    def backward(ctx, grad):
        (xhat, weight), layer = ctx.saved_tensors, ctx.layer
        num_images = len(grad)
        of_weight, of_bias = (grad * xhat).sum((0, 2, 3)), grad.sum((0, 2, 3))
        # Of a summed loss, per position: a short batch must not change their meaning.
        of_images = torch.stack((grad.mean((2, 3)), (grad * xhat).mean((2, 3))), 1) * num_images
        moments = torch.stack((xhat.mean((2, 3)), (xhat * xhat).mean((2, 3))), 1)
        along_one, along_xhat = of_images.mean(0)
        shift, slope = layer.take_correction(of_images, moments)
        if layer.left is not None and layer.options.apart:
            grad = without_regression(grad, xhat)
        elif layer.left is not None:
            shift, slope = shift + along_one, slope + along_xhat
        grad = grad - (per_channel(shift) + xhat * per_channel(slope)) / num_images
        return grad * per_channel(weight / ctx.std), of_weight, of_bias, None


def without_regression(grad, xhat):
    """What is left of each image's gradient by its regression on 1 and xhat; an image in which xhat barely varies tells little."""
    mean, of_grad = xhat.mean((2, 3)), grad.mean((2, 3))
    variance = (xhat * xhat).mean((2, 3)) - mean * mean
    slope = ((grad * xhat).mean((2, 3)) - of_grad * mean) / (variance + 0.1)
    return grad - per_channel(of_grad - slope * mean) - xhat * per_channel(slope)


class Norm(nn.Module):
    """In the place of a BatchNorm, with its weight and bias."""

    def __init__(self, norm, options):
        super().__init__()
        self.weight, self.bias, self.options = norm.weight, norm.bias, options
        zero = torch.zeros_like(norm.weight.detach())
        for name in ("mean", "shift", "slope"):
            self.register_buffer(name, zero.clone())
        self.register_buffer("std", zero + 1)
        self.initializes = self.follows = False
        self.left = self.seen = None  # what averages left of the batch; what it was

    def forward(self, x):
        """(N, C, H, W)"""
        if not self.training:
            return self.normalize(x)
        if self.initializes:
            variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
            self.mean.copy_(mean)
            self.std.copy_((variance + EPS).sqrt())
            return self.normalize(x)
        if self.follows:
            variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
            self.mean += self.options.gain * (mean - self.probe[1])
            self.std *= ((variance + EPS) / (self.probe[0] + EPS)).pow(self.options.gain / 2)
            return self.normalize(x)
        if self.left is None:
            self.batch = torch.var_mean(x.detach(), (0, 2, 3), correction=0)
            self.probe = torch.var_mean(x.detach()[:PROBE_IMAGES], (0, 2, 3), correction=0)
        return _Normalize.apply(x, self.weight, self.bias, self)

    def normalize(self, x):
        """The layer's map."""
        return (x - per_channel(self.mean)) * per_channel(self.weight / self.std) + per_channel(self.bias)

    def take_correction(self, of_images, moments):
        """What to take out of the gradient along 1 and along xhat, of all images or of each, given what they have of it."""
        kind = self.options.correction
        if self.left is not None:
            return self.left
        own = of_images.mean(0)
        self.seen = tuple(feedback.regression(own, moments.mean(0)) if kind in ("regression", "balanced") else own)
        if kind in ("batch", "regression"):
            return self.seen
        if kind != "balanced":
            return self.shift, self.slope
        state = torch.zeros(len(StateRow), *self.shift.shape)
        state[StateRow.TO_COME] = len(of_images) + self.options.horizon
        feedback.HORIZON = self.options.horizon
        running = torch.stack((self.shift, self.slope))
        return feedback.corrections(running, state, of_images, moments, torch.ones(())).unbind(1)

    def update(self):
        """After a batch."""
        variance, mean = self.batch
        change = mean - self.mean
        self.std.copy_(((1 - RATE) * self.std**2 + RATE * (variance + change * change)).sqrt())
        self.mean += RATE * change
        self.update_correction()

    def update_correction(self):
        """The part of that which leaves the statistics alone."""
        self.shift.lerp_(self.seen[0], RATE)
        self.slope.lerp_(self.seen[1], RATE)


def replace_norms(model, options):
    """Put `Norm`s in the place of BatchNorms; returns them."""
    found = []
    for name, child in list(model.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            found.append(Norm(child, options))
            setattr(model, name, found[-1])
        else:
            found += replace_norms(child, options)
    return found


def load(step, images, index, epoch):
    """A network's input of the images of an epoch, and their labels."""
    batch = EffectiveBatch(images, index, 0, epoch).first(len(index), step.device)
    return step.preprocess.train(batch.images, batch.seeds), batch.labels


def prepare(experiment, options):
    """Make the trainer's steps those of `Norm`s: settle before the optimizer's step, update and follow after it."""
    model, step = experiment.model, experiment.trainer.accumulation
    layers, images = replace_norms(model, options), {}
    step.running, step.graphs = [], None

    def all_layers(**values):
        for layer in layers:
            vars(layer).update(values)

    def keep(module, inputs):
        if module.training and torch.is_grad_enabled() and layers[0].left is None:
            images["batch"] = inputs[0].detach()

    model.register_forward_pre_hook(keep)
    model.train()
    with torch.no_grad():
        all_layers(initializes=True)
        model(load(step, experiment.data.train, torch.arange(INIT_IMAGES), 0)[0])
        all_layers(initializes=False)
    accumulate, optimize = step.accumulate, step.optimizer.step

    def accumulate_and_settle(*args, **kwargs):
        sums = accumulate(*args, **kwargs)
        if options.correction == "settled":
            for layer in layers:
                layer.left = layer.seen[0] - layer.shift, layer.seen[1] - layer.slope
            with torch.enable_grad():
                (0.0 * model(images["batch"][: options.images])).sum().backward()
            all_layers(left=None)
        return sums

    @torch.no_grad()
    def optimize_and_follow(*args, **kwargs):
        with torch.enable_grad():
            found = optimize(*args, **kwargs)
        for layer in layers:
            layer.update()
        all_layers(follows=True)
        model(images["batch"][:PROBE_IMAGES])
        all_layers(follows=False)
        return found

    step.accumulate, step.optimizer.step = accumulate_and_settle, optimize_and_follow
    return experiment


CORRECTIONS = ("average", "batch", "regression", "balanced", "settled")


def print_errors(experiment, options):
    """The table of --errors."""
    model, step = experiment.model, experiment.trainer.accumulation
    layers = [module for module in model.modules() if isinstance(module, Norm)]
    weights = [p for p in model.parameters() if p.dim() == 4]
    weights = [weights[0], weights[len(weights) // 2], weights[-1]]
    generator, found, skipped = torch.Generator().manual_seed(1), {}, 10  # first batches only fill the averages
    batches = [torch.randperm(10_000, generator=generator)[:128] for _ in range(skipped + options.errors)]
    for kind in CORRECTIONS[:-1]:
        options.correction = kind
        for layer in layers:
            layer.shift.zero_(), layer.slope.zero_()
        found[kind] = []
        for n, index in enumerate(batches):
            inputs, labels = load(step, experiment.data.train, index, n)
            model.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs), labels).backward()
            for layer in layers:
                layer.update_correction()
            if n >= skipped:
                found[kind].append([p.grad.clone() for p in weights])
    for kind, gradients in found.items():
        exact = found["regression"]
        columns = []
        for k in range(3):
            difference = torch.stack([a[k] - b[k] for a, b in zip(gradients, exact, strict=True)])
            own = torch.stack([a[k] for a in exact])
            columns += [
                difference.square().sum() / own.square().sum(),
                difference.sum(0).square().sum() / own.sum(0).square().sum(),
            ]
        print(f"{kind:11s}", "  ".join(f"{float(error):.3f}" for error in columns[::2] + columns[1::2]))


def main():
    """Train once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--correction", default="balanced", choices=CORRECTIONS)
    parser.add_argument("--horizon", type=float, default=feedback.HORIZON, help="of a balanced correction, in images")
    parser.add_argument("--errors", type=int, default=0, help="batches on which gradients are compared afterwards")
    parser.add_argument("--images", type=int, default=32, help="through which it is settled")
    parser.add_argument("--apart", action="store_true", help="as if one at a time were in memory")
    parser.add_argument(
        "--gain", type=float, default=1.0, help="share of the probe's change that the statistics follow"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe")
    options = parser.parse_args()
    held_out = ["data.num_train=20000", "data.validation_fraction=0.5", "data.num_test=100"]
    fixed = ["norm=batch", "model.weight_standardization=true", f"train.seed={options.seed}"]
    recipe = load_recipe("cifar10_10k_resnet8", [*held_out, *fixed, *options.set])
    experiment = prepare(build_experiment(recipe), options)
    for record in experiment.trainer.steps():
        if isinstance(record, EpochRecord):
            on_held_out = record.validation_accuracy
            accuracy = (
                "" if on_held_out is None else f", {100 * on_held_out:.2f} % held out, {record.validation_loss:.3f}"
            )
            print(f"epoch {record.epoch}: train loss {record.train_loss:.3f}{accuracy}", flush=True)
    if options.errors:
        print_errors(experiment, options)


if __name__ == "__main__":
    main()
