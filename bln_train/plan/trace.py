"""The lives of all tensor storages in one training step: birth, death, and how size grows with the images.

The step runs fake: operators on large tensors allocate their results and compute nothing. So memory is never touched,
and the time depends on the number of operators alone.

An event is one operator. A storage born at event b that dies at event d is alive when the operators b, ..., d have run.
A storage that is alive before the first operator is born at event 0.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from bln_train.memory.tracker import StorageTracker, tensors_in

SMALL_BYTES = 1 << 15
_EMPTY = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}
_KEEP_STORAGE = {
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten._reshape_alias.default,
}  # views whose schema hides it
_GROUP_NORMS = {torch.ops.aten.native_group_norm.default, torch.ops.aten.native_group_norm_backward.default}
_CONVOLUTIONS = ("aten::convolution", "aten::convolution_backward")


@dataclass(frozen=True)
class Trace:
    """One step of `num_images` per micro-batch, in two micro-batches. S storages, E events after event 0."""

    num_images: int
    size: Tensor
    """(S,) int64, bytes of each storage, in order of birth."""
    born: Tensor
    """(S,) int64, event."""
    died: Tensor
    """(S,) int64, event; E for those that outlive the step."""
    num_events: int
    """E."""
    kinds: dict[str, Tensor]
    """(S,) bool for "parameter", "gradient", "optimizer" and "other", which share no storage; the rest are activations."""
    scratch: Tensor
    """(E + 1,) int64, bytes of the inputs and outputs of the convolution that an event is, 0 for other operators."""
    second_forward: int
    """The last event before the second micro-batch enters the network."""
    gradients_ready: int
    """The last event of the backward passes."""

    def growth(self, other: Trace) -> Growth | None:
        """What an image more adds, sizes being affine in images; None where the two passed in different ways.

        After the backward passes nothing depends on the micro-batch, so nothing grows there.

        Args:
            other: the same step with one image more or less, traced at least until its gradients were ready.
        """
        end, num = self.gradients_ready, int((self.born <= self.gradients_ready).sum())
        same = (
            end == other.gradients_ready
            and num == int((other.born <= end).sum())
            and torch.equal(self.born[:num], other.born[:num])
            and torch.equal(self.died[:num].clamp(max=end), other.died[:num].clamp(max=end))
        )
        if not same:
            return None
        sign = other.num_images - self.num_images

        def per_image(here: Tensor, there: Tensor, num: int) -> Tensor:
            return torch.cat((sign * (there[:num] - here[:num]), here.new_zeros(len(here) - num)))

        return Growth(per_image(self.size, other.size, num), per_image(self.scratch, other.scratch, end + 1))

    def at(self, num_images: int, growth: Growth) -> Trace:
        """The same step at another number of images."""
        more = num_images - self.num_images
        return replace(
            self,
            num_images=num_images,
            size=self.size + more * growth.size,
            scratch=self.scratch + more * growth.scratch,
        )

    def live_bytes(self, which: Tensor | None = None, *, block: int = 1) -> Tensor:
        """Bytes alive after each event, (E + 1,).

        Args:
            which: (S,) bool, the storages to count; default all.
            block: bytes of which every storage takes a whole number.
        """
        size = (self.size + block - 1) // block * block
        size = size if which is None else size * which
        change = torch.zeros(self.num_events + 2, dtype=torch.int64)
        change.index_add_(0, self.born, size)
        change.index_add_(0, self.died + 1, -size)
        return change.cumsum(0)[:-1]

    def all_but_second(self) -> Tensor:
        """The events of a step with a single micro-batch, (E + 1,) bool: in it gradients come into being while activations go."""
        event = torch.arange(self.num_events + 1)
        return (event <= self.second_forward) | (event >= self.gradients_ready)

    def second_micro_batch(self) -> Tensor:
        """The events of the second micro-batch, (E + 1,) bool: it finds all gradients there, as every further one does."""
        event = torch.arange(self.num_events + 1)
        return (event > self.second_forward) & (event <= self.gradients_ready)


@dataclass(frozen=True)
class Growth:
    """Bytes that one image more in the micro-batch adds to a trace."""

    size: Tensor
    """(S,) int64."""
    scratch: Tensor
    """(E + 1,) int64."""


class FakeTracker(StorageTracker):
    """Writes down when each storage is born and dies, and lets operators on large tensors do nothing but allocate.

    Shapes and strides of their results are those that PyTorch gives on its meta device. Small tensors, with at most `SMALL_BYTES`
    of memory behind them, are computed with, and are filled with 1 where they come from large ones. Views and shapes are real. So
    what Python decides by is finite and repeats: nothing reads memory that nobody wrote.

    Args:
        existing: tensors alive before.
    """

    def __init__(self, existing: Iterable[Tensor]) -> None:
        self.num_events = 0
        self.size: list[int] = []
        self.birth: list[int] = []
        self.death: dict[int, int] = {}
        self.scratch: dict[int, int] = {}
        self._known: dict[Any, Any] = {}
        super().__init__(existing)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_view(func) or not (_has_large(args) or (kwargs and _has_large(tuple(kwargs.values())))):
            out = func(*args, **kwargs)
            if func._schema.name in _EMPTY and out.untyped_storage().nbytes() <= SMALL_BYTES:
                _fill(out)  # a kernel that does nothing leaves it as it is, and Python may look
        else:
            out = self._allocate(func, args, kwargs)
        self.num_events += 1  # what died while the operator ran was gone when it was done
        if isinstance(out, Tensor):
            self._add(out)
        else:
            for tensor in tensors_in(out):
                self._add(tensor)
        return out

    def _allocate(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What the operator returns, without its values."""
        places = _results_written(func)
        if places is not None:
            written = tuple(args[n] if n < len(args) else kwargs[func._schema.arguments[n].name] for n in places)
            return written if len(written) > 1 else (*written, None)[0]
        is_convolution = func._schema.name in _CONVOLUTIONS
        key = (func, _signature(args), _signature(tuple(kwargs.items())))
        if key not in self._known:
            given = {**kwargs, "device": "meta"} if "device" in kwargs else kwargs
            out = func(*_on_meta(args), **_on_meta(given))
            if func in _GROUP_NORMS:
                out = _as_cpu_group_norm(func, args, out)
            elif is_convolution:
                out = tree_map_only(Tensor, functools.partial(_in_format, _convolution_format(func, args)), out)
            self._known[key] = tree_map_only(Tensor, _layout, out)
        known = self._known[key]
        out = _empty(known) if isinstance(known, _Layout) else tree_map_only(_Layout, _empty, known)
        if is_convolution:
            tensors = [x for x in tensors_in((args, out)) if x.dim() > 2]
            self.scratch[self.num_events + 1] = sum(x.numel() * x.element_size() for x in tensors)
        return out

    def _born(self, num_bytes: int) -> None:
        self.size.append(num_bytes)
        self.birth.append(self.num_events)

    def _died(self, serial: int) -> None:
        self.death[serial] = self.num_events

    def trace(self, num_images: int, kinds: dict[str, set[int]], *, second_forward: int, gradients_ready: int) -> Trace:
        """What was written down.

        Args:
            kinds: serial numbers of storages, see `births`; of several kinds the first counts.
        """
        serial, taken = torch.arange(1, len(self.size) + 1), torch.zeros(len(self.size), dtype=torch.bool)
        masks = {}
        for kind, members in kinds.items():
            masks[kind] = torch.isin(serial, torch.tensor(sorted(members), dtype=torch.int64)) & ~taken
            taken = taken | masks[kind]
        scratch = torch.zeros(self.num_events + 1, dtype=torch.int64)
        for event, num_bytes in self.scratch.items():
            scratch[event] = num_bytes
        return Trace(
            num_images,
            torch.tensor(self.size),
            torch.tensor(self.birth),
            torch.tensor([self.death.get(n, self.num_events) for n in range(1, len(self.size) + 1)]),
            self.num_events,
            masks,
            scratch,
            second_forward,
            gradients_ready,
        )


@dataclass(frozen=True)
class _Layout:
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


def _layout(tensor: Tensor) -> _Layout:
    return _Layout(tensor.shape, tensor.stride(), tensor.dtype)


def _empty(layout: _Layout) -> Tensor:
    out = torch.empty_strided(layout.shape, layout.stride, dtype=layout.dtype)
    return _fill(out) if out.untyped_storage().nbytes() <= SMALL_BYTES else out


def _fill(tensor: Tensor) -> Tensor:
    """1 is finite, and stays so as a divisor; 0 is an index."""
    return tensor.fill_(1 if tensor.is_floating_point() else 0)


def _on_meta(arguments: Any) -> Any:
    return tree_map_only(
        Tensor, lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta"), arguments
    )


def _convolution_format(func: Any, args: Any) -> torch.memory_format:
    """The memory format that the CPU's convolutions give their results, which the meta device does not know."""
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False))
    how = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
    x, weight = given["input"], given["weight"]
    backend = torch._C._select_conv_backend(
        x, weight, given.get("bias"), *(given[name] for name in how), given.get("bias_sizes")
    )
    if x.dim() == 3:
        x, weight = x.unsqueeze(2), weight.unsqueeze(2)
    found: torch.memory_format = torch._C._conv_determine_backend_memory_format(x, weight, backend)
    return found


def _as_cpu_group_norm(func: Any, args: Any, out: Any) -> Any:
    """Results of group norm or its backward as the CPU makes them: the first like the input, those of a group in float32 at least.

    The meta device gives them another memory format and, in low precision, other dtypes.
    """
    x = args[0] if func is torch.ops.aten.native_group_norm.default else args[1]
    return (
        torch.empty_like(x, device="meta"),
        *(s.float() if s is not None and s.itemsize < 4 else s for s in out[1:]),
    )


def _in_format(memory_format: torch.memory_format, tensor: Tensor) -> Tensor:
    return tensor.to(memory_format=memory_format) if tensor.dim() == 4 else tensor


def _signature(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.shape, argument.stride(), argument.dtype
    return tuple(_signature(x) for x in argument) if isinstance(argument, list | tuple) else argument


@functools.cache
def _is_view(func: Any) -> bool:
    return bool(func.is_view) or func in _KEEP_STORAGE


def _has_large(values: Any) -> bool:
    for value in values:
        if isinstance(value, Tensor):
            if value.untyped_storage().nbytes() > SMALL_BYTES:
                return True
        elif isinstance(value, list | tuple) and _has_large(value):
            return True
    return False


@functools.cache
def _results_written(func: Any) -> tuple[int, ...] | None:
    """Positions of the arguments that are an operator's results, as of in-place operators; None where results are new."""
    returns, arguments = func._schema.returns, func._schema.arguments
    if not returns:
        return ()  # it writes its arguments
    if any(r.alias_info is None for r in returns):
        return None
    sets = [frozenset(a.alias_info.before_set) if a.alias_info is not None else frozenset() for a in arguments]
    return tuple(sets.index(frozenset(r.alias_info.before_set)) for r in returns)
