"""How near `plan` comes to what is measured: predicted against measured peak over networks, norms, micro-batches, precisions.

On the CPU the peak of tracked tensors, which is real training of two steps; on CUDA the allocator's `max_memory_allocated`.

    python benchmarks/plan_accuracy.py                  # the whole grid, some 20 minutes on two cores
    python benchmarks/plan_accuracy.py --models resnet8 --device cuda --out plan.csv
"""

import argparse
import csv
import itertools
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from bln_train.experiments import sweep
from bln_train.plan.predict import plan_memory
from bln_train.recipe.load import load_recipe
from bln_train.system.units import format_bytes

MODELS = (
    "resnet8",
    "resnet20",
    "resnet18",
    "torchvision:resnet50",
    "torchvision:mobilenet_v2",
    "torchvision:densenet121",
)


def with_sizes(recipe, **sizes):
    """The recipe with other batch sizes."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=sizes)})


def main():
    """Print a row for each cell and the bounds of the error; exit 1 where a prediction is off by more than the issue allows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--norms", default="none,batch,group,batchless")
    parser.add_argument("--precisions", default="fp32,bf16")
    parser.add_argument("--micro-batches", default="1,4,16")
    parser.add_argument("--side", type=int, default=64, help="of the images of torchvision's networks")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", help="a CSV file")
    options = parser.parse_args()
    sizes = [int(size) for size in options.micro_batches.split(",")]
    rows, cuda = [], options.device == "cuda"
    for model, precision in itertools.product(options.models.split(","), options.precisions.split(",")):
        side = options.side if ":" in model else 32
        base = load_recipe(
            "cifar10_mb1",
            [
                f"model.name={model}",
                f"data={{name: folder, root: unused, image_size: {side}}}",
                f"train.precision={precision}",
                f"runtime.device={options.device}",
            ],
        )
        for norm in options.norms.split(","):
            for size in sizes:
                recipe = with_sizes(base.with_norm(norm), effective_batch_size=max(8, 2 * size), micro_batch_size=size)
                row = plan_memory(recipe, [size], cuda=cuda)[0]
                data = sweep.random_data(recipe, recipe.train.effective_batch_size)
                truth = sweep.measure_peak(recipe, data).peak_bytes
                predicted = row.tensor_bytes + ((row.workspace_bytes or 0) if cuda else 0)
                error = 100 * (predicted / truth - 1)
                rows.append(
                    {
                        "model": model,
                        "side": side,
                        "norm": norm,
                        "precision": precision,
                        "predicted_bytes": predicted,
                        "measured_bytes": truth,
                        "error_percent": round(error, 3),
                        **asdict(row),
                    }
                )
                print(
                    f"{model:24} {side:3} {norm:9} {precision} micro-batch {row.micro_batch_size:3}: predicted "
                    f"{format_bytes(predicted):>11}, measured {format_bytes(truth):>11}, {error:+.3f} %",
                    flush=True,
                )
    errors = [row["error_percent"] for row in rows]
    device = torch.cuda.get_device_name() if cuda else "CPU"
    print(
        f"{len(rows)} cells on {device}, torch {torch.__version__}: error from {min(errors):+.3f} to {max(errors):+.3f} %"
    )
    if options.out:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        with open(options.out, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    low, high = (-10, 10) if cuda else (-2, 5)
    sys.exit(0 if low <= min(errors) and max(errors) <= high else 1)


if __name__ == "__main__":
    main()
