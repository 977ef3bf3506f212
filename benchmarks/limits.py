"""What other norms could bring, with the statistics of their own batch: the limit of what learned ones can reach.

    python benchmarks/limits.py --norm groups --groups 8 --set optimizer.lr=0.8

Research, not the product: whole batches, autograd, standardised convolutions, trained as the recipe says. In the place of
each BatchNorm, all with a scale and a shift for each channel behind them:

    batch       BatchNorm
    groups      BatchNorm, then groups of channels of each image (batch-channel normalisation: Qiao et al., arXiv 1911.09738)
    energy      BatchNorm, then groups of an image by their root mean square alone
    centred     BatchNorm, then groups of an image less their mean alone
    first       groups of an image, then BatchNorm
    half        the mean of BatchNorm and groups, scaled to unit variance
    whitened    channels decorrelated over the batch by five steps of Newton's (Huang et al., arXiv 1904.03441)
    constant    the same, with no gradient through the statistics
    group       groups of an image alone

Prints the train loss of each epoch and the accuracy on test and held-out images, where it was measured (recipes/RESULTS.md).
"""

import argparse

import torch
from torch import nn
from torch.nn import functional as F

from bln_train.build.experiment import build_experiment
from bln_train.norm.replace import replace_modules
from bln_train.recipe.load import load_recipe
from bln_train.records import EpochRecord

EPS, RIDGE, STEPS, RATE = 1e-5, 1e-3, 5, 0.1
NORMS = ("batch", "groups", "energy", "centred", "first", "half", "whitened", "constant", "group")


class Norm(nn.Module):
    """In the place of a BatchNorm, with its weight and bias."""

    def __init__(self, norm, kind, groups):
        super().__init__()
        self.weight, self.bias, self.kind, self.groups = norm.weight, norm.bias, kind, groups
        zero = torch.zeros_like(norm.weight.detach())
        self.register_buffer("mean", zero)
        self.register_buffer("var", zero + 1)
        self.register_buffer("whitening", torch.diag(zero + 1))

    def forward(self, x):
        """(N, C, H, W) to the same."""
        return self.normalize(x) * self.weight[:, None, None] + self.bias[:, None, None]

    def normalize(self, x):
        """What scale and shift follow."""
        kind = self.kind
        if kind in ("whitened", "constant"):
            return self.whiten(x)
        if kind == "group":
            return F.group_norm(x, self.groups, eps=EPS)
        if kind == "first":
            return self.by_batch(F.group_norm(x, self.groups, eps=EPS))
        xhat = self.by_batch(x)
        if kind == "batch":
            return xhat
        if kind == "groups":
            return F.group_norm(xhat, self.groups, eps=EPS)
        if kind == "half":
            return 0.5**0.5 * (xhat + F.group_norm(x, self.groups, eps=EPS))
        rows = xhat.reshape(len(x), self.groups, -1)
        if kind == "energy":
            return (rows * (rows.square().mean(2, keepdim=True) + EPS).rsqrt()).reshape(x.shape)
        return (rows - rows.mean(2, keepdim=True)).reshape(x.shape)

    def by_batch(self, x):
        """BatchNorm."""
        return F.batch_norm(x, self.mean, self.var, None, None, self.training, RATE, EPS)

    def whiten(self, x):
        """(sqrt of the channels' covariance)^-1 (x - mean), nearly."""
        rows, identity = x.transpose(0, 1).reshape(x.shape[1], -1), torch.eye(x.shape[1], device=x.device)
        mean, whitening = self.mean, self.whitening
        if self.training:
            mean = rows.mean(1)
            centred = rows - mean[:, None]
            covariance = centred @ centred.T / rows.shape[1] + RIDGE * identity
            if self.kind == "constant":
                mean, covariance = mean.detach(), covariance.detach()
            trace, whitening = covariance.trace(), identity
            for _ in range(STEPS):
                whitening = 1.5 * whitening - 0.5 * (whitening @ whitening @ whitening @ covariance) / trace
            whitening = whitening / trace.sqrt()
            self.mean.lerp_(mean.detach(), RATE)
            self.whitening.lerp_(whitening.detach(), RATE)
        out = whitening @ (rows - mean[:, None])
        return out.reshape(x.shape[1], len(x), *x.shape[2:]).transpose(0, 1)


def main():
    """Train once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="cifar10_10k_resnet8")
    parser.add_argument("--norm", default="groups", choices=NORMS)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe")
    options = parser.parse_args()
    fixed = ["norm=batch", "model.weight_standardization=true", f"train.seed={options.seed}"]
    experiment = build_experiment(load_recipe(options.recipe, [*fixed, *options.set]))
    replace_modules(experiment.model, nn.BatchNorm2d, lambda norm: Norm(norm, options.norm, options.groups))
    step = experiment.trainer.accumulation
    step.running, step.graphs = [], None
    for record in experiment.trainer.steps():
        if isinstance(record, EpochRecord):
            found = {"test": record.test_accuracy, "held out": record.validation_accuracy}
            accuracies = "".join(f", {100 * value:.2f} % {of}" for of, value in found.items() if value is not None)
            print(f"epoch {record.epoch}: train loss {record.train_loss:.3f}{accuracies}", flush=True)


if __name__ == "__main__":
    main()
