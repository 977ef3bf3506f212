"""Several processes that share each effective batch: PyTorch's process group behind one operation, a sum.

A process takes a contiguous share of every batch. No random numbers are exchanged, since each draw is a function of
(seed, epoch, image). An optimizer step gets everything it needs from the other processes at once, in one flat buffer
(`reduce_step`). Every process computes the rest for itself, from equal numbers to equal numbers.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import reduce
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bln_train.errors import ProcessError, UsageError
from bln_train.norm.statistics import BatchlessStatistics
from bln_train.system.launch import Launch, launch

Sliceable = TypeVar("Sliceable", Tensor, range)

# Larger gradients go in pieces, so that the buffer's memory is bounded; a network of up to 4 million fp32 weights goes in one.
PIECE_BYTES = 16 * 2**20
_DIGIT = 4096  # a count as two digits: each digit's sum is exact in fp32, and so is a count below 2^36


class World:
    """The processes of a run; one alone sends nothing and pays nothing.

    Args:
        rank, size: which process this is, of how many.
        device: where the buffer lives: with nccl it has to be the GPU.
        stop_asked: whether this process was asked to stop, see `should_stop`.

    Attributes:
        num_collectives, num_bytes: sent so far; bytes are those of the buffers, not of the copies that a ring passes on.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | str = "cpu") -> None:
        self.rank, self.size, self.device = rank, size, torch.device(device)
        self.stop_asked: Callable[[], bool] = lambda: False
        self.stop_agreed = False
        self.num_collectives = self.num_bytes = 0

    @property
    def should_stop(self) -> bool:
        """Whether any process was asked to stop before the last step's sum: all see it after the same step."""
        return self.stop_asked() if self.size == 1 else self.stop_agreed

    def begin_of_share(self, num: int) -> int:
        """Where this process's share of `num` items begins."""
        return _begin_of_part(num, self.rank, self.size)

    def share(self, items: Sliceable) -> Sliceable:
        """This process's share; it may be empty, that of rank 0 only where there are no items."""
        return part_of(items, self.rank, self.size)

    @torch.no_grad()
    def all_reduce_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in place, in one collective for each PIECE_BYTES.

        Args:
            tensors: of the same shapes in every process, on any device; the buffer has the widest of their types.

        Raises:
            ProcessError: another process ended, or did not answer in time.
        """
        if self.size == 1:
            return
        tensors = [t for t in tensors if t.numel()]
        dtype = reduce(torch.promote_types, (t.dtype for t in tensors))
        for parts in _pieces(tensors, PIECE_BYTES // dtype.itemsize):
            buffer = torch.empty(sum(part.numel() for part in parts), dtype=dtype, device=self.device)
            places = [
                place.view(part.shape)
                for place, part in zip(buffer.split([p.numel() for p in parts]), parts, strict=True)
            ]
            torch._foreach_copy_(places, parts)
            self._all_reduce(buffer)
            torch._foreach_copy_(parts, places)
            del buffer, places  # or it would be alive beside the next one

    def _all_reduce(self, buffer: Tensor) -> None:
        try:
            dist.all_reduce(buffer)
        except RuntimeError as error:
            reason = str(error).splitlines()[0].split(". This is")[0]  # gloo goes on with advice of its own
            late = "timed out" in reason.lower() or "timeout" in reason.lower()
            raise ProcessError(
                f"process {self.rank} of {self.size}: another process "
                + (f"did not answer in time ({reason})" if late else f"has ended ({reason})"),
                "Its own message says why. Go on from the last checkpoint with --resume, with any number of processes."
                + (" A slow one may need a larger runtime.process_timeout_seconds." if late else ""),
            ) from error
        self.num_collectives += 1
        self.num_bytes += buffer.nbytes

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by that of rank 0, exactly."""
        tensors = list(tensors) if self.size > 1 else []
        if self.rank:
            for tensor in tensors:
                tensor.detach().zero_()
        if tensors:
            self.all_reduce_(tensors)

    def barrier(self) -> None:
        """Go on when every process has come here."""
        self.all_reduce_([torch.zeros(1, device=self.device)])

    @contextmanager
    def first_rank_first(self) -> Iterator[None]:
        """Run the block in rank 0, then in the others: what it downloads is there for them."""
        if self.rank:
            self.barrier()
        yield
        if not self.rank:
            self.barrier()

    def check_equal(self, what: Mapping[str, int]) -> None:
        """Compare numbers of at most 52 bits over all processes.

        Raises:
            UsageError: naming those that differ, and where.
        """
        if self.size == 1:
            return
        table = torch.zeros(self.size, len(what), dtype=torch.float64)
        table[self.rank] = torch.tensor([float(value) for value in what.values()], dtype=torch.float64)
        self.all_reduce_([table])
        for name, column in zip(what, table.unbind(1), strict=True):
            other = (column != column[0]).nonzero().flatten().tolist()
            if other:
                raise UsageError(
                    f"processes {', '.join(map(str, other))} have other {name} than process 0",
                    "Give every machine the same recipe, data and run folder.",
                )


ALONE = World()


def part_of(items: Sliceable, number: int, count: int) -> Sliceable:
    """Part `number` of `count` contiguous ones, of equal lengths but for one; those of a multiple of `count` divide these."""
    return items[_begin_of_part(len(items), number, count) : _begin_of_part(len(items), number + 1, count)]


def _begin_of_part(num: int, number: int, count: int) -> int:
    return -(-num * number // count)


def _pieces(tensors: Iterable[Tensor], num_elements: int) -> Iterator[list[Tensor]]:
    """Views that cover the tensors, in lists of at most `num_elements`; a row that is longer has a list of its own."""
    parts: list[Tensor] = []
    room = num_elements
    for tensor in tensors:
        whole = tensor.detach().reshape(1) if tensor.dim() == 0 else tensor.detach()
        for part in whole.split(max(1, num_elements // whole[0].numel())):
            if parts and part.numel() > room:
                yield parts
                parts, room = [], num_elements
            parts.append(part)
            room -= part.numel()
    if parts:
        yield parts


@torch.no_grad()
def reduce_step(
    world: World, parameters: Sequence[Tensor], statistics: BatchlessStatistics, sums: Sequence[Tensor]
) -> None:
    """Give every process what all of them found for an effective batch, as if it had seen all of its images itself.

    One flat buffer holds the gradients, the counts and the probe's sums of the batchless layers, `sums`, and whether anyone was
    asked to stop. The layers' statistics ride along, rank 0's for all: those that followed the weights on the probe were
    computed in every process, and on a GPU their last bits may differ. Counts are read on the host: with several processes a
    step waits once before the optimizer.

    Args:
        parameters: those whose gradients count; one without a gradient here, for want of an image or of any use, may have one.
        sums: (), of any type; carried in the parameters'.

    Raises:
        ProcessError: another process ended, or did not answer in time.
    """
    if world.size == 1:
        return
    layers = list(statistics.layers.values())
    counts = [int(p.grad is not None) for p in parameters] + statistics.counts() + [int(world.stop_asked())]
    digits = torch.tensor([divmod(count, _DIGIT) for count in counts], dtype=parameters[0].dtype, device=world.device)
    carried = torch.stack([s.to(parameters[0].dtype) for s in sums])
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    followed = [tensor for layer in layers for tensor in (layer.mean, layer.raw_std)]
    firsts = [torch.zeros_like(tensor) if world.rank else tensor.detach().clone() for tensor in followed]
    gradients = [p.grad for p in parameters if p.grad is not None]
    world.all_reduce_([*gradients, *statistics.probe_sums(), *firsts, digits, carried])

    *found, stop = (int(high) * _DIGIT + int(low) for high, low in digits.tolist())
    for p, number in zip(parameters, found, strict=False):
        if not number:
            p.grad = None
    statistics.set_counts(found[len(parameters) :])
    for tensor, first in zip(followed, firsts, strict=True):
        tensor.copy_(first)
    world.stop_agreed = stop > 0
    for own, total in zip(sums, carried.unbind(0), strict=True):
        own.copy_(total)


@contextmanager
def joined(device: torch.device, timeout_seconds: int) -> Iterator[World]:
    """The processes that torchrun started, as a world; alone, without it.

    Args:
        device: this process's; chooses nccl or gloo.
        timeout_seconds: how long to wait for another process before giving up.

    Raises:
        ProcessError: the others cannot be reached.
    """
    own: Launch = launch()
    if own.size == 1:
        yield World()
        return
    cuda = device.type == "cuda"
    # Its functions have the process group as a default value: imported later (torch.optim does), it would keep the group and
    # its threads alive after `destroy_process_group`, and a thread that frees a tensor while Python ends aborts the process.
    importlib.import_module("torch.distributed.nn.functional")
    try:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout_seconds))
    except (RuntimeError, ValueError) as error:
        raise ProcessError(
            f"process {own.rank} of {own.size} cannot reach the others: {str(error).splitlines()[0]}"
        ) from error
    try:
        yield World(own.rank, own.size, device)
    except BaseException:
        if not cuda:  # nccl's would wait for the others
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def fingerprint(tensors: Iterable[Tensor]) -> int:
    """CRC-32 of CPU tensors, for `World.check_equal`."""
    value = 0
    for tensor in tensors:
        value = zlib.crc32(tensor.contiguous().numpy().data, value)
    return value
