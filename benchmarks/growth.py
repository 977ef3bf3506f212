"""How the cost of a training step grows: with the effective batch, with depth, with width, with the side of the images.

    python benchmarks/growth.py [--device cuda] [--threads 2] [--micro-batch 1] [--repeats 5]

Time of whole optimizer steps on random images, sizes in turns, medians. For the effective batch a line is fitted, seconds =
once a step + per image * N, by least squares of relative errors; the largest error of the fit is printed with it.
"""

import argparse
import statistics
import time

import torch

from bln_train.build.experiment import build_experiment
from bln_train.experiments.sweep import random_data
from bln_train.recipe.recipe import Recipe
from bln_train.system import machine
from bln_train.train.batches import EffectiveBatch

EFFECTIVE = (1, 4, 16, 64, 256, 1024, 4096)
DEPTHS = (8, 20, 32, 56, 110)
WIDTHS = (1, 2, 4, 8)
SIDES = (16, 32, 64, 128)


def a_step(args, *, model="resnet8", effective=32, side=32):
    """A function that takes one optimizer step, and the number of weights."""
    recipe = Recipe.model_validate(
        {
            "data": {"name": "folder", "root": "unused", "image_size": side},
            "model": {"name": model},
            "norm": {"name": "batchless"},
            "train": {
                "epochs": 1,
                "effective_batch_size": effective,
                "micro_batch_size": min(args.micro_batch, effective),
            },
            "optimizer": {"name": "sgd", "lr": 1e-4},
            "runtime": {"device": args.device, "num_threads": args.threads},
        }
    )
    experiment = build_experiment(recipe, data=random_data(recipe, max(effective, 32)))
    step, index = experiment.trainer.accumulation, torch.arange(effective)

    def take():
        step(EffectiveBatch(experiment.data.train, index, 0, 0))
        if args.device == "cuda":
            torch.cuda.synchronize()

    return take, sum(p.numel() for p in experiment.model.parameters())


def seconds_of(steps, repeats):
    """Medians of steps that take turns, by key; the slowest as often as all others, the first turn left out."""
    found = {key: [] for key in steps}
    for turn in range(repeats + 1):
        for key, (take, _) in steps.items():
            began = time.perf_counter()
            take()
            if turn or repeats == 0:
                found[key].append(time.perf_counter() - began)
    return {key: statistics.median(own) for key, own in found.items()}


def fit(points):
    """(once, per image) of seconds = once + per image * N with least relative errors, and the largest of these."""
    rows = torch.tensor([[1 / s, n / s] for n, s in points], dtype=torch.float64)
    once, per_image = (
        torch.linalg.lstsq(rows, torch.ones(len(points), 1, dtype=torch.float64)).solution.flatten().tolist()
    )
    return once, per_image, max(abs((once + per_image * n) / s - 1) for n, s in points)


def main():
    """Print a table for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(f"resnet8, micro-batch {args.micro_batch}\neffective  ms/step  ms/image")
    seconds = seconds_of({n: a_step(args, effective=n) for n in EFFECTIVE}, args.repeats)
    for n, s in seconds.items():
        print(f"{n:9} {1e3 * s:8.1f} {1e3 * s / n:9.2f}")
    once, per_image, error = fit(list(seconds.items()))
    print(f"{1e3 * once:.1f} ms once a step + {1e3 * per_image:.2f} ms an image; largest error of the line {error:.0%}")
    for title, name, steps in (
        ("depth, effective batch 32", "resnet", {n: a_step(args, model=f"resnet{n}") for n in DEPTHS}),
        ("width, effective batch 32", "wrn16_", {n: a_step(args, model=f"wrn16_{n}") for n in WIDTHS}),
        ("image side, resnet20, effective batch 8", "side ",
         {n: a_step(args, model="resnet20", effective=8, side=n) for n in SIDES}),
    ):  # fmt: skip
        images = 8 if name == "side " else 32
        print(f"{title}\n{'':10} weights  ms/image  times the one before")
        before = None
        for n, s in seconds_of(steps, args.repeats).items():
            print(
                f"{name + str(n):10} {steps[n][1]:8} {1e3 * s / images:8.2f} {'-' if before is None else f'{s / before:.2f}'}"
            )
            before = s
    print(
        f"medians of {args.repeats} steps in turns; {machine.device_name(torch.device(args.device))}, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
