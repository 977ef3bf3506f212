"""Steps recorded once as CUDA graphs and replayed.

At one small image the host launches a step's kernels more slowly than the device runs them. The same
holds for the many short vectors computed between two micro-steps of different weights. A CUDA graph launches all
kernels at once.

A graph replays addresses, so recorded work reads and writes the same memory each time. These are the images, the sums,
the gradients, the constants of folded layers, and the results of the probe's images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from bln_train.errors import first_line
from bln_train.norm.replay import T, addresses
from bln_train.train.batches import MicroBatch
from bln_train.train.micro_step import Sums
from bln_train.train.step import AccumulationStep

if TYPE_CHECKING:
    from bln_train.norm.base import LikelihoodNorm

MOST_PIXELS = 131_072
"""Of a micro-batch, or of the probe, for which launching is likely to take longer than computing: for 128 images of ResNet-20 an
H100 needs 7 ms, and launching takes 45 (recipes/RESULTS.md)."""
# Eager runs of some work before it is recorded: libraries make their handles and choose algorithms, gradients come to be.
_NUM_WARM_UPS = 2
_BEGIN, _MICRO_STEP = "begin fold", "micro-step"  # micro-steps read what the former leaves
# Work whose results are read by what is replayed after it has memory of its own. The other work leaves nothing there, and shares.
_APART = (_BEGIN, "update")
NUM_STEPS_TO_RECORD = 6
"""Equal steps after which no work is recorded any more: what the probe's forward reads is recorded two steps before it."""
_MOST_KINDS = 64  # that are counted: a kind that never comes again must not stay


class Recorder:
    """Records the work of a CUDA device, to be replayed."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, _stream(device)
        self._pools: dict[str, Any] = {}

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Work inside runs where recordings are made, which is not where all else does."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def record(self, work: Callable[[], T], memory: str) -> tuple[Callable[[], None], T]:
        """Record what `work` launches, without running it; returns what runs it, and what `work` returned.

        Args:
            memory: recordings of one name share memory; none may read what another left there.
        """
        graph = torch.cuda.CUDAGraph()
        if memory not in self._pools:
            self._pools[memory] = torch.cuda.graph_pool_handle()
        # Of this thread alone: a collective library may ask the device about something else meanwhile.
        recording = torch.cuda.graph(
            graph, pool=self._pools[memory], stream=self.stream, capture_error_mode="thread_local"
        )
        with torch.cuda.device(self.device), recording:
            result = work()
        return graph.replay, result


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # one for all recorders: libraries keep workspaces for each


class _Counts(NamedTuple):
    """What a micro-step leaves in a layer's account besides tensors."""

    num_images: int
    num_positions: int
    num_to_watch: int
    num_watched: int
    unit: Tensor | None


class _Recording(NamedTuple):
    replay: Callable[[], None]
    inputs: list[Tensor]
    """Where it reads those."""
    result: Any


class GraphedSteps:
    """Takes the work of an `AccumulationStep`, records it and replays it from then on, with equal results.

    Work runs eagerly at first. Micro-steps are recorded for each size of micro-batch, what the probe watches being a size of
    its own; what is done between them once for each kind (norm/replay.py). If recording fails, all runs eagerly from there on,
    and a notice says why.

    Memory: the recordings keep the tensors of a micro-step or, if those are more, of the probe's forward; gradients stay between
    steps.

    Args:
        accumulation: whose work it is; its network must do the same for all images of a size.
        image_size: side of an image, in pixels.
        most_pixels: of a micro-batch, or of the probe, that is recorded, None for any; larger ones are worth no memory.
        recorder: records device work; by default a CUDA graph.

    Raises:
        ValueError: standardised convolutions are not folded, whose weight is a new tensor in every step.
    """

    def __init__(
        self,
        accumulation: AccumulationStep,
        image_size: int,
        *,
        most_pixels: int | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        if accumulation.standardized:
            raise ValueError("CUDA graphs need standardised convolutions to be folded with their norms")
        self.accumulation, self.most_pixels = accumulation, most_pixels
        self.recorder = recorder or Recorder(accumulation.device)
        self.layers: list[LikelihoodNorm] = list(accumulation.statistics.layers.values())
        self._recordings: dict[tuple[Hashable, ...], _Recording] = {}
        self._num_eager: Counter[tuple[Hashable, ...]] = Counter()
        self._gradients: dict[Tensor, Tensor] = {}
        self._watched: dict[LikelihoodNorm, Tensor] = {}
        self._constants: tuple[int, ...] = ()
        self._sums: Sums | None = None
        self.image_size = image_size
        self._notices: list[str] = []
        self._is_off = False

    def is_worth(self, num_images: int) -> bool:
        """Whether so many images are small enough."""
        return self.most_pixels is None or num_images * self.image_size**2 <= self.most_pixels

    @property
    def _micro_steps_are_worth(self) -> bool:
        return self.is_worth(self.accumulation.micro_batch_size)

    @property
    def _rest_is_worth(self) -> bool:
        return self.is_worth(max(1, self.accumulation.probe_images))

    def run(
        self,
        work: Callable[..., T],
        kind: Callable[[], tuple[Hashable, ...]],
        inputs: Sequence[Tensor] = (),
        *,
        twice: bool = False,
    ) -> T:
        """What is done between micro-steps; see norm/replay.py."""
        if self._is_off:
            return work(*inputs)
        own = kind()
        is_worth = self._rest_is_worth or (own[0] == _BEGIN and self._micro_steps_are_worth)
        return self._run(work, own, inputs, twice=twice) if is_worth else work(*inputs)

    @torch.no_grad()
    def begin(self, sums: Sums) -> Sums:
        """Bring everything to the addresses that recordings know; returns the sums for this step's micro-steps."""
        if self._is_off:
            return sums
        self._place_gradients()
        watching = [layer for layer in self.layers if layer.account.num_to_watch]
        for layer in watching:
            if layer not in self._watched:
                self._watched[layer] = torch.zeros(
                    2, layer.num_features, dtype=layer.mean.dtype, device=layer.mean.device
                )
            layer.account.watched = self._watched[layer]
        if watching:
            torch._foreach_zero_([self._watched[layer] for layer in watching])
        constants = [layer.constants for layer in self.accumulation.folded if layer.constants is not None]
        self._constants = addresses([tensor for own in constants for tensor in (own.epilogue.table, own.bias, own.iw)])
        if self._sums is None:
            self._sums = sums
        else:
            for own, new in zip(self._sums, sums, strict=True):
                own.copy_(new)
        return self._sums

    def __call__(self, batch: MicroBatch, sums: Sums) -> None:
        """Take a micro-step."""
        size = len(batch.labels)
        if self._is_off or not self._micro_steps_are_worth:
            self.accumulation.micro_step(batch, sums)
            return
        watches = min(size, self.layers[0].account.num_to_watch) if self.layers else 0
        before = self._counts()

        def work(*own: Tensor) -> list[_Counts]:
            self._set_counts(before)
            self.accumulation.micro_step(MicroBatch(*own), sums)
            return [_sum(now, then, -1) for now, then in zip(self._counts(), before, strict=True)]

        gains = self._run(work, (_MICRO_STEP, size, watches, self._constants), batch)
        self._set_counts([_sum(gain, then) for then, gain in zip(before, gains, strict=True)])

    def end(self, sums: Sums) -> Sums:
        """After a step's last micro-step: the sums, in tensors that the next step does not write to."""
        if not self._is_off and (self._rest_is_worth or self._micro_steps_are_worth):
            self._gradients.update({p: p.grad for p in self.accumulation.model.parameters() if p.grad is not None})
        for layer in self.layers:
            if not layer.account.num_watched:
                layer.account.watched = None
        return Sums(*(value.clone() for value in sums))

    def take_notices(self) -> tuple[str, ...]:
        """What the user should know, once."""
        notices, self._notices = tuple(self._notices), []
        return notices

    def forget(self) -> None:
        """Drop all recordings, and with them their memory."""
        self._recordings.clear()
        self._num_eager.clear()
        self._gradients.clear()

    def _run(
        self, work: Callable[..., T], kind: tuple[Hashable, ...], inputs: Sequence[Tensor] = (), *, twice: bool = False
    ) -> T:
        if self._is_off:
            return work(*inputs)
        if kind not in self._recordings:
            if self._num_eager[kind] < (1 if twice else _NUM_WARM_UPS):
                with self.recorder.apart():
                    result = work(*inputs)
                self._note_eager(kind)
                if not twice:
                    return result
            if not self._record(work, kind, inputs):
                return work(*inputs)
        recording = self._recordings[kind]
        for own, new in zip(recording.inputs, inputs, strict=True):
            own.copy_(new)
        recording.replay()
        return cast("T", recording.result)

    def _note_eager(self, kind: tuple[Hashable, ...]) -> None:
        if len(self._num_eager) > _MOST_KINDS:
            self._num_eager.clear()
        self._num_eager[kind] += 1

    def _record(self, work: Callable[..., object], kind: tuple[Hashable, ...], inputs: Sequence[Tensor]) -> bool:
        own = [tensor.clone() for tensor in inputs]
        name = str(kind[0])
        try:
            replay, result = self.recorder.record(lambda: work(*own), name if name in _APART else "")
        except (RuntimeError, MemoryError) as error:
            self._notices.append(f"CUDA graphs are off, this network's steps cannot be recorded: {first_line(error)}")
            self._is_off = True
            self.forget()
            return False
        self._recordings[kind] = _Recording(replay, own, result)
        del self._num_eager[kind]
        return True

    def _counts(self) -> list[_Counts]:
        accounts = [layer.account for layer in self.layers]
        return [_Counts(a.num_images, a.num_positions, a.num_to_watch, a.num_watched, a.unit) for a in accounts]

    def _set_counts(self, counts: list[_Counts]) -> None:
        for layer, own in zip(self.layers, counts, strict=True):
            account = layer.account
            account.num_images, account.num_positions, account.num_to_watch, account.num_watched = own[:4]
            account.unit = own.unit
            account.nll, account.is_open = None, account.num_to_watch > 0

    def _place_gradients(self) -> None:
        """Give parameters back the gradients, now 0, that recordings add to; a momentum that they gather in must be the same."""
        theirs = {p: p.grad for p in self._gradients}
        if any(grad is not None and grad.data_ptr() != self._gradients[p].data_ptr() for p, grad in theirs.items()):
            # What was worked out before the first micro-step, in this step, is of the new ones.
            self._recordings = {kind: own for kind, own in self._recordings.items() if kind[0] == _BEGIN}
            self._num_eager.clear()
            self._gradients.clear()
            return
        missing = {p: self._gradients[p] for p, grad in theirs.items() if grad is None}
        if missing:
            torch._foreach_zero_(list(missing.values()))
        for p, grad in missing.items():
            p.grad = grad


def _sum(own: _Counts, other: _Counts, factor: int = 1) -> _Counts:
    """Numbers of one plus those of another times a factor; the rest is of the first."""
    return own._replace(
        num_images=own.num_images + factor * other.num_images,
        num_positions=own.num_positions + factor * other.num_positions,
        num_to_watch=own.num_to_watch + factor * other.num_to_watch,
        num_watched=own.num_watched + factor * other.num_watched,
    )
