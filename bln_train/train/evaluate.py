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
from bln_train.signals import StopRequested, never


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
    stop_asked: Callable[[], bool] = never,
) -> Evaluation:
    """Mean cross-entropy (nats) and accuracy of `model` in eval mode; its mode is restored; one synchronisation.

    Raises:
        StopRequested: `stop_asked` said yes before a batch.
    """
    was_training = model.training
    model.eval()
    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    correct = torch.zeros((), device=device, dtype=torch.int64)
    for start in range(0, len(images), batch_size):
        if stop_asked():
            model.train(was_training)
            raise StopRequested
        part = slice(start, start + batch_size)
        labels = images.labels[part].to(device)
        with autocast():
            logits = model(preprocess.test(images.images[part].to(device, non_blocking=True)))
        logits = logits if logits.dtype == torch.float64 else logits.float()
        loss_sum += F.cross_entropy(logits, labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
    model.train(was_training)
    return Evaluation(float(loss_sum) / len(images), int(correct) / len(images), len(images))
