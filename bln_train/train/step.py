"""One optimizer step: the gradient of an effective batch, gathered in micro-batches of any size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bln_train.data.augment import Preprocess
from bln_train.norm.dropout import InstanceDropout, set_instance_seeds
from bln_train.norm.fused.layer import fold_once
from bln_train.norm.fused.network import folded_layers
from bln_train.norm.replay import Run, at_once
from bln_train.norm.standardize import StandardizedConv2d, centre_filters, standardize_once
from bln_train.norm.statistics import BatchlessStatistics
from bln_train.system.signals import StopRequested, never
from bln_train.train.batches import EffectiveBatch, MicroBatch
from bln_train.train.distributed import ALONE, World, reduce_step
from bln_train.train.loss_scale import LossScale
from bln_train.train.micro_step import Graphs, Sums
from bln_train.train.optim import MomentumAccumulatingSGD
from bln_train.train.rollback import Rollback


class StepSettings(NamedTuple):
    """The numbers of a step that a recipe states."""

    micro_batch_size: int
    """Images in memory at once."""
    probe_images: int = 0
    """First images of the effective batch on which statistics follow the weights; 0 for none."""
    correction_parts: int = 0
    """Contiguous parts of the effective batch, each with a correction balanced by itself (kernels/feedback.py): a multiple of the
    number of processes; 0 for that number."""
    label_smoothing: float = 0.0
    """See torch.nn.functional.cross_entropy."""
    clip_norm: float | None = None
    """Bound on the global gradient norm, None for none."""


class StepResult(NamedTuple):
    """Sums over an effective batch, still on the device."""

    loss: Tensor
    """() sum of the task loss over the images."""
    correct: Tensor
    """() number of images classified correctly."""
    grad_norm: Tensor | None = None
    """() global norm of the mean gradient before clipping; None where gradients gather in the momentum."""
    update_norm: Tensor | None = None
    """() global norm of the momentum before clipping where gradients gather there, else None."""
    nll: Tensor | None = None
    """(L,) likelihood of each batchless layer; None without such layers."""
    notices: tuple[str, ...] = ()
    """Messages to the user about how this step was taken."""
    is_finite: bool = True
    """Whether the step was taken; if not, only its gradients are there, until `give_up`."""


def nothing() -> None:
    """Do nothing: nobody asked to be called."""


class AccumulationStep:
    """Gradient accumulation whose result is the same for every split of the effective batch.

        gradient = 1/N * sum over micro-batches of d/dw [ sum of task losses + sum of likelihoods ]

    The sums are divided by the true number of images N, so ragged micro-batches and a short last batch count correctly. With a
    correction (kernels/feedback.py) d/dw approximates BatchNorm's gradient, and depends on the order of the images.

    Args:
        model, optimizer, statistics: the network, its optimizer, its batchless layers.
        preprocess: makes a network's input of uint8 images.
        settings: see `StepSettings`; the micro-batch size may change between steps.
        device: where the network is.
        autocast: makes the context of each forward.
        loss_scale: for fp16; default none.
        world: the processes that share each effective batch; all take every step together.

    Attributes:
        reduced: True once gradients were all-reduced. After that a rank cannot retry the step on its own (train/recovery.py).
        graphs: takes micro-steps in the place of `micro_step`, with the same result.
        stop_asked: asked between micro-steps; at yes the step is undone and raises StopRequested. A step whose gradients gather
            in the momentum is finished instead: to undo it would take the memory that this saves.

    Raises:
        ValueError: clip_norm or a loss scale with an optimizer that gathers gradients in its momentum.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        statistics: BatchlessStatistics,
        preprocess: Preprocess,
        settings: StepSettings,
        *,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[object]],
        loss_scale: LossScale | None = None,
        world: World = ALONE,
    ) -> None:
        self.model, self.optimizer, self.statistics, self.preprocess = model, optimizer, statistics, preprocess
        self.micro_batch_size, self.probe_images = settings.micro_batch_size, settings.probe_images
        self.correction_parts = settings.correction_parts or world.size
        self.label_smoothing, self.clip_norm = settings.label_smoothing, settings.clip_norm
        self.device, self.autocast, self.world = device, autocast, world
        self.loss_scale = loss_scale or LossScale(device.type, enabled=False)
        self.into_momentum = optimizer if isinstance(optimizer, MomentumAccumulatingSGD) else None
        if self.into_momentum is not None and (self.clip_norm is not None or self.loss_scale.is_enabled()):
            raise ValueError("gradients that gather in the momentum can be neither clipped nor loss-scaled")
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._loss_dtype = torch.float64 if any(p.dtype == torch.float64 for p in model.parameters()) else torch.float32
        self.folded = folded_layers(model)
        inside = {layer.linear for layer in self.folded}
        self.standardized = [m for m in model.modules() if isinstance(m, StandardizedConv2d) and m not in inside]
        self.dropouts = [m for m in model.modules() if isinstance(m, InstanceDropout)]
        batchnorms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        self._running = [buffer for m in batchnorms for buffer in m.buffers()]  # what a forward alone changes
        self._rollback = Rollback(device)
        self.reduced = False
        self.stop_asked: Callable[[], bool] = never
        self.graphs: Graphs | None = None

    def __call__(self, batch: EffectiveBatch, gradients_ready: Callable[[], None] = nothing) -> StepResult:
        """Take one step.

        Where loss or gradient is not finite, nothing follows the sums; see `give_up`. Gradients that overflow in fp16 are
        another matter: the loss scale is lowered, and weights, statistics and correction skip the step.

        Args:
            gradients_ready: called once all gradients are there, before they are reduced.
        """
        self.model.train()
        self._rollback.take(self._running)
        self._begin(len(batch))
        try:
            sums = self.accumulate(batch, gradients_ready)  # micro-batches: forward, backward
        except StopRequested:  # all is as it was, except that filters were centred
            self._rollback.restore()
            self.drop()
            raise
        self.reduced = self.world.size > 1
        reduce_step(self.world, self._all_parameters(), self.statistics, (sums.loss, sums.correct))
        self.loss_scale.unscale(self.optimizer, self._natural_gradients())
        grad_norm = self._grad_norm()
        is_finite = self._is_finite(sums.loss, grad_norm)
        if not is_finite and not self._has_overflowed(sums.loss):
            self._rollback.restore()
            return StepResult(sums.loss, sums.correct, grad_norm, is_finite=False)
        nll = None
        if is_finite:
            nll = self.statistics.update(len(batch), self._run)  # mean and std: a natural-gradient step
        else:
            self.statistics.discard()
        if self.clip_norm is not None and grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip_norm, grad_norm)
        self.loss_scale.step(self.optimizer)
        self.loss_scale.update()
        self.model.zero_grad(set_to_none=True)
        if nll is not None:
            self._follow_weights(batch)  # mean and std follow the new weights, on the probe
        set_instance_seeds(self.dropouts, None)
        update_norm = None if self.into_momentum is None else self.into_momentum.update_norm
        notices = () if self.graphs is None else self.graphs.take_notices()
        return StepResult(sums.loss, sums.correct, grad_norm, update_norm, nll, notices)

    def accumulate(self, batch: EffectiveBatch, gradients_ready: Callable[[], None] = nothing) -> Sums:
        """Add the gradient of the effective batch, or of this process's share of it, to every parameter's.

        Raises:
            StopRequested: `stop_asked` said yes between two micro-steps.
        """
        sums = Sums(
            torch.zeros((), device=self.device, dtype=torch.float64),
            torch.zeros((), device=self.device, dtype=torch.int64),
            torch.full((), float(len(batch)), device=self.device, dtype=self._loss_dtype),
        )
        self.loss_scale.scale(sums.loss)  # makes the scale, which no backward does where this process has no image
        take = self.micro_step if self.graphs is None else self.graphs
        with standardize_once(self.standardized):
            with fold_once(self.folded, self._run):
                if self.graphs is not None:
                    sums = self.graphs.begin(sums)
                for num_done, micro_batch in enumerate(self._share_of(batch)):
                    if num_done and self.into_momentum is None and self.stop_asked():
                        raise StopRequested
                    take(micro_batch, sums)
                if self.graphs is not None:
                    sums = self.graphs.end(sums)
            gradients_ready()
        return sums

    def micro_step(self, batch: MicroBatch, sums: Sums) -> None:
        """Forward and backward of one micro-batch: adds to gradients, to what the layers saw, and to `sums`."""
        logits = self.forward(batch)
        losses = self.task_loss(logits, batch.labels)
        # By a tensor: a graph must not keep the number, and CUDA divides by a tensor and by a number differently.
        mean_loss = (losses + self.statistics.nll()) / sums.num_images
        self.loss_scale.scale(mean_loss).backward()
        sums.loss.add_(losses.detach())
        sums.correct.add_((logits.detach().argmax(1) == batch.labels).sum())

    def forward(self, batch: MicroBatch) -> Tensor:
        """The logits (n, num_classes), in float32 at least, of images changed by their own random draws."""
        inputs = self.preprocess.train(batch.images, batch.seeds)
        set_instance_seeds(self.dropouts, batch.seeds)
        with self.autocast():
            logits = self.model(inputs)
        return logits if logits.dtype == torch.float64 else logits.float()

    def task_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """() sum of the images' cross-entropies, in nats."""
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.label_smoothing)

    def micro_batches(self, part: EffectiveBatch) -> Iterator[MicroBatch]:
        """The micro-batches of one part."""
        return part.micro_batches(self.micro_batch_size, self.device)

    def gradients(self) -> list[Tensor]:
        """The gradients alive now: of parameters, and of weights that are standardised once for many micro-batches."""
        leaves = [
            *self.model.parameters(),
            *(m.shared_weight for m in self.standardized if m.shared_weight is not None),
        ]
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    def drop(self) -> None:
        """Forget the gradients and all else that an effective batch has gathered so far."""
        self.statistics.discard()
        self.model.zero_grad(set_to_none=True)
        set_instance_seeds(self.dropouts, None)

    def give_up(self) -> None:
        """Forget a step that was not finite: no weight, momentum, statistic or correction has moved.

        A momentum that gradients gather in is the exception; the optimizer's state has to be loaded again.
        """
        self.drop()
        self.loss_scale.keep()  # it was not the scale

    def _begin(self, num_images: int) -> None:
        if self.into_momentum is not None:
            for layer in self.folded:  # `accumulate` does it too, but the weight decay has to see the same weights
                if isinstance(layer.linear, StandardizedConv2d) and layer.linear.weight.requires_grad:
                    centre_filters(layer.linear.weight)
            # From here on the weights' gradients are their momentum, which enters the sum over the processes once.
            self.into_momentum.begin(from_zero=self.world.rank > 0)
        self.statistics.begin(None, max(0, self.probe_images - self.world.begin_of_share(num_images)))

    def _share_of(self, batch: EffectiveBatch) -> Iterator[MicroBatch]:
        """This process's micro-batches, part by part."""
        own = self.correction_parts // self.world.size
        for number in range(self.world.rank * own, (self.world.rank + 1) * own):
            part = batch.part(number, self.correction_parts)
            self.statistics.begin_part(len(part))
            yield from self.micro_batches(part)

    def _follow_weights(self, batch: EffectiveBatch) -> None:
        """Let the statistics follow the step that was taken, by a forward of the batch's first images."""
        if not self.probe_images:
            return
        for layer in self.folded:  # with larger micro-batches training takes more memory than the probe can
            layer.in_parts = self.micro_batch_size < self.probe_images
        self.statistics.follow(self._probe, batch.first(self.probe_images, self.device), self._run)

    def _probe(self, *first: Tensor) -> None:
        self.forward(MicroBatch(*first))

    @property
    def _run(self) -> Run:
        """What does the work beside micro-steps."""
        return at_once if self.graphs is None else self.graphs.run

    def _all_parameters(self) -> list[Tensor]:
        return [*self.parameters, *self.statistics.natural_parameters]

    def _natural_gradients(self) -> list[Tensor]:
        """Gradients of means and standard deviations that are in no optimizer."""
        return [p.grad for p in self.statistics.natural_parameters if p.grad is not None]

    def _grad_norm(self) -> Tensor | None:
        """() global norm of the optimizer's gradients; None where a momentum is in them."""
        if self.into_momentum is not None:
            return None
        return torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])

    def _is_finite(self, loss: Tensor, grad_norm: Tensor | None) -> bool:
        """Whether loss and every gradient are finite, from what all processes agree on; waits for the device."""
        rest = self._natural_gradients()
        if grad_norm is None:
            rest += [p.grad for p in self.parameters if p.grad is not None]
        numbers = [loss] if grad_norm is None else [loss, grad_norm]
        if rest:
            numbers.append(torch.nn.utils.get_total_norm(rest, norm_type=torch.inf))
        return bool(torch.stack([number.double() for number in numbers]).isfinite().all())

    def _has_overflowed(self, loss: Tensor) -> bool:
        """Whether gradients that are not finite may be the loss scale's fault."""
        return self.loss_scale.is_enabled() and bool(loss.isfinite())
