"""Law 2 over real processes: the same run in 1, 2, 3 and 4 processes by micro-batch, float64, as a table of differences.

    python benchmarks/process_grid.py

20 steps of a ResNet-8 with the default norm (probe, correction, clipped SGD with Nesterov momentum) on batches of 40, 40, 40, 40
and 3 images, each balanced in 12 parts: of three or four images, and in the last batch of one or none, which leaves the fourth
process without an image.
Exits with 1 where a difference reaches 1e-10.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from bln_train.build.experiment import build_experiment
from bln_train.experiments.open_run import begin_together
from bln_train.recipe.recipe import Recipe
from bln_train.train.distributed import joined

PROCESSES, MICRO_BATCHES, NUM_STEPS, BOUND = (1, 2, 3, 4), (1, 3, 8), 20, 1e-10


def recipe(micro_batch_size):
    return Recipe.model_validate(
        {
            "data": {"name": "shapes", "num_train": 163, "num_test": 10},
            "model": {"name": "resnet8"},
            "norm": {"name": "batchless", "probe_images": 6, "init_images": 10, "correction_parts": 12},
            "train": {
                "epochs": 4,
                "effective_batch_size": 40,
                "micro_batch_size": micro_batch_size,
                "precision": "fp64",
            },
            "optimizer": {"name": "sgd", "lr": 0.1, "nesterov": True},
            "schedule": {"name": "cosine", "warmup_epochs": 0.5},
            "runtime": {"device": "cpu"},
        }
    )


def work(folder):
    """What each process does: the row of its number of processes."""
    with joined(torch.device("cpu"), 120) as world:
        for micro in (*MICRO_BATCHES, 40) if world.size == 1 else MICRO_BATCHES:
            experiment = build_experiment(recipe(micro), world=world)
            begin_together(world, recipe(micro), experiment)
            for _ in experiment.trainer.steps():
                pass
            assert experiment.trainer.num_steps_done == NUM_STEPS
            if world.rank == 0:
                torch.save(experiment.model.state_dict(), folder / f"{world.size}-{micro}.pt")


def main():
    """Run every cell and print the table."""
    with tempfile.TemporaryDirectory() as name:
        for size in PROCESSES:
            launcher = (
                ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)] if size > 1 else []
            )
            command = [sys.executable, *launcher, __file__, "--worker", name]
            subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
        whole = torch.load(Path(name) / "1-40.pt", weights_only=True)
        worst = 0.0
        print(
            f"largest |difference| of any weight or statistic from 1 process, micro-batch 40, after {NUM_STEPS} steps"
        )
        print("processes  " + "".join(f"micro-batch {micro:<6}" for micro in MICRO_BATCHES))
        for size in PROCESSES:
            row = [torch.load(Path(name) / f"{size}-{micro}.pt", weights_only=True) for micro in MICRO_BATCHES]
            differences = [max(float((s[k] - whole[k]).abs().max()) for k in whole) for s in row]
            worst = max(worst, *differences)
            print(f"{size:<11}" + "".join(f"{d:<18.1e}" for d in differences))
    return int(not worst < BOUND)


if __name__ == "__main__":
    sys.exit(work(Path(sys.argv[2])) if sys.argv[1:2] == ["--worker"] else main())
