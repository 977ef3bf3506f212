"""Out of memory inside a step: it is rolled back exactly, memory is freed, and it is taken again in smaller micro-batches."""

from __future__ import annotations

import contextlib
import gc
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bln_train.errors import DoesNotFitError, UsageError
from bln_train.train.batches import EffectiveBatch
from bln_train.train.rollback import Rollback
from bln_train.train.step import AccumulationStep, StepResult, nothing

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


class Attempt:
    """A block that may run out of memory. That ends it; then nothing holds its tensors except what it wrote them to.

        with Attempt() as attempt:
            result = compute()
        if attempt.reason is not None: ...

    Attributes:
        reason: what the error said, in a few words; None where memory sufficed.
    """

    def __init__(self) -> None:
        self.reason: str | None = None

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if error is None or not is_out_of_memory(error):
            return False
        self.reason = explain(error)
        _let_go(error)
        return True


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
    random number generators. Gradients and half-gathered statistics are in no whole state: `restore` drops them.

    Args:
        accumulation: whose network, optimizer and loss scale it keeps; all of them on its device.
    """

    def __init__(self, accumulation: AccumulationStep) -> None:
        self.accumulation = accumulation
        # To walk the modules would take as long as the copies.
        model = accumulation.model
        self._parameters = list(model.parameters())
        self._with_buffers = [m for m in model.modules() if next(m.buffers(recurse=False), None) is not None]
        self._rollback = Rollback(accumulation.device)
        self._entries: dict[Any, dict[str, Any]] = {}
        self._unseen: list[Any] = []
        self._loss_scale: dict[str, Any] = {}

    def take(self) -> None:
        """Keep the state as it is now, which must be that between two steps."""
        accumulation = self.accumulation
        self._entries = {p: dict(entry) for p, entry in accumulation.optimizer.state.items()}
        state = [v for entry in self._entries.values() for v in entry.values() if isinstance(v, Tensor)]
        buffers = [b for module in self._with_buffers for b in module.buffers(recurse=False)]
        self._rollback.take([*self._parameters, *buffers, *state])
        self._loss_scale = accumulation.loss_scale.state_dict()
        self._unseen = [layer for layer in accumulation.statistics.layers.values() if layer.second_moment is None]

    def restore(self) -> None:
        """Put back the state that was taken last, wherever in a step this is called; allocates nothing."""
        accumulation, state = self.accumulation, self.accumulation.optimizer.state
        if accumulation.into_momentum is not None:
            accumulation.into_momentum.give_up()
        if accumulation.graphs is not None:
            accumulation.graphs.forget()  # another size comes next, and theirs may be the memory that it needs
        accumulation.drop()
        for layer in self._unseen:
            layer.first_moment = layer.second_moment = None
        for p in [p for p in state if p not in self._entries]:
            del state[p]
        for p, entry in self._entries.items():
            for key in [key for key in state[p] if key not in entry]:
                del state[p][key]
            state[p].update(entry)
        self._rollback.restore()
        accumulation.loss_scale.restore(self._loss_scale)


class RecoveringStep:
    """An AccumulationStep that survives running out of memory: the step is rolled back and taken again in halves.

    The micro-batch that fits stays. By law 2 the result is that of a run which began with it, BatchNorm's apart. Before each step
    the state is copied to the host (see Snapshot), for as long as there is something to halve.

    Args:
        accumulation: takes the steps; its `micro_batch_size` is lowered, and its `reduced` forbids to take a step again.

    Raises:
        DoesNotFitError: memory ran out at micro-batch 1, or where the other processes would not take the step again.
    """

    def __init__(self, accumulation: AccumulationStep) -> None:
        self.accumulation = accumulation
        self.snapshot = Snapshot(accumulation)
        self._asked: int | None = None  # the micro-batch before the first halving

    @property
    def asked_micro_batch_size(self) -> int:
        """The micro-batch that was asked for, whatever is in use."""
        return self.accumulation.micro_batch_size if self._asked is None else self._asked

    def go_on_with(self, micro_batch_size: int) -> None:
        """Use a smaller micro-batch from now on; the one asked for is remembered."""
        self._asked = self.asked_micro_batch_size
        self.accumulation.micro_batch_size = micro_batch_size

    def __call__(self, batch: EffectiveBatch, gradients_ready: Callable[[], None] = nothing) -> StepResult:
        """As AccumulationStep's; what happened is in the result's `notices`."""
        accumulation, failed = self.accumulation, list[str]()
        reason = ""
        if accumulation.micro_batch_size > 1:
            self.snapshot.take()
        while (size := min(accumulation.micro_batch_size, len(batch))) > 1:
            accumulation.reduced = False
            with Attempt() as attempt:
                result = accumulation(batch, gradients_ready)
                return result._replace(notices=result.notices + self._notices(failed, reason))
            if accumulation.reduced:
                raise DoesNotFitError(
                    f"out of memory ({attempt.reason}) after the processes had added up their gradients",
                    f"Go on from the last checkpoint with --resume --set train.micro_batch_size={size // 2}.",
                )
            self.snapshot.restore()
            free_memory(accumulation.device)
            reason = reason or str(attempt.reason)
            failed.append(str(size))
            self.go_on_with(size // 2)
        with explained_failures(1):
            result = accumulation(batch, gradients_ready)
        return result._replace(notices=result.notices + self._notices(failed, reason))

    def _notices(self, failed: list[str], reason: str) -> tuple[str, ...]:
        if not failed:
            return ()
        text = (
            f"out of memory at micro-batch {', '.join(failed)} ({reason}); the step was rolled back and goes on with micro-batch "
            f"{self.accumulation.micro_batch_size}, the effective batch stays as it is."
        )
        if sees_micro_batches(self.accumulation.model):
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


@contextmanager
def explained_failures(micro_batch_size: int) -> Iterator[None]:
    """Turn what PyTorch raises while training into errors that say what to do.

    Raises:
        DoesNotFitError: memory ran out.
        UsageError: BatchNorm had to train on one value per channel.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise does_not_fit(f"micro-batch {micro_batch_size}", explain(error), smaller=micro_batch_size != 1) from error
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UsageError(
            "BatchNorm cannot train on one value per channel: one image, alone or left over, in a layer with one position",
            "Use norm.name=batchless, or a larger train.micro_batch_size that leaves no single image over.",
        ) from error
