"""A small float64 experiment that takes every path of the trainer, and ways to compare its results."""

import torch
from torch.nn import functional as F

from bln_train.build.experiment import build_experiment
from bln_train.data.datasets import epoch_order
from bln_train.recipe.recipe import Recipe
from bln_train.train.batches import EffectiveBatch
from bln_train.train.trainer import Trainer

ACTIVATIONS = {"identity": lambda v: v, "relu": F.relu}

TINY = {
    "data": {
        "name": "shapes",
        "num_train": 40,
        "num_test": 10,
        "augment": {"flip": True, "crop_padding": 4, "cutout": 8},
    },
    "model": {"name": "resnet8"},
    "norm": {"name": "batchless", "probe_images": 6, "init_images": 10},
    "train": {
        "epochs": 2,
        "effective_batch_size": 16,
        "micro_batch_size": 16,
        "precision": "fp64",
        "label_smoothing": 0.1,
    },
    "optimizer": {"name": "sgd", "lr": 0.1, "nesterov": True},
    "schedule": {"name": "cosine", "warmup_epochs": 0.5},
    "runtime": {"device": "cpu"},
}  # 40 images in batches of 16: the last one of each epoch is short


def tiny_recipe(**changes):
    """TINY with `section__key=value` changes; a dict value replaces a whole section."""
    data = {name: dict(section) for name, section in TINY.items()}
    for path, value in changes.items():
        section, _, key = path.partition("__")
        if key:
            data[section][key] = value
        else:
            data[section] = dict(value) if isinstance(value, dict) else value
    return Recipe.model_validate(data)


def trained(recipe, num_steps=None):
    """The trainer after `num_steps` steps (all by default) of the recipe."""
    trainer = build_experiment(recipe).trainer
    advance(trainer, num_steps)
    return trainer


def advance(trainer: Trainer, num_steps=None):
    records = []
    for record in trainer.steps():
        records.append(record)
        if trainer.num_steps_done == num_steps:
            break
    return records


def state(trainer: Trainer):
    """Every tensor a checkpoint holds, by name."""
    found = dict(trainer.accumulation.model.state_dict())
    for n, values in trainer.accumulation.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{n}.{key}": torch.as_tensor(value) for key, value in values.items() if value is not None}
    return found


def largest_difference(old, new):
    """Largest difference of two dicts of tensors, relative to each tensor's largest entry."""
    assert old.keys() == new.keys()
    return max(
        float((old[k] - new[k]).abs().max() / old[k].abs().max().clamp(min=1e-30)) for k in old if old[k].numel()
    )


def gradients(experiment, micro_batch_size, num_images):
    """Gradients of every parameter for one effective batch, away from the optimum of the statistics."""
    trainer = experiment.trainer
    step = trainer.accumulation
    step.micro_batch_size = micro_batch_size
    index = epoch_order(40, seed=0, epoch=0)[:num_images]
    step.model.train()
    step.model.zero_grad()
    step.accumulate(EffectiveBatch(trainer.data.train, index, 0, 0))
    found = {name: p.grad.clone() for name, p in step.model.named_parameters() if p.grad is not None}
    step.statistics.discard()
    return found


def perturb(model):
    """Move statistics and corrections off zero, where a relative comparison would compare rounding errors."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if name.endswith(("mean", "raw_std", "correction")) and "running" not in name:
            tensor += 0.3 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
