"""What training will take, predicted: the training step itself runs on tensors without memory, and its allocations are counted.

On the CPU the count is that of `memory/peak.py`, to the byte. For CUDA it runs as the device would, and what only the device
knows is assumed and named: its context, and the scratch of convolutions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from bln_train.build.data import build_preprocess, input_spec
from bln_train.build.experiment import assemble, network_on
from bln_train.data.datasets import DataSet, ImageSet
from bln_train.norm.kernels.table import kernels_are_wanted, pretending, use_kernels
from bln_train.plan.allocator import BLOCK_BYTES, MIB, Block, CachingAllocator
from bln_train.plan.trace import FakeTracker, Trace
from bln_train.recipe.norms import BatchlessNormSection
from bln_train.recipe.recipe import Recipe
from bln_train.system.machine import WORKSPACE_BYTES
from bln_train.system.signals import StopRequested
from bln_train.system.units import CUDA_CONTEXT_BYTES
from bln_train.train.batches import SENT_BYTES, EffectiveBatch
from bln_train.train.cuda_graphs import MOST_PIXELS
from bln_train.train.step import AccumulationStep

CONTEXT_BYTES = CUDA_CONTEXT_BYTES
"""Assumed of CUDA's context with the libraries' kernels: some 300 MiB since CUDA 11.7 (pytorch#107667), more as kernels load."""
MATMUL_BYTES = 2 * WORKSPACE_BYTES
"""Workspaces that PyTorch keeps for cuBLAS: of the stream that trains and of the one that records."""


@dataclass(frozen=True)
class PlanRow:
    """The predicted peak of training at one micro-batch, in bytes: `total_bytes` is the sum of all parts."""

    micro_batch_size: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    """What a step creates and frees again, at the peak."""
    activation_bytes_per_image: float
    """What one image more in the micro-batch would add to that."""
    other_bytes: int
    """Buffers."""
    workspace_bytes: int | None
    """Scratch of the libraries, assumed, and images on their way; None on the CPU, where it is not counted."""
    graph_bytes: int | None
    """What recordings keep for themselves, at most; None on the CPU."""
    rounding_bytes: int | None
    """What the allocator has to take from the device beyond all that; None on the CPU."""
    context_bytes: int | None
    """Assumed or given; None on the CPU."""
    total_bytes: int

    @property
    def tensor_bytes(self) -> int:
        """Tensors alive at the peak, as `records.MemoryRecord` splits them."""
        parts = (
            self.parameter_bytes,
            self.gradient_bytes,
            self.optimizer_bytes,
            self.activation_bytes,
            self.other_bytes,
        )
        return sum(parts)


def plan_memory(
    recipe: Recipe, micro_batch_sizes: Sequence[int], *, cuda: bool, context_bytes: int = CONTEXT_BYTES
) -> list[PlanRow]:
    """Predict the peak memory of training at each micro-batch size; computes nothing but shapes.

    Sizes of tensors are affine in the images of the micro-batch, and what is alive when does not depend on them. So fake steps
    of two or three sizes tell those of all; a size whose step goes another way is run by itself.

    Args:
        recipe: the micro-batch that it states does not matter, nor does model.init.
        micro_batch_sizes: each from 1 to the effective batch size.
        cuda: predict for a CUDA device, which need not be here; else for the CPU.
        context_bytes: of CUDA's context.

    Raises:
        UsageError: the network cannot be built.
    """
    context = context_bytes if cuda else None
    rows = _rows(recipe, micro_batch_sizes, context_bytes=context)
    if cuda and recipe.runtime.compiled:
        # A device runs Triton's kernels or, where they do not work, operators. Those take more tensors, but for partial sums; what
        # the allocator needs beyond depends on the order in which they come and go.
        with pretending("triton"):
            others = _rows(recipe, micro_batch_sizes, context_bytes=context)
        rows = [max(pair, key=lambda row: row.total_bytes) for pair in zip(rows, others, strict=True)]
    return rows


def _rows(recipe: Recipe, micro_batch_sizes: Sequence[int], *, context_bytes: int | None) -> list[PlanRow]:
    """The prediction for one path; without a context for the CPU."""
    effective, cuda = recipe.train.effective_batch_size, context_bytes is not None
    rest = {size: effective - size for size in micro_batch_sizes if size < effective < 2 * size}
    with _kernels(wanted=recipe.runtime.compiled and not cuda), torch.random.fork_rng(devices=[]):
        traces, twins, probe_images = _traces(_on_cpu(recipe), [*micro_batch_sizes, *rest.values()])
    rows = []
    for size in micro_batch_sizes:
        trace, single = traces[size], size in rest or size == effective
        seen = trace.all_but_second() if single else torch.ones(trace.num_events + 1, dtype=torch.bool)
        row = _row(trace, twins.get(size), seen, context_bytes=context_bytes)
        row = _with_graphs(row, recipe, probe_images) if cuda else row
        if size in rest:  # gradients are there when the second and last micro-batch comes, which is smaller
            smaller = traces[rest[size]]
            second = _row(smaller, twins.get(rest[size]), smaller.second_micro_batch(), context_bytes=context_bytes)
            second = replace(second, micro_batch_size=size)
            row = max(row, _with_graphs(second, recipe, probe_images) if cuda else second, key=lambda r: r.total_bytes)
        rows.append(row)
    return rows


def _with_graphs(row: PlanRow, recipe: Recipe, probe_images: int) -> PlanRow:
    """The row with the memory of recordings: what the recorded work allocates, apart from what all else finds in the allocator."""
    wanted = recipe.runtime.graphs

    def is_recorded(num_images: int) -> bool:
        return wanted is not False and (wanted is True or num_images * recipe.image_size**2 <= MOST_PIXELS)

    own = 0.0
    if is_recorded(row.micro_batch_size):
        own = row.activation_bytes + (row.workspace_bytes or 0) - MATMUL_BYTES
    elif probe_images and is_recorded(probe_images):
        # The probe's forward alone, for which there is no figure: at most those images' way forth and back.
        own = probe_images * row.activation_bytes_per_image
    num_bytes = int(-(-own // (2 * MIB))) * 2 * MIB  # in whole segments of the allocator
    return replace(row, graph_bytes=num_bytes, total_bytes=row.total_bytes + num_bytes)


def _on_cpu(recipe: Recipe) -> Recipe:
    """The recipe as a CPU can run it, with tensors of the same sizes, and images whose values nobody asks for."""
    precision = {"fp16": "bf16", "tf32": "fp32"}.get(recipe.train.precision, recipe.train.precision)
    change = {"precision": precision, "micro_batch_size": 1}
    norm = recipe.norm
    # No micro-batch spans two parts of a balanced correction, and those of a traced step would be smaller than asked for.
    if isinstance(norm, BatchlessNormSection):
        norm = norm.model_copy(update={"correction_parts": "auto"})
    return recipe.model_copy(
        update={
            "norm": norm,
            "train": recipe.train.model_copy(update=change),
            "runtime": recipe.runtime.model_copy(update={"graphs": False}),
            "data": recipe.data.model_copy(update={"normalize": "symmetric"}),
            "model": recipe.model.model_copy(
                update={"init": None, "weight_standardization": recipe.weight_standardization}
            ),
        }
    )


@contextmanager
def _kernels(*, wanted: bool) -> Iterator[None]:
    before = kernels_are_wanted()
    use_kernels(wanted)
    try:
        yield
    finally:
        use_kernels(before)


def _no_images(recipe: Recipe, num_images: int) -> DataSet:
    """Images of the recipe's size that take no memory, and as many classes as it has."""
    side, num_classes = recipe.image_size, recipe.num_classes
    images = torch.zeros(1, 3, 1, 1, dtype=torch.uint8).expand(num_images, 3, side, side)
    some = ImageSet(images, torch.zeros(num_images, dtype=torch.int64))
    return DataSet(some, some, tuple(f"class {n}" for n in range(num_classes)), "no images")


def _traces(recipe: Recipe, sizes: Sequence[int]) -> tuple[dict[int, Trace], dict[int, Trace], int]:
    """A trace for each size, for those that are like another one the same step with one image more, and the probe's images."""
    device = torch.device("cpu")
    data = _no_images(recipe, recipe.train.effective_batch_size)
    preprocess = build_preprocess(recipe, data)
    images = input_spec(data, preprocess)
    model, _ = network_on(device, recipe, data, preprocess, images, initialize=False)
    found: dict[int, Trace] = {}
    twins: dict[int, Trace] = {}
    with pretending("native"):
        with FakeTracker([]):
            step = assemble(recipe, model, data, preprocess, images, device).trainer.accumulation
            _make_state(step)
        # One image is in channels-first and channels-last order at once; below the number of its images the probe works in parts.
        several = [size for size in sizes if size > 1]
        for alike in (
            [size for size in several if size < step.probe_images],
            [size for size in several if size >= step.probe_images],
        ):
            if not alike:
                continue
            low = min(alike)
            other = low - 1 if low + 1 == step.probe_images else low + 1
            found[low] = _trace(step, data, low)
            growth = found[low].growth(_trace(step, data, other, passes_only=True))
            if growth is None:
                continue
            for size in alike:
                found[size], twins[size] = found[low].at(size, growth), found[low].at(size + 1, growth)
        for size in sizes:
            if size not in found:
                found[size] = _trace(step, data, size)
    return found, twins, step.probe_images


def _trace(step: AccumulationStep, data: DataSet, size: int, *, passes_only: bool = False) -> Trace:
    """One fake step with two micro-batches; the probe has all its images.

    Args:
        passes_only: stop when gradients are ready.
    """
    num_images = max(2 * size, step.probe_images)
    model, optimizer = step.model, step.optimizer
    forwards: list[int] = []
    gradients: set[int] = set()
    ready = 0
    tracker = FakeTracker([*model.parameters(), *model.buffers(), *_state(optimizer), *step.gradients()])

    def note_gradients() -> None:
        nonlocal ready
        ready = tracker.num_events
        gradients.update(tracker.births(step.gradients()))
        if passes_only:
            raise StopRequested

    before, step.micro_batch_size = step.micro_batch_size, size
    hook = model.register_forward_pre_hook(lambda *_: forwards.append(tracker.num_events))
    try:
        with _two_micro_batches(step), tracker:
            index = torch.arange(num_images) % len(data.train)
            result = step(EffectiveBatch(data.train, index, 0, 0), note_gradients)
        assert result.is_finite, "a step that was not taken tells nothing"
    except StopRequested:
        assert passes_only
        if step.into_momentum is not None:
            step.into_momentum.give_up()
    finally:
        hook.remove()
        step.micro_batch_size = before
    kinds = {
        "optimizer": tracker.births(_state(optimizer)),  # first: a gradient may be the momentum
        "parameter": tracker.births(model.parameters()),
        "gradient": gradients,
        "other": tracker.births(model.buffers()),
    }
    return tracker.trace(size, kinds, second_forward=forwards[1], gradients_ready=ready)


def _make_state(step: AccumulationStep) -> None:
    """Let the optimizer make its state, by a step of rate 0."""
    for group in step.optimizer.param_groups:
        group["lr"] = 0.0
    if step.into_momentum is not None:
        step.into_momentum.begin()
    for parameter in step.parameters:
        if parameter.grad is None and parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    step.optimizer.step()
    step.model.zero_grad(set_to_none=True)


def _state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]


@contextmanager
def _two_micro_batches(step: AccumulationStep) -> Iterator[None]:
    """Let a step see its first two micro-batches alone: all others take what the second does."""
    every = step.micro_batches
    step.micro_batches = lambda *of: islice(every(*of), 2)  # type: ignore[method-assign]  # of this step alone, and not for long
    try:
        yield
    finally:
        del step.micro_batches


def _row(trace: Trace, twin: Trace | None, seen: Tensor, *, context_bytes: int | None) -> PlanRow:
    """The prediction that a trace gives; without a context that of the CPU.

    Args:
        seen: (E + 1,) bool, the events that happen.
        twin: the same step with one image more, where there is one.
    """
    cuda = context_bytes is not None
    block = BLOCK_BYTES if cuda else 1
    in_use = trace.live_bytes(block=block) + (trace.scratch if cuda else 0)
    peak = int(torch.where(seen, in_use, -1).argmax())
    parts = {kind: int(trace.live_bytes(mask, block=block)[peak]) for kind, mask in trace.kinds.items()}
    activation_bytes = int(trace.live_bytes(block=block)[peak]) - sum(parts.values())
    per_image = activation_bytes / trace.num_images
    if twin is not None:
        per_image = float(twin.live_bytes()[peak] - trace.live_bytes()[peak])
    workspace = rounding = None
    if cuda:
        workspace = int(trace.scratch[peak]) + MATMUL_BYTES + SENT_BYTES
        rounding = max(0, _reserved_bytes(trace, seen) - int(in_use[peak]) - MATMUL_BYTES)
    beside = (workspace or 0) + (rounding or 0) + (context_bytes or 0)
    return PlanRow(
        trace.num_images,
        activation_bytes=activation_bytes,
        activation_bytes_per_image=per_image,
        **{f"{kind}_bytes": num_bytes for kind, num_bytes in parts.items()},
        workspace_bytes=workspace,
        graph_bytes=None,
        rounding_bytes=rounding,
        context_bytes=context_bytes,
        total_bytes=sum(parts.values()) + activation_bytes + beside,
    )


def _reserved_bytes(trace: Trace, seen: Tensor) -> int:
    """The most that CUDA's allocator has to take from the device during the step."""
    allocator = CachingAllocator()
    allocator.allocate(MATMUL_BYTES)
    births: dict[int, list[tuple[int, int]]] = {}
    deaths: dict[int, list[int]] = {}
    for serial, (size, born, died) in enumerate(
        zip(trace.size.tolist(), trace.born.tolist(), trace.died.tolist(), strict=True)
    ):
        if size:
            births.setdefault(born, []).append((serial, size))
            deaths.setdefault(died, []).append(serial)
    blocks: dict[int, Block] = {}
    scratch, is_seen = trace.scratch.tolist(), seen.tolist()
    for event in range(trace.num_events + 1):
        if is_seen[event]:
            work = allocator.allocate(scratch[event]) if scratch[event] else None
            for serial, size in births.get(event, ()):
                blocks[serial] = allocator.allocate(size)
            if work is not None:
                allocator.release(work)
        for serial in deaths.get(event, ()):
            block = blocks.pop(serial, None)
            if block is not None:
                allocator.release(block)
    return allocator.peak_reserved_bytes
