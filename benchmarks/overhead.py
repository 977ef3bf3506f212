"""Trainer overhead over a bare loop: the same network, data and arithmetic with and without the trainer around them.

    python benchmarks/overhead.py [--model resnet20] [--norm batchless] [--micro-batch 1] [--effective-batch 64]

The two are interleaved step by step in one process, and the median of the per-pair ratios is reported: machines drift.
"""

import argparse
import statistics
import time

import torch
from torch.nn import functional as F

from bln_train.build.experiment import build_experiment
from bln_train.data.datasets import epoch_order
from bln_train.norm import fold_once, standardize_once
from bln_train.recipe.recipe import Recipe
from bln_train.records import StepRecord
from bln_train.system import machine
from bln_train.system.rng import instance_seeds


def bare_steps(experiment, effective, micro):
    """What a user would write by hand around the layer, with no records, meter, schedule or checks."""
    trainer = experiment.trainer
    step, images = trainer.accumulation, trainer.data.train
    model, optimizer, norms = step.model, step.optimizer, step.statistics
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    model.train()
    epoch = 0
    while True:
        order = epoch_order(len(images), seed=0, epoch=epoch)
        for start in range(0, len(order) - effective + 1, effective):
            index = order[start : start + effective]
            seeds = instance_seeds(0, epoch, index)
            loss_sum = torch.zeros(())
            norms.begin(effective, step.probe_images)
            with standardize_once(step.standardized), fold_once(step.folded):
                for at in range(0, effective, micro):
                    part = index[at : at + micro]
                    logits = model(step.preprocess.train(images.images[part], seeds[at : at + micro]))
                    loss = F.cross_entropy(logits, images.labels[part], reduction="sum")
                    ((loss + norms.nll()) / effective).backward()
                    loss_sum += loss.detach()
            norms.update(effective)
            if step.clip_norm:
                torch.nn.utils.clip_grad_norm_(parameters, step.clip_norm)
            optimizer.step()
            model.zero_grad(set_to_none=True)
            if step.probe_images:
                probe = step.preprocess.train(images.images[index[: step.probe_images]], seeds[: step.probe_images])
                norms.follow(lambda probe=probe: model(probe))
            loss_sum.item()
            yield
        epoch += 1


def main():
    """Print the median times and the ratio."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--norm", default="batchless")
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--effective-batch", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    recipe = Recipe.model_validate(
        {
            "data": {"name": "shapes", "num_train": 2000, "num_test": 10},
            "model": {"name": args.model},
            "norm": {"name": args.norm},
            "train": {
                "epochs": 1000,
                "effective_batch_size": args.effective_batch,
                "micro_batch_size": args.micro_batch,
            },
            "optimizer": {"name": "sgd", "lr": 0.01},
            "runtime": {"device": args.device},
        }
    )
    ours, bare = build_experiment(recipe), build_experiment(recipe)
    records = (r for r in ours.trainer.steps() if isinstance(r, StepRecord))
    loop = bare_steps(bare, args.effective_batch, args.micro_batch)
    times = {"trainer": [], "bare loop": []}
    for pair in range(args.pairs + 3):
        turns = [("trainer", records), ("bare loop", loop)]
        for name, steps in turns if pair % 2 else turns[::-1]:
            began = time.perf_counter()
            next(steps)
            if pair >= 3:  # the first steps are tracked, and warm the caches
                times[name].append(time.perf_counter() - began)
    ratios = [a / b for a, b in zip(times["trainer"], times["bare loop"], strict=True)]
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"{name:10} {1000 * median:8.1f} ms per step, {args.effective_batch / median:7.1f} images/s")
    print(f"ratio trainer / bare loop: median {statistics.median(ratios):.4f} over {len(ratios)} pairs")
    print(f"{args.model}, norm {args.norm}, effective {args.effective_batch}, micro {args.micro_batch}; "
          f"{machine.device_name(ours.device)}, torch {torch.__version__}")  # fmt: skip


if __name__ == "__main__":
    main()
