"""What training takes, measured over a grid of norms and batch sizes, on random images and with learning rate 0.

Each cell is built from the recipe and trained for a few steps that are thrown away: no data set, no accuracy. Memory is
measured with one cell's network alive, speed afterwards with those of all norms alive, in turns.
"""

from __future__ import annotations

import contextlib
import csv
import gc
import io
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bln_train.build import runtime
from bln_train.build.experiment import Experiment, build_experiment
from bln_train.data.datasets import DataSet, ImageSet
from bln_train.errors import BlnError, RunFolderError
from bln_train.experiments.compare import Cell, plan_cells
from bln_train.memory.peak import PeakMeter
from bln_train.memory.snapshot import recorded_snapshot
from bln_train.memory.timeline import TrackedStep
from bln_train.memory.tracker import StorageTracker, storage_bytes
from bln_train.recipe.recipe import Recipe
from bln_train.records import MemoryRecord, TimelineRecord
from bln_train.runs.folder import MEMORY_TABLE, json_text
from bln_train.system import machine
from bln_train.system.atomic import write_atomically
from bln_train.train.batches import EffectiveBatch
from bln_train.train.cuda_graphs import NUM_STEPS_TO_RECORD
from bln_train.train.recovery import explained_failures
from bln_train.train.step import AccumulationStep

TABLE_JSON, TABLE_CSV = MEMORY_TABLE, "memory.csv"
_MIN_TIMED_IMAGES, _MIN_TIMED_MICRO_BATCHES = 128, 4


@dataclass(frozen=True)
class Floor:
    """What no split can save, in bytes: one image's training in the same network without a norm; see `measure_floor`."""

    parameter_bytes: int
    optimizer_bytes: int
    live_bytes: int
    floor_bytes: int
    """The sum."""


@dataclass
class Row:
    """One cell's figures; None is "not measured"."""

    norm: str
    micro_batch_size: int
    effective_batch_size: int
    saved_bytes_per_image: float | None = None
    """What autograd keeps for the backward of one micro-batch, over its images; see `measure_saved_bytes`."""
    peak_bytes: int | None = None
    """Of two whole steps, or until all is recorded, as in `records.MemoryRecord`; the split adds up to it."""
    parameter_bytes: int | None = None
    gradient_bytes: int | None = None
    optimizer_bytes: int | None = None
    activation_bytes: int | None = None
    other_bytes: int | None = None
    reserved_bytes: int | None = None
    """Taken by the allocator from the device (CUDA)."""
    peak_over_floor: float | None = None
    ms_per_image: float | None = None
    """Median over the repetitions, of whole steps, probe and optimizer included."""
    images_per_second: float | None = None
    ms_over_none: float | None = None
    """Median over the repetitions of the ratio to norm `none` in the same repetition."""
    ms_over_batch: float | None = None
    num_timed_images: int | None = None
    """Images of each timed step; below the effective batch where that would take long."""
    problem: str = ""
    """Why figures are missing."""
    timeline: TimelineRecord | None = None
    """Live bytes through one step, where that was asked for; not in the CSV."""


def random_data(recipe: Recipe, num_images: int) -> DataSet:
    """Random uint8 images of the recipe's size and class count, held in memory; two test images, which nobody looks at.

    The side is data.image_size, else 32; the classes are model.num_classes, else 100 for cifar100 and 10 for all others.
    """
    side, num_classes = recipe.image_size, recipe.num_classes
    generator = torch.Generator().manual_seed(0)

    def draw(num: int) -> ImageSet:
        images = torch.randint(0, 256, (num, 3, side, side), generator=generator, dtype=torch.uint8)
        return ImageSet(images, torch.randint(0, num_classes, (num,), generator=generator))

    source = f"random {side}x{side} images of {num_classes} classes, no data set"
    return DataSet(draw(num_images), draw(2), tuple(f"class {n}" for n in range(num_classes)), source)


def measure(
    recipe: Recipe,
    cells: Sequence[Cell],
    folder: Path,
    *,
    num_repeats: int,
    show: Callable[[int, str], object],
    timeline: Path | None = None,
) -> dict[str, Any]:
    """Measure every cell of a plan and return the document that `write_tables` writes; what cannot be measured says why.

    Args:
        recipe: what the cells were planned from; the floor is that of its network without a norm.
        folder: made, and tried, before anything is measured.
        num_repeats: timed steps of each cell, after one that is not timed.
        timeline: where timelines will be drawn; each row then has its own, and on CUDA a snapshot for PyTorch's memory viewer is
            written beside it, in a file for each cell.
        show: is called before each of `num_stages(cells)` stages with its position and name.

    Raises:
        UsageError: the machine lacks the device or the precision.
        RunFolderError: the folder cannot be made or written.
    """
    device = machine.resolve_device(recipe.runtime.device)
    machine.autocast(device, recipe.train.precision)
    _make_folder(folder)
    cells = sorted(cells, key=lambda c: (c.micro_batch_size, c.effective_batch_size))
    data = random_data(recipe, max(c.effective_batch_size for c in cells))

    show(0, "floor: one image, no norm")
    floor, floor_problem = None, ""
    single = plan_cells(recipe, folder, norms=["none"], effective_batches=[1], micro_batches=[1])[0].recipe
    with _kept_problem() as problem:
        floor = measure_floor(_build(single, data))
    floor_problem = problem()

    rows = [Row(c.norm, c.micro_batch_size, c.effective_batch_size, problem=c.problem) for c in cells]
    for n, (cell, row) in enumerate(zip(cells, rows, strict=True), start=1):
        show(n, f"memory: {cell.norm}, {_sizes(cell)}")
        if cell.recipe is None:
            continue
        with _kept_problem() as problem, explained_failures(cell.recipe.first_micro_batch_size):
            experiment = _build(cell.recipe, data)
            _measure_memory(row, experiment, data)
            if timeline is not None:
                row.timeline = _measure_timeline(experiment, row, timeline)
            del experiment
        row.problem = problem()
        if row.peak_bytes is not None and floor is not None:
            row.peak_over_floor = row.peak_bytes / floor.floor_bytes
    pairs = zip(cells, rows, strict=True)
    for n, (sizes, members) in enumerate(groupby(pairs, key=lambda pair: _sizes(pair[0])), start=len(cells) + 1):
        show(n, f"speed: {sizes}")
        _measure_speed([(cell, row) for cell, row in members if row.peak_bytes is not None], data, num_repeats)
    return {
        "model": recipe.model.name,
        "data": data.source,
        "precision": recipe.train.precision,
        "optimizer": recipe.optimizer.name,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "environment": runtime.environment(device),
        "method": "allocator" if device.type == "cuda" else "tracked tensors",
        "num_repeats": num_repeats,
        "floor": asdict(floor) if floor is not None else None,
        "floor_problem": floor_problem,
        "rows": [asdict(row) for row in rows],
    }


def num_stages(cells: Sequence[Cell]) -> int:
    """How many stages `measure` shows: the floor, each cell's memory, and the speed of each pair of batch sizes."""
    return 1 + len(cells) + len({_sizes(cell) for cell in cells})


def _sizes(cell: Cell) -> str:
    return f"micro-batch {cell.micro_batch_size} of {cell.effective_batch_size}"


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"cannot create {folder}: {error.strerror}", "Choose another --out.") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise RunFolderError(f"{folder} cannot be written", "Choose another --out.")


@contextlib.contextmanager
def _kept_problem() -> Iterator[Callable[[], str]]:
    """Let a cell fail by itself: yields a function that says afterwards what went wrong, "" if nothing did."""
    text = ""
    try:
        yield lambda: text
    except (BlnError, RuntimeError, MemoryError) as error:  # RuntimeError: how PyTorch says that the CPU has no memory
        text = error.problem if isinstance(error, BlnError) else (str(error).splitlines() or [type(error).__name__])[0]


def _build(recipe: Recipe | None, data: DataSet) -> Experiment:
    """The recipe as `build_experiment` makes it, on other data, with learning rate 0 and norms that have seen nothing."""
    assert recipe is not None
    experiment = build_experiment(recipe, initialize=False, data=data)
    for group in experiment.trainer.accumulation.optimizer.param_groups:
        group["lr"] = 0.0
    return experiment


def _prepare_step(experiment: Experiment, num_images: int) -> Callable[..., float]:
    """One whole step as the trainer takes it, given a callback for when all gradients exist; at its end the device is idle."""
    trainer, images = experiment.trainer, experiment.data.train
    batch = EffectiveBatch(images, torch.arange(num_images), trainer.seed, 0)
    return lambda *ready: trainer.accumulation(batch, *ready).loss.item()


def measure_floor(experiment: Experiment) -> Floor:
    """The floor of training in bytes: parameters + optimizer state (with SGD the momentum) + one image's live tensors.

    The last is the largest sum of storages alive at once, operators' scratch not included, while one image goes forward and
    backward, less the parameters, gradients, buffers and optimizer state that exist beside it. All gradients exist before, as
    they do for every micro-batch but the first, so that the largest set is not mistaken for the moment with most gradients.

    Args:
        experiment: of one image, without a norm.
    """
    step, images = experiment.trainer.accumulation, experiment.data.train
    _prepare_step(experiment, 1)()  # now the optimizer has its state
    one = EffectiveBatch(images, torch.arange(1), 0, 0)
    step.accumulate(one)
    state = [v for entry in step.optimizer.state.values() for v in entry.values() if isinstance(v, Tensor)]
    beside = [*step.model.parameters(), *step.model.buffers(), *state, *step.gradients()]
    tracker = StorageTracker(beside)
    beside_bytes = tracker.live_bytes
    with _eager(step), tracker:
        step.accumulate(one)
    parameter_bytes, optimizer_bytes = storage_bytes(step.model.parameters()), storage_bytes(state)
    live_bytes = tracker.peak_bytes - beside_bytes
    return Floor(parameter_bytes, optimizer_bytes, live_bytes, parameter_bytes + optimizer_bytes + live_bytes)


@contextlib.contextmanager
def _eager(step: AccumulationStep) -> Iterator[None]:
    """Inside, no work is replayed: a replay shows no tensor."""
    graphs, step.graphs = step.graphs, None
    try:
        yield
    finally:
        step.graphs = graphs


def measure_saved_bytes(step: AccumulationStep, images: ImageSet, num_images: int) -> int:
    """Bytes of what autograd keeps for the backward of one micro-batch: everything saved from the network's input to its loss.

    Each storage counts once and wholly, whatever views of it are saved; the input images are in it, where the first layer
    keeps them. Not in it are parameters, buffers, and weights standardised once for the whole step. Gradients are dropped.

    Args:
        num_images: of the micro-batch, at most `step.micro_batch_size`.
    """
    assert num_images <= step.micro_batch_size
    saved: dict[int, int] = {}
    apart: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def note_weights() -> None:  # while the standardised ones are there
        shared = [m.shared_weight for m in step.standardized if m.shared_weight is not None]
        weights = (*step.model.parameters(), *step.model.buffers(), *shared)
        apart.update(w.untyped_storage().data_ptr() for w in weights)

    # What is saved before the network runs belongs to the step, not to the micro-batch.
    start = step.model.register_forward_pre_hook(lambda *_: saved.clear())
    batch = EffectiveBatch(images, torch.arange(num_images), 0, 0)
    step.model.train()
    try:
        with _eager(step), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            step.accumulate(batch, note_weights)
    finally:
        start.remove()
        step.statistics.discard()
        step.model.zero_grad(set_to_none=True)
    return sum(size for place, size in saved.items() if place not in apart)


def measure_peak(recipe: Recipe, data: DataSet) -> MemoryRecord:
    """The peak of two whole steps of a recipe, or until all is recorded, on other data; learns nothing."""
    return _measure_peak(_build(recipe, data), recipe.train.effective_batch_size)


def _measure_peak(experiment: Experiment, effective_batch_size: int) -> MemoryRecord:
    meter, step = experiment.trainer.meter, experiment.trainer.accumulation
    if step.device.type == "cuda":
        gc.collect()  # the allocator counts what is left of a cell that failed
    meter.start()
    take_step = _prepare_step(experiment, effective_batch_size)
    # Recordings take memory of their own, and the last is made when the others are.
    for _ in range(PeakMeter.NUM_NOTED if step.graphs is None else NUM_STEPS_TO_RECORD + 1):
        with meter.step() as gradients_ready:
            take_step(gradients_ready)
    return meter.record(effective_batch_size, step.micro_batch_size)


def _measure_memory(row: Row, experiment: Experiment, data: DataSet) -> None:
    step = experiment.trainer.accumulation
    record = _measure_peak(experiment, row.effective_batch_size)
    saved = measure_saved_bytes(step, data.train, row.micro_batch_size)
    row.saved_bytes_per_image = saved / row.micro_batch_size
    for name in ("peak", "parameter", "gradient", "optimizer", "activation", "other", "reserved"):
        setattr(row, f"{name}_bytes", getattr(record, f"{name}_bytes"))


def _measure_timeline(experiment: Experiment, row: Row, place: Path) -> TimelineRecord | None:
    meter, step, device = (
        experiment.trainer.meter,
        experiment.trainer.accumulation,
        experiment.trainer.accumulation.device,
    )
    sizes = row.effective_batch_size, step.micro_batch_size
    if device.type != "cuda":
        return meter.timeline(*sizes)
    take_step = _prepare_step(experiment, row.effective_batch_size)
    name = f"{place.stem}-{row.norm}-micro{row.micro_batch_size}-effective{row.effective_batch_size}.pickle"
    with recorded_snapshot(place.with_name(name), device):
        take_step()
    tracked = TrackedStep(step.model, step.optimizer, step.gradients, device)
    with _eager(step), tracked.run() as gradients_ready:
        take_step(gradients_ready)
    return None if tracked.timeline is None else tracked.timeline.record(*sizes)


def num_timed_images(micro: int, effective: int) -> int:
    """Images of a timed step: the effective batch, or four micro-batches and at least 128 images where that is less."""
    return min(effective, max(_MIN_TIMED_MICRO_BATCHES * micro, _MIN_TIMED_IMAGES))


def _measure_speed(group: Sequence[tuple[Cell, Row]], data: DataSet, num_repeats: int) -> None:
    """Time the norms of one pair of batch sizes in turns, so that what else the machine does meets all of them."""
    running: dict[str, tuple[Experiment, Row]] = {}
    times: dict[str, list[float]] = {}
    for cell, row in group:
        with _kept_problem() as problem:
            running[row.norm] = _build(cell.recipe, data), row
        row.problem = problem()
    replays = any(experiment.trainer.accumulation.graphs is not None for experiment, _ in running.values())
    num_untimed = NUM_STEPS_TO_RECORD if replays else 1
    for turn in range(num_untimed + num_repeats):
        for norm, (experiment, row) in list(running.items()):
            num_images = num_timed_images(row.micro_batch_size, row.effective_batch_size)
            with _kept_problem() as problem:
                began = time.perf_counter()
                _prepare_step(experiment, num_images)()
                if turn >= num_untimed:
                    times.setdefault(norm, []).append(1e3 * (time.perf_counter() - began) / num_images)
            row.problem = problem()
            if row.problem:  # does not fit beside the others
                del running[norm]
                times.pop(norm, None)

    def ratio(norm: str, to: str) -> float | None:
        return median(a / b for a, b in zip(times[norm], times[to], strict=True)) if to in times else None

    for norm, (_, row) in running.items():
        row.num_timed_images = num_timed_images(row.micro_batch_size, row.effective_batch_size)
        row.ms_per_image = median(times[norm])
        row.images_per_second = 1e3 / row.ms_per_image
        row.ms_over_none, row.ms_over_batch = ratio(norm, "none"), ratio(norm, "batch")


def write_tables(folder: Path, document: dict[str, Any]) -> None:
    """Write memory.json and memory.csv in place of what was there; raises RunFolderError."""
    write_atomically(folder / TABLE_JSON, json_text(document, indent=2))
    text = io.StringIO(newline="")
    environment, floor = document["environment"], document["floor"] or {}
    beside = {
        "model": document["model"],
        "data": document["data"],
        "precision": document["precision"],
        "optimizer": document["optimizer"],
        "method": document["method"],
        "floor_bytes": floor.get("floor_bytes"),
        "device": environment["device"],
        "num_threads": environment["num_threads"],
        "torch": environment["torch"],
        "date": document["date"],
    }
    columns = [*(field.name for field in fields(Row) if field.name != "timeline"), *beside]
    writer = csv.DictWriter(text, fieldnames=columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows({**row, **beside} for row in document["rows"])
    write_atomically(folder / TABLE_CSV, text.getvalue())
