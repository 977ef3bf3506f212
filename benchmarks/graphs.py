"""Micro-steps replayed as CUDA graphs beside eager ones, how busy the GPU is, and norms beside BatchNorm at the whole batch.

    python benchmarks/graphs.py [--device cuda] [--model resnet20] [--micro-batch 1,8,64] [--repeats 20]

Whole optimizer steps of 128 random images, contenders in turns, medians. Busy is the time in which at least one kernel ran, over
the time of a step, by PyTorch's profiler; it is of a step of its own, as profiling slows the host. Without CUDA there is nothing
to replay, and those columns are "-".
"""

import argparse
import statistics
import time

import torch
from torch.profiler import ProfilerActivity, profile

from bln_train.build import runtime
from bln_train.build.experiment import build_experiment
from bln_train.experiments.sweep import random_data
from bln_train.recipe.recipe import Recipe
from bln_train.train.batches import EffectiveBatch
from bln_train.train.cuda_graphs import NUM_STEPS_TO_RECORD

EFFECTIVE = 128
NORMS = ("batch", "batchless-plain", "batchless")


def a_step(args, *, micro_batch, norm="batchless", graphs=False):
    """A function that takes one optimizer step and waits for it."""
    recipe = Recipe.model_validate(
        {
            "data": {"name": "folder", "root": "unused", "image_size": args.side},
            "model": {"name": args.model},
            "norm": {"name": norm},
            "train": {"epochs": 1, "effective_batch_size": EFFECTIVE, "micro_batch_size": micro_batch},
            "optimizer": {"name": "sgd", "lr": 1e-4},
            "runtime": {"device": args.device, "graphs": graphs, "num_threads": args.threads},
        }
    )
    experiment = build_experiment(recipe, data=random_data(recipe, EFFECTIVE))
    step, index = experiment.trainer.accumulation, torch.arange(EFFECTIVE)

    def take():
        step(EffectiveBatch(experiment.data.train, index, 0, 0))
        if args.device == "cuda":
            torch.cuda.synchronize()

    for _ in range(NUM_STEPS_TO_RECORD):
        take()
    return take


def medians(steps, repeats):
    """Seconds of each contender's step, in turns."""
    found = {name: [] for name in steps}
    for _ in range(repeats):
        for name, take in steps.items():
            began = time.perf_counter()
            take()
            found[name].append(time.perf_counter() - began)
    return {name: statistics.median(own) for name, own in found.items()}


def covered(intervals):
    """Length of the union of (begin, end)."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def busy(take):
    """Share of a step in which the GPU computes or copies."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        began = time.perf_counter()
        take()
        seconds = time.perf_counter() - began
    kernels = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return covered((e.time_range.start, e.time_range.end) for e in kernels) / (1e6 * seconds)


def main():
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--micro-batch", default="1,8,64")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    cuda = args.device == "cuda"
    print("micro-batch  eager ms/step  graphed ms/step  eager / graphed  GPU busy in replay")
    for size in map(int, args.micro_batch.split(",")):
        steps = {
            graphs: a_step(args, micro_batch=size, graphs=graphs) for graphs in ((False, True) if cuda else (False,))
        }
        found = medians(steps, args.repeats)
        graphed = "---"
        if cuda:
            ratio = found[False] / found[True]
            graphed = [f"{1e3 * found[True]:.2f}", f"{ratio:.2f}", f"{busy(steps[True]):.0%}"]
        print(f"{size:11} {1e3 * found[False]:14.2f} {graphed[0]:>16} {graphed[1]:>16} {graphed[2]:>19}")
    for graphs in (False, True) if cuda else (False,):
        whole = {norm: a_step(args, micro_batch=EFFECTIVE, norm=norm, graphs=graphs) for norm in NORMS}
        found = medians(whole, args.repeats)
        print(f"micro-batch {EFFECTIVE}, {'graphed' if graphs else 'eager'}: " + ", ".join(
              f"{norm} {1e3 * own:.2f} ms ({own / found['batch']:.3f})" for norm, own in found.items()))  # fmt: skip
    for key, value in runtime.environment(torch.device(args.device)).items():
        print(f"{key}: {value}")


if __name__ == "__main__":
    main()
