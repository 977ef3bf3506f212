"""One optimizer step: the gradient of an effective batch, gathered in micro-batches of any size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bln_train.augment import Preprocess
from bln_train.data import ImageSet
from bln_train.errors import DivergedError
from bln_train.models.layers import InstanceDropout, set_instance_seeds
from bln_train.norm.batchless import BatchlessStatistics
from bln_train.norm.standardize import StandardizedConv2d, standardize_once

_SMALLEST_LOSS_SCALE = 2.0**-14  # far below any scale at which healthy gradients overflow


class StepTotals(NamedTuple):
    """Sums over an effective batch, still on the device, so that reading them is the step's only synchronisation."""

    loss: Tensor
    """() sum of the task loss over the images."""
    correct: Tensor
    """() number of images classified right."""
    grad_norm: Tensor
    """() global norm of the mean gradient before clipping."""
    nll: Tensor | None
    """(L,) likelihood of each batchless layer, or None without such layers."""


class MicroBatch(NamedTuple):
    """What the network sees at once."""

    inputs: Tensor
    """(n, C, H, W)"""
    labels: Tensor
    """(n,) int64"""
    seeds: Tensor
    """(n,) int64, the images' own seeds for every random draw."""


class AccumulationStep:
    """Gradient accumulation that gives the whole effective batch's gradient, whatever the split.

        gradient = 1/N * sum over micro-batches of d/dw [ sum of task losses + sum of likelihoods ]

    The sums are divided by the true number of images N, so ragged micro-batches and a short last batch are exact. The
    order is: accumulate, update statistics (they read the gradients), clip, step, drop gradients, probe.

    Args:
        model, optimizer, statistics: the network, what moves its parameters, its batchless layers.
        micro_batch_size: images in memory at once.
        probe_images: leading images of each effective batch on which the statistics follow the weights, 0 for none.
        label_smoothing: see torch.nn.functional.cross_entropy.
        clip_norm: bound on the global gradient norm, None for none.
        autocast: makes the context of each forward.
        scaler: for fp16, None otherwise.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        statistics: BatchlessStatistics,
        preprocess: Preprocess,
        *,
        device: torch.device,
        micro_batch_size: int,
        probe_images: int = 0,
        label_smoothing: float = 0.0,
        clip_norm: float | None = None,
        autocast: Callable[[], AbstractContextManager[object]],
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.model, self.optimizer, self.statistics, self.preprocess = model, optimizer, statistics, preprocess
        self.device, self.micro_batch_size = device, micro_batch_size
        self.probe_images = probe_images if statistics.layers else 0
        self.label_smoothing, self.clip_norm = label_smoothing, clip_norm
        self.autocast, self.scaler = autocast, scaler
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.standardized = [m for m in model.modules() if isinstance(m, StandardizedConv2d)]
        self.dropouts = [m for m in model.modules() if isinstance(m, InstanceDropout)]

    def __call__(
        self, images: ImageSet, index: Tensor, seeds: Tensor, gradients_ready: Callable[[], None] = lambda: None
    ) -> StepTotals:
        """Take one step on images[index]; index and seeds are (N,) int64 on the CPU, N >= 1."""
        num_images = len(index)
        # A short last batch may hold fewer images than the probe needs: too few would add noise to every statistic.
        probing = 0 < self.probe_images <= num_images
        self.model.train()
        loss_sum, correct = self.accumulate(images, index, seeds, gradients_ready)
        if self.scaler is not None:
            self._unscale()
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.scaler is not None and not torch.isfinite(grad_norm):
            # fp16 overflowed: the scaler lowers its scale and skips the step; statistics and correction skip it as well.
            nll = None
            self.statistics.discard()
        else:
            nll = self.statistics.update(num_images)
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip_norm, grad_norm)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self._drop_gradients()
        if probing and nll is not None:
            first = self._load(
                images, index[: self.probe_images], *self._to_device(images, index, seeds, self.probe_images)
            )
            self.statistics.synchronize(lambda: self._forward(first))
        set_instance_seeds(self.dropouts, None)
        return StepTotals(loss_sum, correct, grad_norm, nll)

    def accumulate(
        self, images: ImageSet, index: Tensor, seeds: Tensor, gradients_ready: Callable[[], None] = lambda: None
    ) -> tuple[Tensor, Tensor]:
        """Add the effective batch's gradient to every parameter's; returns the sums () of loss and of right answers."""
        num_images = len(index)
        num_watched = self.probe_images if self.probe_images <= num_images else 0
        loss_sum = torch.zeros((), device=self.device, dtype=torch.float64)
        correct = torch.zeros((), device=self.device, dtype=torch.int64)
        with standardize_once(self.standardized):
            for start, batch in self._micro_batches(images, index, seeds):
                self.statistics.watch(max(0, num_watched - start))
                logits = self._forward(batch)
                losses = F.cross_entropy(logits, batch.labels, reduction="sum", label_smoothing=self.label_smoothing)
                mean_loss = (losses + self.statistics.nll()) / num_images
                (mean_loss if self.scaler is None else self.scaler.scale(mean_loss)).backward()
                loss_sum += losses.detach()
                correct += (logits.detach().argmax(1) == batch.labels).sum()
                del batch, logits, losses, mean_loss  # or they would be alive beside their successors
            gradients_ready()
        return loss_sum, correct

    def gradients(self) -> list[Tensor]:
        """The gradients alive now: of parameters, and of weights that are standardised once for many micro-batches."""
        leaves = [
            *self.model.parameters(),
            *(m.shared_weight for m in self.standardized if m.shared_weight is not None),
        ]
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    def _micro_batches(self, images: ImageSet, index: Tensor, seeds: Tensor) -> Iterator[tuple[int, MicroBatch]]:
        labels, seeds = self._to_device(images, index, seeds, len(index))
        for start in range(0, len(index), self.micro_batch_size):
            part = slice(start, start + self.micro_batch_size)
            yield start, self._load(images, index[part], labels[part], seeds[part])

    def _to_device(self, images: ImageSet, index: Tensor, seeds: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Labels and seeds of the first images: 16 bytes each, so one copy for all micro-batches, which waits once."""
        return images.labels[index[:first]].to(self.device), seeds[:first].to(self.device)

    def _load(self, images: ImageSet, index: Tensor, labels: Tensor, seeds: Tensor) -> MicroBatch:
        """Bring one micro-batch to the device: only its own images are ever there, so memory is flat in the batch."""
        raw = images.images[index].to(self.device, non_blocking=True)
        return MicroBatch(self.preprocess.train(raw, seeds), labels, seeds)

    def _forward(self, batch: MicroBatch) -> Tensor:
        set_instance_seeds(self.dropouts, batch.seeds)
        with self.autocast():
            logits = self.model(batch.inputs)
        return logits if logits.dtype == torch.float64 else logits.float()

    def _unscale(self) -> None:
        """Divide the loss scale out of every gradient, those of natural statistics included, which no optimizer holds."""
        assert self.scaler is not None
        scale = self.scaler.get_scale()
        if scale < _SMALLEST_LOSS_SCALE:
            raise DivergedError(
                f"fp16 gradients overflow at any loss scale (now {scale:.1e}); training diverged",
                "Lower optimizer.lr, or use train.precision=bf16 or fp32.",
            )
        natural = [p.grad for p in self.statistics.natural_parameters if p.grad is not None]
        self.scaler.unscale_(self.optimizer)
        if natural:
            torch._foreach_mul_(natural, 1.0 / scale)

    def _drop_gradients(self) -> None:
        self.model.zero_grad(set_to_none=True)
