"""Loss and accuracy on images that are not trained on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from bln_train.data.augment import Preprocess
from bln_train.data.datasets import ImageSet
from bln_train.system.signals import StopRequested, never
from bln_train.train.distributed import ALONE, World
from bln_train.train.recovery import Attempt, does_not_fit, free_memory


class Evaluation(NamedTuple):
    """Means over a set of images."""

    loss: float
    accuracy: float
    num_images: int
    nll_by_layer: dict[str, float] | None = None
    """Of each batchless norm's inputs, as training logs it; None where it was not asked for."""
    notices: tuple[str, ...] = ()
    """What the user should know of how it was done."""


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
    stop_asked: Callable[[], bool] = never,
) -> Evaluation:
    """Mean cross-entropy (nats) and accuracy of `model` in eval mode; its mode is restored; one synchronisation.

    Several processes share the images and have the same result. All evaluate rank 0's buffers: of a BatchNorm each process has
    seen other images. Where memory runs out it goes on with half as many images at a time.

    Raises:
        DoesNotFitError: one image is too many.
        StopRequested: `stop_asked` said yes before a batch.
    """
    was_training, asked, reason = model.training, batch_size, ""
    model.eval()
    world.broadcast_(buffer for buffer in model.buffers() if buffer.is_floating_point())
    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    correct = torch.zeros((), device=device, dtype=torch.int64)

    def add(part: slice) -> None:
        labels = images.labels[part].to(device)
        with autocast():
            logits = model(preprocess.test(images.images[part].to(device, non_blocking=True)))
        logits = logits if logits.dtype == torch.float64 else logits.float()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        right = (logits.argmax(1) == labels).sum()
        loss_sum.add_(loss)  # both at the end, where nothing is allocated any more: no image counts twice
        correct.add_(right)

    share = world.share(range(len(images)))
    start = share.start
    while start < share.stop:
        if stop_asked():
            model.train(was_training)
            raise StopRequested
        number = min(batch_size, share.stop - start)
        with Attempt() as attempt:
            add(slice(start, start + number))
        if attempt.reason is None:
            start += number
            continue
        free_memory(device)
        if number == 1:
            raise does_not_fit("one image in evaluation", attempt.reason)
        batch_size, reason = number // 2, reason or attempt.reason
    model.train(was_training)
    world.all_reduce_([loss_sum, correct])
    notices = (
        (f"evaluation: out of memory at {asked} images ({reason}); it went on with {batch_size} at a time.",)
        if reason
        else ()
    )
    return Evaluation(float(loss_sum) / len(images), int(correct) / len(images), len(images), notices=notices)
