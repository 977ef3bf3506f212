"""Out of memory inside a step: it is rolled back exactly, memory is freed, and it is taken again in smaller micro-batches."""

from __future__ import annotations

import contextlib
import gc
import re
import traceback
from collections.abc import Callable
from functools import partial
from operator import is_
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from bln_train.data.datasets import ImageSet
from bln_train.errors import DoesNotFitError
from bln_train.norm.dropout import set_instance_seeds
from bln_train.train.optim import MomentumAccumulatingSGD
from bln_train.train.step import AccumulationStep, StepTotals

T = TypeVar("T")

# Besides torch.OutOfMemoryError: the CPU's allocator, the driver itself, and libraries that make their handles late.
_OUT_OF_MEMORY = re.compile(r"DefaultCPUAllocator: (can't|not enough)|CUDA error: out of memory|_STATUS_ALLOC_FAILED")
_TRIED = re.compile(r"tried to allocate ([\d.]+ \w+)", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


def explain(error: BaseException) -> str:
    """What an out-of-memory error says, in a few words."""
    tried = _TRIED.search(str(error))
    return f"tried to allocate {tried[1]}" if tried else (str(error).splitlines() or [type(error).__name__])[0]


class OutOfMemory(NamedTuple):
    """Why an attempt gave nothing."""

    reason: str


def attempt(compute: Callable[[], T]) -> T | OutOfMemory:
    """What `compute` returns, or that memory ran out; then nothing holds the tensors of the attempt but what it wrote them to."""
    try:
        return compute()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = explain(error)
        _let_go(error)
    return OutOfMemory(reason)


def _let_go(error: BaseException) -> None:
    """Clear the frames that an error, and those it came of, refer to: their local variables are the tensors of the attempt."""
    each: BaseException | None = error
    while each is not None:
        traceback.clear_frames(each.__traceback__)
        each.__traceback__ = None
        each = each.__cause__ or each.__context__


def free_memory(device: torch.device) -> None:
    """Give back what nothing refers to: cycles (a graph that did not come to its backward), and what the allocator keeps."""
    # The thread's queue of a backward that failed still holds what was to come next; the following backward throws it away.
    with contextlib.suppress(RuntimeError):
        torch.ones((), requires_grad=True).backward()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Snapshot:
    """Everything that a step changes, in host memory, to be put back bit for bit into the same tensors.

    Parameters, buffers, the optimizer's state (what a step adds to it vanishes again), the loss scale, and the state of the
    random number generators. Gradients and half-gathered statistics are in no whole state: `restore` drops them. The copies are no
    tensors of training: no memory tracker sees them, and on CUDA they are pinned, so that taking them waits for nothing.

    Args:
        step: whose network, optimizer and scaler it keeps; all of them on its device.
    """

    def __init__(self, step: AccumulationStep) -> None:
        self.step = step
        # To walk the modules would take as long as the copies.
        self._parameters = list(step.model.parameters())
        self._with_buffers = [m for m in step.model.modules() if next(m.buffers(recurse=False), None) is not None]
        self._tensors: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._entries: dict[Any, dict[str, Any]] = {}
        self._unseen: list[Any] = []
        self._scaler: dict[str, Any] | None = None
        self._rng = torch.empty(0)
        self._device_rng: Tensor | None = None

    @torch.no_grad()
    def take(self) -> None:
        """Keep the state as it is now, which must be that between two steps."""
        step, cuda = self.step, self.step.device.type == "cuda"
        self._entries = {p: dict(entry) for p, entry in step.optimizer.state.items()}
        state = [v for entry in self._entries.values() for v in entry.values() if isinstance(v, Tensor)]
        buffers = [b for module in self._with_buffers for b in module.buffers(recurse=False)]
        before, self._tensors = self._tensors, [*self._parameters, *buffers, *state]
        with torch._C._DisableTorchDispatch():
            if len(before) != len(self._tensors) or not all(
                map(is_, before, self._tensors)
            ):  # the optimizer got its state, say
                self._copies = [torch.empty_like(t, device="cpu", pin_memory=cuda) for t in self._tensors]
            torch._foreach_copy_(self._copies, self._tensors, non_blocking=cuda)
            self._rng = torch.get_rng_state()
            self._device_rng = torch.cuda.get_rng_state(step.device) if cuda else None
        self._scaler = None if step.scaler is None else step.scaler.state_dict()
        self._unseen = [layer for layer in step.statistics.layers.values() if layer.second_moment is None]

    @torch.no_grad()
    def restore(self) -> None:
        """Put the state back that was taken last, wherever in a step this is called; allocates nothing."""
        step, state = self.step, self.step.optimizer.state
        if isinstance(step.optimizer, MomentumAccumulatingSGD):
            step.optimizer.give_up()
        if step.graphs is not None:
            step.graphs.forget()  # another size comes next, and theirs may be the memory that it needs
        step.model.zero_grad(set_to_none=True)
        step.statistics.discard()
        set_instance_seeds(step.dropouts, None)
        for layer in self._unseen:
            layer.first_moment = layer.second_moment = None
        for p in [p for p in state if p not in self._entries]:
            del state[p]
        for p, entry in self._entries.items():
            for key in [key for key in state[p] if key not in entry]:
                del state[p][key]
            state[p].update(entry)
        torch._foreach_copy_(self._tensors, self._copies)
        torch.set_rng_state(self._rng)
        if self._device_rng is not None:
            torch.cuda.set_rng_state(self._device_rng, step.device)
        if step.scaler is not None and self._scaler is not None:
            step.scaler.load_state_dict(self._scaler)
            step.scaler._per_optimizer_states.clear()  # that gradients were unscaled; no public way resets it alone


class RecoveringStep:
    """An AccumulationStep that survives running out of memory: the step is rolled back and taken again in halves.

    The micro-batch that fits stays. By law 2 the result is that of a run which began with it, BatchNorm's apart. Before each step
    the state is copied to the host (see Snapshot), for as long as there is something to halve.

    Args:
        step: takes the steps; its `micro_batch_size` is lowered, and its `reduced` forbids to take a step again.

    Raises:
        DoesNotFitError: memory ran out at micro-batch 1, or where the other processes would not take the step again.
    """

    def __init__(self, step: AccumulationStep) -> None:
        self.step = step
        self.snapshot = Snapshot(step)
        self._asked: int | None = None  # the micro-batch before the first halving

    @property
    def asked_micro_batch_size(self) -> int:
        """The micro-batch that was asked for, whatever is in use."""
        return self.step.micro_batch_size if self._asked is None else self._asked

    def go_on_with(self, micro_batch_size: int) -> None:
        """Use a smaller micro-batch from now on; the one asked for is remembered."""
        self._asked = self.asked_micro_batch_size
        self.step.micro_batch_size = micro_batch_size

    def __call__(
        self, images: ImageSet, index: Tensor, seed: int, epoch: int, gradients_ready: Callable[[], None] = lambda: None
    ) -> StepTotals:
        """As AccumulationStep's; what happened is in the result's `notices`."""
        step, failed = self.step, list[str]()
        take = partial(step, images, index, seed, epoch, gradients_ready)
        reason = ""
        if step.micro_batch_size > 1:
            self.snapshot.take()
        while (size := min(step.micro_batch_size, len(index))) > 1:
            step.reduced = False
            totals = attempt(take)
            if not isinstance(totals, OutOfMemory):
                return totals._replace(notices=totals.notices + self._notices(failed, reason))
            if step.reduced:
                raise DoesNotFitError(
                    f"out of memory ({totals.reason}) after the processes had added up their gradients",
                    f"Go on from the last checkpoint with --resume --set train.micro_batch_size={size // 2}.",
                )
            self.snapshot.restore()
            free_memory(step.device)
            reason = reason or totals.reason
            failed.append(str(size))
            self.go_on_with(size // 2)
        try:
            totals = take()
            return totals._replace(notices=totals.notices + self._notices(failed, reason))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise does_not_fit("micro-batch 1", explain(error)) from error

    def _notices(self, failed: list[str], reason: str) -> tuple[str, ...]:
        if not failed:
            return ()
        text = (
            f"out of memory at micro-batch {', '.join(failed)} ({reason}); the step was rolled back and goes on with micro-batch "
            f"{self.step.micro_batch_size}, the effective batch stays as it is."
        )
        if sees_micro_batches(self.step.model):
            text += (
                " BatchNorm now sees fewer images at a time, which changes the result; norm.name=batchless would not."
            )
        return (text,)


def sees_micro_batches(model: nn.Module) -> bool:
    """Whether a network in training depends on the images that happen to share a micro-batch."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def does_not_fit(what: str, reason: str, *, smaller: bool = False) -> DoesNotFitError:
    """The error of a run that out of memory ends, with what would help.

    Args:
        what: what did not fit, as in "out of memory at ...".
        smaller: whether a smaller micro-batch is left to try.
    """
    first = "--set train.micro_batch_size=1, then " if smaller else ""
    return DoesNotFitError(
        f"out of memory at {what}: {reason}",
        f"Try {first}--set train.precision=bf16 (fp16 on older cards), --set optimizer.accumulate_into=momentum (SGD), or a "
        "smaller model or image. The run's last checkpoint is as it was: if other programs held the memory, go on with --resume.",
    )
