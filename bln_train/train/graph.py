"""Micro-steps captured once and replayed.

At one small image the host takes longer to launch a step's kernels than the device to run them. A CUDA graph launches all of them
at once. It replays addresses, so everything that a micro-step reads or writes stays where it was captured: the images, the sums,
the gradients, the folded layers' constants and what the probe's images leave.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from bln_train.errors import first_line
from bln_train.norm.fused_function import Constants
from bln_train.train.step import AccumulationStep, MicroBatch, Sums

if TYPE_CHECKING:
    from bln_train.norm.batchless import _BatchlessNorm

MOST_PIXELS = 65_536
"""Of a micro-batch for which launching is likely to take longer than computing; a guess, not measured."""
# Eager micro-steps before a recording: libraries make their handles and choose algorithms, gradients come to be.
_NUM_WARM_UPS = 2


class Recorder:
    """Records the work of a CUDA device, to be replayed; all recordings share memory, as they never run at once."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Work inside runs where recordings are made, which is not where all else does."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what `work` launches, without running it; returns what runs it."""
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: a collective library may ask the device about something else meanwhile.
        recording = torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local")
        with torch.cuda.device(self.device), recording:
            work()
        return graph.replay


class _Counts(NamedTuple):
    """What a micro-step leaves in a layer's account besides tensors, which no replay repeats."""

    num_images: int
    num_positions: int
    num_to_watch: int
    num_watched: int
    unit: Tensor | None
    shows_relu: bool


class _Graph(NamedTuple):
    replay: Callable[[], None]
    batch: MicroBatch
    """Where the recording reads its images."""
    gains: list[_Counts]
    """What each layer's account gains by it."""


class GraphedMicroStep:
    """`AccumulationStep.micro_step`, recorded once for each size of micro-batch and replayed from then on, with equal results.

    The first micro-steps of a size run eagerly. What the probe watches is a size of its own. If recording fails, micro-steps run
    eagerly from there on, and a notice says why.

    Memory: the recordings keep one micro-step's tensors for themselves; gradients stay between steps.

    Args:
        step: whose micro-steps are recorded; its network must do the same for all images of a size.
        most_pixels: of a micro-batch that is recorded, None for any; larger ones are worth no memory.
        recorder: records device work; by default a CUDA graph.

    Raises:
        ValueError: standardised convolutions are not folded, whose weight is a new tensor in every step.
    """

    def __init__(
        self, step: AccumulationStep, *, most_pixels: int | None = None, recorder: Recorder | None = None
    ) -> None:
        if step.standardized:
            raise ValueError("CUDA graphs need standardised convolutions to be folded with their norms")
        self.step, self.most_pixels, self.recorder = step, most_pixels, recorder or Recorder(step.device)
        self.layers: list[_BatchlessNorm] = list(step.statistics.layers.values())
        self._graphs: dict[object, _Graph] = {}
        self._num_eager: Counter[object] = Counter()
        self._gradients: dict[Tensor, Tensor] = {}
        self._constants: list[Constants] = []
        self._watched: dict[_BatchlessNorm, Tensor] = {}
        self._sums: Sums | None = None
        self._notices: list[str] = []
        self._is_off = False

    def is_worth(self, size: int, height: int, width: int) -> bool:
        """Whether micro-batches of so many images are small enough."""
        return self.most_pixels is None or size * height * width <= self.most_pixels

    @torch.no_grad()
    def begin(self, sums: Sums) -> Sums:
        """Bring everything to the addresses that recordings know; returns the sums for this step's micro-steps."""
        if self._is_off:
            return sums
        self._place_gradients()
        self._place_constants()
        for layer in self.layers:
            if layer.account.num_to_watch:
                if layer not in self._watched:
                    self._watched[layer] = torch.zeros(
                        4, layer.num_features, dtype=layer.mean.dtype, device=layer.mean.device
                    )
                layer.account.watched = self._watched[layer].zero_()
        if self._sums is None:
            self._sums = sums
        else:
            for own, new in zip(self._sums, sums, strict=True):
                own.copy_(new)
        return self._sums

    def __call__(self, batch: MicroBatch, sums: Sums) -> None:
        """Take a micro-step: by replay if one of its kind is recorded."""
        size = len(batch.labels)
        watches = min(size, self.layers[0].account.num_to_watch) if self.layers else 0
        kind = (batch.images.shape, watches)
        graph = self._graphs.get(kind)
        if graph is not None:
            self._replay(graph, batch)
        elif self._is_off or not self.is_worth(size, *batch.images.shape[2:]):
            self.step.micro_step(batch, sums)
        elif self._num_eager[kind] < _NUM_WARM_UPS:
            self._num_eager[kind] += 1
            with self.recorder.apart():
                self.step.micro_step(batch, sums)
            parameters = self.step.model.parameters()
            self._gradients.update({p: p.grad for p in parameters if p.grad is not None})
        else:
            self._record(kind, batch, sums)

    def end(self, sums: Sums) -> Sums:
        """After a step's last micro-step: the sums, in tensors that the next step does not write to."""
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
        self._graphs.clear()
        self._gradients.clear()
        self._num_eager.clear()

    def _replay(self, graph: _Graph, batch: MicroBatch) -> None:
        for own, new in zip(graph.batch, batch, strict=True):
            own.copy_(new)
        graph.replay()
        for layer, gain in zip(self.layers, graph.gains, strict=True):
            account = layer.account
            account.num_images += gain.num_images
            account.num_positions += gain.num_positions
            account.num_to_watch += gain.num_to_watch
            account.num_watched += gain.num_watched
            account.is_open = account.num_to_watch > 0
            if gain.num_watched:
                account.unit, account.shows_relu = gain.unit, gain.shows_relu

    def _record(self, kind: object, batch: MicroBatch, sums: Sums) -> None:
        own, before = MicroBatch(*(value.clone() for value in batch)), self._counts()
        try:
            replay = self.recorder.record(lambda: self.step.micro_step(own, sums))
        except (RuntimeError, MemoryError) as error:
            self._notices.append(f"CUDA graphs are off, this network's steps cannot be recorded: {first_line(error)}")
            self._is_off = True
            self.forget()
            self._set_counts(before)
            self.step.micro_step(batch, sums)
            return
        gains = [
            _Counts(
                now.num_images - then.num_images,
                now.num_positions - then.num_positions,
                now.num_to_watch - then.num_to_watch,
                now.num_watched - then.num_watched,
                now.unit,
                now.shows_relu,
            )
            for now, then in zip(self._counts(), before, strict=True)
        ]
        self._graphs[kind] = _Graph(replay, own, gains)
        replay()

    def _counts(self) -> list[_Counts]:
        accounts = [layer.account for layer in self.layers]
        return [
            _Counts(a.num_images, a.num_positions, a.num_to_watch, a.num_watched, a.unit, a.shows_relu)
            for a in accounts
        ]

    def _set_counts(self, counts: list[_Counts]) -> None:
        for layer, own in zip(self.layers, counts, strict=True):
            account = layer.account
            account.num_images, account.num_positions, account.num_to_watch, account.num_watched = own[:4]
            account.unit, account.shows_relu = own.unit, own.shows_relu
            account.nll, account.is_open = None, account.num_to_watch > 0

    def _place_gradients(self) -> None:
        """Give parameters back the gradients, now 0, that recordings add to; a momentum that they gather in must be the same."""
        theirs = {p: p.grad for p in self._gradients}
        if any(grad is not None and grad.data_ptr() != self._gradients[p].data_ptr() for p, grad in theirs.items()):
            self.forget()
            return
        missing = {p: self._gradients[p] for p, grad in theirs.items() if grad is None}
        if missing:
            torch._foreach_zero_(list(missing.values()))
        for p, grad in missing.items():
            p.grad = grad

    def _place_constants(self) -> None:
        """Copy the folded layers' constants of this step to where those of the first were."""
        new = [layer.constants for layer in self.step.folded if layer.constants is not None]
        if [_form(own) for own in new] != [_form(own) for own in self._constants]:
            self.forget()
            self._constants = new
        elif new:
            pairs = [
                (own, value)
                for kept, fresh in zip(self._constants, new, strict=True)
                for own, value in zip(_values(kept), _values(fresh), strict=True)
            ]
            torch._foreach_copy_([own for own, _ in pairs], [value for _, value in pairs])
        for layer, own in zip(self.step.folded, self._constants, strict=True):
            layer.constants = own


def _form(constants: Constants) -> tuple[object, ...]:
    """What a recording takes for granted of a layer's constants."""
    own = constants
    shapes = tuple(value.shape for value in _values(own))
    return own.weight.data_ptr(), own.corrects, own.recompute, own.iw is None, shapes


def _values(constants: Constants) -> list[Tensor]:
    own = constants
    return [value for value in (own.bias, own.iw, own.table, own.gradients) if value is not None]
