"""What two processes send for one optimizer step: Batchless Normalization against torch.nn.SyncBatchNorm on the same network.

    python benchmarks/collectives.py

Counted, not computed: a dispatch mode sees every collective operator that PyTorch runs in a training step of rank 0, with the bytes
of its buffer (of an all_gather, of what it gathers). Both networks are a CIFAR ResNet of `models/`, 2 processes, gloo, effective
batch 32, so 16 images a process, fp32. The batchless step is bln_train's own. SyncBatchNorm's own Python code
(torch/nn/modules/_functions.py) runs with its real collectives; the CUDA kernels that it calls between them are replaced by the
same formulas for the CPU, and checked: two processes of 16 images have the gradient of BatchNorm on 32. Its weight gradients go
through the same flat buffer, once for each step, so that the difference is the norm's alone.
SyncBatchNorm with micro-batches is there for its cost only: it normalises over micro-batch x processes images, not over the batch.
"""

import os
import subprocess
import sys
from collections import Counter

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules._functions import SyncBatchNorm as SyncFunction
from torch.utils._python_dispatch import TorchDispatchMode

from bln_train.build.experiment import build_experiment
from bln_train.experiments.open_run import begin_together
from bln_train.models.build import build_model, norm_factory
from bln_train.recipe.recipe import Recipe
from bln_train.train.batches import EffectiveBatch
from bln_train.train.distributed import joined

BATCH, PROCESSES = 32, 2


class Collectives(TorchDispatchMode):
    """Counts collective operators and the bytes of their buffers."""

    def __init__(self):
        super().__init__()
        self.number, self.bytes = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.number[func.__name__.split(".")[0].strip("_")] += 1
            self.bytes += sum(t.nbytes for t in torch.utils._pytree.tree_leaves(args[0]) if isinstance(t, torch.Tensor))
        return func(*args, **(kwargs or {}))


def row(x):
    """(C,) as it broadcasts over (N, C, H, W)."""
    return x.view(1, -1, 1, 1)


def stats(x, eps):
    return x.mean((0, 2, 3)), (x.var((0, 2, 3), correction=0) + eps).rsqrt()


def gather_stats(x, means, invstds, running_mean, running_var, momentum, eps, counts):
    share = (counts / counts.sum())[:, None]
    mean = (share * means).sum(0)
    variance = (share * (invstds.square().reciprocal() - eps + means.square())).sum(0) - mean.square()
    return mean, (variance + eps).rsqrt()


def elemt(x, weight, bias, mean, invstd, eps):
    return (x - row(mean)) * row(invstd * weight) + row(bias)


def backward_reduce(grad, x, mean, invstd, weight, *needs):
    sum_dy, sum_dy_xmu = grad.sum((0, 2, 3)), (grad * (x - row(mean))).sum((0, 2, 3))
    return sum_dy, sum_dy_xmu, sum_dy_xmu * invstd, sum_dy.clone()


def backward_elemt(grad, x, mean, invstd, weight, sum_dy, sum_dy_xmu, counts):
    n = counts.sum()
    inner = grad - row(sum_dy / n) - (x - row(mean)) * row(invstd.square() * sum_dy_xmu / n)
    return inner * row(invstd * weight)


class SyncBatchNorm(nn.SyncBatchNorm):
    """nn.SyncBatchNorm in training, without its refusal of the CPU."""

    def forward(self, x):
        group, size = torch.distributed.group.WORLD, torch.distributed.get_world_size()
        return SyncFunction.apply(x, self.weight, self.bias, None, None, self.eps, self.momentum, group, size)


def replace_cuda_kernels():
    torch.batch_norm_stats, torch.batch_norm_gather_stats_with_counts = stats, gather_stats
    torch.batch_norm_elemt, torch.batch_norm_backward_reduce = elemt, backward_reduce
    torch.batch_norm_backward_elemt = backward_elemt


def synchronized(model_name, world, micro):
    """Collectives of a step with SyncBatchNorm, and the number of its norms and channels."""
    torch.manual_seed(0)
    plain = build_model(model_name, 10, norm=norm_factory("batch"), image_size=32)
    x, y = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
    torch.manual_seed(0)
    model = build_model(model_name, 10, norm=SyncBatchNorm, image_size=32)
    model.load_state_dict(plain.state_dict())
    share = world.share(torch.arange(BATCH))
    with Collectives() as counted:
        for part in share.split(micro):
            (F.cross_entropy(model(x[part]), y[part], reduction="sum") / BATCH).backward()
        world.all_reduce_([p.grad for p in model.parameters()])
    if micro == len(share):  # the formulas above are right: this is what one BatchNorm on the whole batch gives
        F.cross_entropy(plain(x), y).backward()
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)
    return counted


def batchless(model_name, world, micro):
    """Collectives of a step of bln_train, as its recipes have it by default."""
    recipe = Recipe.model_validate(
        {
            "data": {"name": "shapes", "num_train": BATCH, "num_test": 10},
            "model": {"name": model_name},
            "norm": {"name": "batchless", "init_images": 8},
            "train": {"epochs": 1, "effective_batch_size": BATCH, "micro_batch_size": micro},
            "optimizer": {"name": "sgd", "lr": 0.1},
            "schedule": {"name": "constant"},
            "runtime": {"device": "cpu"},
        }
    )
    experiment = build_experiment(recipe, world=world)
    begin_together(world, recipe, experiment)
    with Collectives() as counted:
        experiment.trainer.accumulation(EffectiveBatch(experiment.data.train, torch.arange(BATCH), 0, 0))
    return (
        counted,
        sum(p.numel() for p in experiment.model.parameters()),
        len(experiment.trainer.accumulation.statistics.layers),
    )


def work():
    replace_cuda_kernels()
    with joined(torch.device("cpu"), 300) as world:
        lines = []
        for name in ("resnet8", "resnet20"):
            for micro in (16, 8, 1):
                ours, num_parameters, num_norms = batchless(name, world, micro)
                theirs = synchronized(name, world, micro)
                for norm, found in (("batchless", ours), ("SyncBatchNorm", theirs)):
                    kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(found.number.items()))
                    lines.append(
                        f"{name:10}{micro:>11}  {norm:14}{found.number.total():>11}{found.bytes:>12,}  {kinds}"
                    )
            lines.append(
                f"{'':10}({num_norms} norms; {num_parameters:,} parameters, {4 * num_parameters:,} bytes of gradients)"
            )
        if world.rank == 0:
            print(f"one optimizer step, effective batch {BATCH}, {PROCESSES} processes (gloo, fp32), seen by rank 0")
            print(f"{'network':10}{'micro-batch':>11}  {'norm':14}{'collectives':>11}{'bytes':>12}  of which")
            print("\n".join(lines))


if __name__ == "__main__":
    if "TORCHELASTIC_RUN_ID" in os.environ:
        work()
    else:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        sys.exit(subprocess.run([sys.executable, *launcher, __file__], env=environment).returncode)
