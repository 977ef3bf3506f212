"""One optimizer step: the gradient of an effective batch, gathered in micro-batches of any size."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bln_train.data.augment import Preprocess
from bln_train.data.datasets import ImageSet
from bln_train.errors import DivergedError
from bln_train.norm.dropout import InstanceDropout, set_instance_seeds
from bln_train.norm.fused.layer import fold_once
from bln_train.norm.fused.network import folded_layers
from bln_train.norm.replay import Run, at_once
from bln_train.norm.standardize import StandardizedConv2d, centre_filters, standardize_once
from bln_train.norm.statistics import BatchlessStatistics
from bln_train.system.rng import instance_seeds
from bln_train.system.signals import StopRequested, never
from bln_train.train.distributed import ALONE, World, part_of, reduce_step
from bln_train.train.micro_step import Graphs, MicroBatch, Sums
from bln_train.train.optim import MomentumAccumulatingSGD

_BLOCK_IMAGES = 128
SENT_BYTES = 2**18
"""Of images that go to a device at once, at most, unless one micro-batch has more."""
_SMALLEST_LOSS_SCALE = 2.0**-14  # far below any scale at which healthy gradients overflow


class StepTotals(NamedTuple):
    """Sums over an effective batch, still on the device."""

    loss: Tensor
    """() sum of the task loss over the images."""
    correct: Tensor
    """() number of images classified right."""
    grad_norm: Tensor | None
    """() global norm of the mean gradient before clipping; None where gradients gather in the momentum."""
    update_norm: Tensor | None
    """() global norm of the momentum before clipping where gradients gather there, else None."""
    nll: Tensor | None
    """(L,) likelihood of each batchless layer, or None without such layers."""
    notices: tuple[str, ...] = ()
    """What the user should know of how this step was taken."""
    is_finite: bool = True
    """Whether the step was taken; if not, only its gradients are there, until `give_up`."""


class AccumulationStep:
    """Gradient accumulation whose result is the same for every split of the effective batch.

        gradient = 1/N * sum over micro-batches of d/dw [ sum of task losses + sum of likelihoods ]

    The sums are divided by the true number of images N, so ragged micro-batches and a short last batch count right. With a
    correction (kernels/feedback.py) d/dw approximates BatchNorm's gradient, and depends on the order of the images.

    The order is: accumulate; add up over the processes; update statistics, which read the gradients; clip; step; drop gradients;
    let the statistics follow the new weights on the batch's first images, the probe. Where loss or gradient is not finite nothing
    follows the sums; see `give_up`.

    Args:
        model, optimizer, statistics: the network, what moves its parameters, its batchless layers.
        micro_batch_size: images in memory at once.
        probe_images: images of the effective batch on which statistics follow the weights; 0 for none.
        balanced_parts: contiguous parts of the effective batch whose correction is balanced by itself (feedback.py), a multiple
            of the number of processes; 0 for that number.
        label_smoothing: see torch.nn.functional.cross_entropy.
        clip_norm: bound on the global gradient norm, None for none.
        autocast: makes the context of each forward.
        scaler: for fp16, None otherwise.
        world: the processes that share each effective batch; all take every step together.

    Attributes:
        reduced: whether gradients of the step under way have been added up over processes: from there on no process can take the
            step again by itself (train/recovery.py).
        graphs: takes micro-steps in the place of `micro_step`, with the same result.
        stop_asked: asked between micro-steps; at yes the step is given up, undone, and raises StopRequested. A step whose
            gradients gather in the momentum is finished instead: to undo it would take the memory that this saves.

    Raises:
        ValueError: clip_norm or a scaler with an optimizer that gathers gradients in its momentum.
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
        balanced_parts: int = 0,
        label_smoothing: float = 0.0,
        clip_norm: float | None = None,
        autocast: Callable[[], AbstractContextManager[object]],
        scaler: torch.amp.GradScaler | None = None,
        world: World = ALONE,
    ) -> None:
        self.model, self.optimizer, self.statistics, self.preprocess = model, optimizer, statistics, preprocess
        self.device, self.micro_batch_size, self.probe_images = device, micro_batch_size, probe_images
        self.label_smoothing, self.clip_norm = label_smoothing, clip_norm
        self.autocast, self.scaler, self.world = autocast, scaler, world
        self.balanced_parts = balanced_parts or world.size
        self.reduced = False
        self.into_momentum = optimizer if isinstance(optimizer, MomentumAccumulatingSGD) else None
        if self.into_momentum is not None and (clip_norm is not None or scaler is not None):
            raise ValueError("gradients that gather in the momentum can be neither clipped nor loss-scaled")
        self._loss_dtype = torch.float64 if any(p.dtype == torch.float64 for p in model.parameters()) else torch.float32
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.all_parameters = [*self.parameters, *statistics.natural_parameters]
        self.folded = folded_layers(model)
        inside = {layer.linear for layer in self.folded}
        self.standardized = [m for m in model.modules() if isinstance(m, StandardizedConv2d) and m not in inside]
        self.dropouts = [m for m in model.modules() if isinstance(m, InstanceDropout)]
        batchnorms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        self.running = [buffer for m in batchnorms for buffer in m.buffers()]  # what a forward alone changes
        self.stop_asked: Callable[[], bool] = never
        self.graphs: Graphs | None = None

    def __call__(
        self, images: ImageSet, index: Tensor, seed: int, epoch: int, gradients_ready: Callable[[], None] = lambda: None
    ) -> StepTotals:
        """Take one step on images[index], (N,) int64 on the CPU, N >= 1, with the random draws of (seed, epoch)."""
        num_images = len(index)
        self.model.train()
        if self.into_momentum is not None:
            for layer in self.folded:  # as accumulate does, but the weight decay has to see the same weights
                if isinstance(layer.linear, StandardizedConv2d) and layer.linear.weight.requires_grad:
                    centre_filters(layer.linear.weight)
            # From here on the weights' gradients are their momentum; it enters the sum over the processes once.
            self.into_momentum.begin(from_zero=self.world.rank > 0)
        self.statistics.begin(None, max(0, self.probe_images - self.world.begin_of_share(num_images)))
        random_state, running = torch.get_rng_state(), [buffer.clone() for buffer in self.running]
        try:
            loss_sum, correct = self.accumulate(images, index, seed, epoch, gradients_ready)
        except StopRequested:  # all is as it was, but for filters that were centred
            torch.set_rng_state(random_state)
            self._restore_running(running)
            self._drop()
            raise
        self.reduced = self.world.size > 1
        reduce_step(self.world, self.all_parameters, self.statistics, (loss_sum, correct))
        if self.scaler is not None:
            self._unscale()
        grad_norm = None
        if self.into_momentum is None:
            grad_norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        is_finite = self._is_finite(loss_sum, grad_norm)
        if not is_finite and (self.scaler is None or not torch.isfinite(loss_sum)):
            self._restore_running(running)
            return StepTotals(loss_sum, correct, grad_norm, None, None, is_finite=False)
        del running
        if not is_finite:
            # fp16 overflowed: the scaler lowers its scale and skips the step; statistics and correction skip it as well.
            nll = None
            self.statistics.discard()
        else:
            nll = self.statistics.update(num_images, self._run)
        if self.clip_norm is not None and grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip_norm, grad_norm)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.model.zero_grad(set_to_none=True)
        if self.probe_images and self.statistics.layers and nll is not None:
            for layer in self.folded:  # with larger micro-batches training takes more than the probe can
                layer.in_parts = self.micro_batch_size < self.probe_images
            first = self._send_first(images, index, self.probe_images, seed, epoch)
            self.statistics.follow(self._probe, first, self._run)
        set_instance_seeds(self.dropouts, None)
        update_norm = self.into_momentum.update_norm if self.into_momentum is not None else None
        notices = () if self.graphs is None else self.graphs.take_notices()
        return StepTotals(loss_sum, correct, grad_norm, update_norm, nll, notices)

    @property
    def _run(self) -> Run:
        """What does the work beside micro-steps."""
        return at_once if self.graphs is None else self.graphs.run

    def give_up(self) -> None:
        """Forget a step that was not finite: no weight, momentum, statistic or correction has moved.

        Except a momentum that gradients gather in, which cannot be had back: the optimizer's state has to be loaded again.
        """
        self._drop()
        if self.scaler is not None:
            self.scaler.update(self.scaler.get_scale())  # it was not the scale

    def _drop(self) -> None:
        """Forget what an effective batch has gathered so far."""
        self.statistics.discard()
        self.model.zero_grad(set_to_none=True)
        set_instance_seeds(self.dropouts, None)

    def _restore_running(self, values: list[Tensor]) -> None:
        for buffer, value in zip(self.running, values, strict=True):
            buffer.copy_(value)

    def replay(self, model: nn.Module, images: ImageSet, index: Tensor, seed: int, epoch: int) -> Iterator[Tensor]:
        """Run a step's forwards again through a copy of the network; yields the sum () of each micro-batch's task losses."""
        again = copy.copy(self)
        again.model = model.train()
        again.dropouts = [m for m in model.modules() if isinstance(m, InstanceDropout)]
        for batch in again._micro_batches(images, index, seed, epoch):
            logits = again._forward(again._preprocessed(batch), batch.seeds)
            yield F.cross_entropy(logits, batch.labels, reduction="sum", label_smoothing=self.label_smoothing)

    def _is_finite(self, loss_sum: Tensor, grad_norm: Tensor | None) -> bool:
        """Whether loss and every gradient are finite, from what all processes agree on; waits for the device."""
        apart = [p.grad for p in self.statistics.natural_parameters if p.grad is not None]  # in no optimizer
        if grad_norm is None:
            apart += [p.grad for p in self.parameters if p.grad is not None]
        numbers = [loss_sum] if grad_norm is None else [loss_sum, grad_norm]
        if apart:
            numbers.append(torch.nn.utils.get_total_norm(apart, norm_type=torch.inf))
        return bool(torch.stack([number.double() for number in numbers]).isfinite().all())

    def accumulate(
        self, images: ImageSet, index: Tensor, seed: int, epoch: int, gradients_ready: Callable[[], None] = lambda: None
    ) -> tuple[Tensor, Tensor]:
        """Add the effective batch's gradient, or this process's share of it, to every parameter's; returns the sums () of
        loss and of right answers.
        """
        sums = Sums(
            torch.zeros((), device=self.device, dtype=torch.float64),
            torch.zeros((), device=self.device, dtype=torch.int64),
            torch.full((), float(len(index)), device=self.device, dtype=self._loss_dtype),
        )
        if self.scaler is not None:
            self.scaler.scale(sums.loss)  # makes its scale, which no backward does where this process has no image
        take = self.micro_step if self.graphs is None else self.graphs
        with standardize_once(self.standardized):
            with fold_once(self.folded, self._run):
                if self.graphs is not None:
                    sums = self.graphs.begin(sums)
                for num_done, batch in enumerate(self._balanced(images, index, seed, epoch)):
                    if num_done and self.into_momentum is None and self.stop_asked():
                        raise StopRequested
                    take(batch, sums)
                if self.graphs is not None:
                    sums = self.graphs.end(sums)
            gradients_ready()
        return sums.loss, sums.correct

    def _balanced(self, images: ImageSet, index: Tensor, seed: int, epoch: int) -> Iterator[MicroBatch]:
        """This process's micro-batches, part by part."""
        own = self.balanced_parts // self.world.size
        for number in range(self.world.rank * own, (self.world.rank + 1) * own):
            part = part_of(index, number, self.balanced_parts)
            self.statistics.begin_part(len(part))
            yield from self._micro_batches(images, part, seed, epoch)

    def micro_step(self, batch: MicroBatch, sums: Sums) -> None:
        """Forward and backward of one micro-batch: adds to gradients, statistics' accounts and sums."""
        logits = self._forward(self._preprocessed(batch), batch.seeds)
        losses = F.cross_entropy(logits, batch.labels, reduction="sum", label_smoothing=self.label_smoothing)
        # By a tensor: a graph must not keep the number, and CUDA divides by a tensor and by a number differently.
        mean_loss = (losses + self.statistics.nll()) / sums.num_images
        (mean_loss if self.scaler is None else self.scaler.scale(mean_loss)).backward()
        sums.loss.add_(losses.detach())
        sums.correct.add_((logits.detach().argmax(1) == batch.labels).sum())

    def gradients(self) -> list[Tensor]:
        """The gradients alive now: of parameters, and of weights that are standardised once for many micro-batches."""
        leaves = [
            *self.model.parameters(),
            *(m.shared_weight for m in self.standardized if m.shared_weight is not None),
        ]
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    def _micro_batches(self, images: ImageSet, index: Tensor, seed: int, epoch: int) -> Iterator[MicroBatch]:
        # Labels and seeds of many micro-batches in one call, but not of all: memory is flat in the effective batch.
        size = self.micro_batch_size
        image_bytes = images.images.shape[1:].numel()  # no view: it would count as a tensor of training
        most = _BLOCK_IMAGES if self.device.type == "cpu" else min(_BLOCK_IMAGES, SENT_BYTES // image_bytes)
        for block in index.split(max(1, most // size) * size):
            labels, seeds = images.labels[block].to(self.device), instance_seeds(seed, epoch, block).to(self.device)
            # To another device a block of images goes at once: each transfer costs as much as a small image's forward.
            pixels = None if self.device.type == "cpu" else self._send(images.images[block])
            for start in range(0, len(block), size):
                part = slice(start, start + size)
                mine = images.images[block[part]] if pixels is None else pixels[part]
                yield MicroBatch(mine, labels[part], seeds[part])

    def _send(self, pixels: Tensor) -> Tensor:
        """To the device; pinned, so that the host goes on meanwhile."""
        return (
            pixels.pin_memory().to(self.device, non_blocking=True)
            if self.device.type == "cuda"
            else pixels.to(self.device)
        )

    def _preprocessed(self, batch: MicroBatch) -> Tensor:
        return self.preprocess.train(batch.images, batch.seeds)

    def _send_first(self, images: ImageSet, index: Tensor, num_images: int, seed: int, epoch: int) -> MicroBatch:
        index = index[:num_images]
        return MicroBatch(
            self._send(images.images[index]),
            images.labels[index].to(self.device),
            instance_seeds(seed, epoch, index).to(self.device),
        )

    def _probe(self, *first: Tensor) -> None:
        """The forward after a step, of the first images."""
        batch = MicroBatch(*first)
        self._forward(self._preprocessed(batch), batch.seeds)

    def _forward(self, inputs: Tensor, seeds: Tensor) -> Tensor:
        set_instance_seeds(self.dropouts, seeds)
        with self.autocast():
            logits = self.model(inputs)
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
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if (
            natural and gradients
        ):  # the scaler sees the optimizer's only: one of them has to show the statistics' overflow
            gradients[0] += 0.0 * torch.nn.utils.get_total_norm(natural, norm_type=torch.inf)
        self.scaler.unscale_(self.optimizer)
        if natural:
            torch._foreach_mul_(natural, 1.0 / scale)
