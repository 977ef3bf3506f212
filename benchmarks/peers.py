"""Images per second of training one image at a time, beside what people would use instead.

    python benchmarks/peers.py [--device cuda] [--rounds 7] [--only ours,lightning]

The same ResNet-20, 32x32 images in memory, SGD with momentum, effective batch 128. Contenders take turns, a short training each in
every round; a round's figure is the median over its optimizer steps, the first left out. Reported are medians over rounds, and
medians of each contender's ratio to `ours` in the same round: machines drift.

Nobody augments, and all images but ours are normalised beforehand, which favours the others. Lightning and Accelerate are left
out where they are not installed (pip install "bln-train[bench]").
"""

import argparse
import importlib.util
import statistics
import time
import warnings

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from bln_train.build.experiment import build_experiment
from bln_train.models.build import build_model, norm_factory
from bln_train.recipe.recipe import Recipe
from bln_train.records import StepRecord
from bln_train.system import machine

NUM_CLASSES, SIDE = 10, 32


def network(norm):
    """ResNet-20 as people have it, with a norm by name."""
    torch.manual_seed(0)
    return build_model("resnet20", NUM_CLASSES, norm=norm_factory(norm), image_size=SIDE, weight_standardization=False)


def data(num_images):
    """Random images, the same for all."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (num_images, 3, SIDE, SIDE), dtype=torch.uint8, generator=draw)
    return images, torch.randint(NUM_CLASSES, (num_images,), generator=draw)


def loader(args, device, batch_size):
    """The images as floats on the device, in mini-batches."""
    images, labels = data(args.images)
    return DataLoader(
        TensorDataset(((images.float() - 127.5) / 64).to(device), labels.to(device)),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
    )


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


class Clock:
    """Seconds between ticks."""

    def __init__(self, device):
        self.device, self.seconds, self.began = device, [], None

    def tick(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.began is not None:
            self.seconds.append(now - self.began)
        self.began = now


def turns_of(optimizer_steps, args, device):
    """A turn of an endless iterator that does an optimizer step each time it is asked."""

    def go():
        clock = Clock(device)
        clock.tick()
        for _ in range(args.steps):
            next(optimizer_steps)
            clock.tick()
        return clock.seconds

    return go


def endless(batches):
    while True:
        yield from batches


def ours(args, device, *, micro_batch=1, norm="batchless", fold=True, graphs="auto"):
    """`bln-train run`'s trainer as it is."""
    images, labels = data(args.images)
    recipe = Recipe.model_validate(
        {
            "data": {"name": "shapes", "num_train": args.images, "num_test": 10},
            "model": {"name": "resnet20"},
            "norm": {"name": norm, **({} if fold else {"fold": False})},
            "train": {"epochs": 1000, "effective_batch_size": args.effective_batch, "micro_batch_size": micro_batch},
            "optimizer": {"name": "sgd", "lr": 0.01},
            "runtime": {"device": args.device, "num_threads": args.threads, "graphs": graphs},
        }
    )
    experiment = build_experiment(recipe)
    experiment.data.train.images.copy_(images)
    experiment.data.train.labels.copy_(labels)
    records = (record for record in experiment.trainer.steps() if isinstance(record, StepRecord))
    next(records)  # is tracked
    return turns_of(records, args, device)


def bare(args, device, norm, *, channels_last=False, micro_batch=1):
    """A loop as in PyTorch's own examples."""
    model, batches = network(norm).to(device).train(), loader(args, device, micro_batch)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = model.to(memory_format=layout)
    optimizer = sgd(model)
    accumulate = args.effective_batch // micro_batch

    def optimizer_steps():
        for number, (images, labels) in enumerate(endless(batches), 1):
            (F.cross_entropy(model(images.contiguous(memory_format=layout)), labels) / accumulate).backward()
            if number % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
                yield

    return turns_of(optimizer_steps(), args, device)


def accelerate(args, device):
    """Accelerate's `accumulate`, GroupNorm."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=device.type == "cpu", gradient_accumulation_steps=args.effective_batch)
    model = network("group").train()
    model, optimizer, batches = accelerator.prepare(model, sgd(model), loader(args, torch.device("cpu"), 1))

    def optimizer_steps():
        for images, labels in endless(batches):
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(images), labels))
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                yield

    return turns_of(optimizer_steps(), args, device)


def lightning(args, device):
    """Lightning's `accumulate_grad_batches`, GroupNorm; progress bar, logger and checkpoints off."""
    import logging

    import lightning as L

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = network("group")

        def training_step(self, batch, number):
            images, labels = batch
            return F.cross_entropy(self.model(images), labels)

        def configure_optimizers(self):
            return sgd(self)

    class Watch(L.Callback):
        def __init__(self, clock):
            self.clock = clock

        def on_train_start(self, trainer, module):
            self.clock.tick()

        def on_train_batch_end(self, trainer, module, *rest):
            if (trainer.fit_loop.batch_idx + 1) % args.effective_batch == 0:
                self.clock.tick()

    module, batches = Module(), loader(args, torch.device("cpu"), 1)

    def go():
        clock = Clock(device)
        trainer = L.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            max_steps=args.steps,
            accumulate_grad_batches=args.effective_batch,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[Watch(clock)],
        )
        trainer.fit(module, batches)
        return clock.seconds

    return go


def contenders(args, device):
    """By name: what makes a training of some optimizer steps, which gives the seconds of each."""
    found = {
        "ours": lambda: ours(args, device),
        "ours, without CUDA graphs": lambda: ours(args, device, graphs=False),
        "ours, batchless-plain": lambda: ours(args, device, norm="batchless-plain"),
        "ours, not folded": lambda: ours(args, device, fold=False),
        "loop, no norm, channels-last": lambda: bare(args, device, "none", channels_last=True),
        "loop, no norm": lambda: bare(args, device, "none"),
        "loop, GroupNorm": lambda: bare(args, device, "group"),
        "loop, frozen BatchNorm": lambda: bare(args, device, "batch-frozen"),
        "Lightning, GroupNorm": lambda: lightning(args, device),
        "Accelerate, GroupNorm": lambda: accelerate(args, device),
        "ours, micro-batch 64": lambda: ours(args, device, micro_batch=64),
        "ours with BatchNorm, micro-batch 64": lambda: ours(args, device, micro_batch=64, norm="batch"),
        "ours, whole batch": lambda: ours(args, device, micro_batch=args.effective_batch),
        "loop, BatchNorm, whole batch": lambda: bare(
            args, device, "batch", channels_last=True, micro_batch=args.effective_batch
        ),
    }
    if device.type == "cpu":
        del found["ours, without CUDA graphs"]
    for package in ("lightning", "accelerate"):
        if importlib.util.find_spec(package) is None:
            del found[f"{package.capitalize()}, GroupNorm"]
            print(f"{package} is not installed and left out")
    words = [word.strip() for word in args.only.lower().split(",") if word.strip()]
    return {name: make for name, make in found.items() if not words or any(w in name.lower() for w in words)}


def main():
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--effective-batch", type=int, default=128)
    parser.add_argument("--images", type=int, default=1280)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of each turn")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="words of the names to run")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", module="lightning|pytorch_lightning|accelerate")
    device = torch.device(args.device)
    turns = {name: make() for name, make in contenders(args, device).items()}
    rates = {name: [] for name in turns}
    for number in range(args.rounds):
        order = list(turns.items())
        for name, go in order[::-1] if number % 2 else order:
            rates[name].append(args.effective_batch / statistics.median(go()[1:]))
    first = next(iter(rates))
    print(f"{'':38} images/s  {first} is faster by")
    for name, found in rates.items():
        ratio = statistics.median(a / b for a, b in zip(rates[first], found, strict=True))
        print(f"{name:38} {statistics.median(found):8.1f}  {ratio:6.2f}  ({min(found):.1f} to {max(found):.1f})")
    print(f"resnet20, effective batch {args.effective_batch}, {args.threads} threads, {args.rounds} rounds of {args.steps} steps; "
          f"{machine.device_name(device)}, torch {torch.__version__}")  # fmt: skip


if __name__ == "__main__":
    main()
