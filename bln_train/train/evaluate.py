"""Loss and accuracy on images that are not trained on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from bln_train.augment import Preprocess
from bln_train.data import ImageSet
from bln_train.parallel import ALONE, World


class Evaluation(NamedTuple):
    """Means over a set of images."""

    loss: float
    accuracy: float
    num_images: int
    nll_by_layer: dict[str, float] | None = None
    """Of each batchless norm's inputs, as training logs it; None where it was not asked for."""


@torch.no_grad()
def evaluate(
    model: nn.Module,
    images: ImageSet,
    preprocess: Preprocess,
    *,
    device: torch.device,
    batch_size: int,
    autocast: Callable[[], AbstractContextManager[object]],
    world: World = ALONE,
) -> Evaluation:
    """Mean cross-entropy (nats) and accuracy of `model` in eval mode; its mode is restored; one synchronisation.

    Several processes share the images and have the same result. All evaluate rank 0's buffers: of a BatchNorm each process has
    seen other images.
    """
    was_training = model.training
    model.eval()
    world.take_from_first(buffer for buffer in model.buffers() if buffer.is_floating_point())
    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    correct = torch.zeros((), device=device, dtype=torch.int64)
    share = world.share(range(len(images)))
    for start in share[::batch_size]:
        part = slice(start, min(start + batch_size, share.stop))
        labels = images.labels[part].to(device)
        with autocast():
            logits = model(preprocess.test(images.images[part].to(device, non_blocking=True)))
        logits = logits if logits.dtype == torch.float64 else logits.float()
        loss_sum += F.cross_entropy(logits, labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
    model.train(was_training)
    world.add_up([loss_sum, correct])
    return Evaluation(float(loss_sum) / len(images), int(correct) / len(images), len(images))
