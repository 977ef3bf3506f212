"""What travels from the trainer to logs, tables and plots: frozen, plain, JSON-ready. No torch here.

Sizes are bytes, times seconds, accuracies fractions of 1; None means "not measured".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerRecord:
    """A batchless layer's statistics, and how what an effective batch brought compares with them, over its channels."""

    num_channels: int
    """Means and standard deviations that it has; 1 where all channels share them."""
    mean_low: float
    """Smallest and largest learned mean, after the step, in units of the layer's input."""
    mean_high: float
    std_low: float
    """Smallest and largest learned standard deviation, after the step."""
    std_high: float
    offset_rms: float
    """Root mean square over channels of (observed mean - learned mean) / learned std, as the step's forward used them."""
    ratio_low: float
    """Smallest, geometric mean and largest of observed std / learned std, 0.001 where it is less."""
    ratio_mean: float
    ratio_high: float
    num_dead: int
    """Channels whose inputs do not vary."""
    num_at_floor: int
    """Channels whose learned standard deviation is norm.eps, the smallest there is."""


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step."""

    step: int
    """Steps done, this one included."""
    epoch: float
    """Epochs done, this step included."""
    num_images: int
    """Of the effective batch; fewer where it is an epoch's last."""
    loss: float
    """Mean task loss over the effective batch in nats, without the likelihood."""
    accuracy: float
    """Fraction of the effective batch classified right, as training saw it."""
    nll: float | None
    """Mean over layers of the gauged likelihood: 0 when inputs follow the learned statistics."""
    learning_rate: float
    """Of this step, as the schedule has it."""
    grad_norm: float | None
    """Before clipping; statistics that follow their own rule are not in it. None where gradients gather in the momentum."""
    seconds: float
    """From the beginning of the step until its sums are on the host."""
    nll_by_layer: dict[str, float] | None = None
    """The gauged likelihood of each batchless layer by name; None for most steps."""
    layers: dict[str, LayerRecord] | None = None
    """Of each batchless layer, at the last step of an epoch."""
    update_norm: float | None = None
    """Norm of all momentum buffers before clipping, where gradients gather there; None elsewhere, see `grad_norm`."""


@dataclass(frozen=True)
class EpochRecord:
    """The end of an epoch: what training saw and what evaluation found."""

    step: int
    """Steps done."""
    epoch: int
    """Epochs done, this one included."""
    train_loss: float
    """Mean over the epoch's steps while the weights changed, in nats; NaN where all were skipped."""
    train_accuracy: float
    """Fraction classified right, the same way."""
    images_per_second: float | None
    """Over this epoch's training steps, memory-tracked ones left out."""
    test_loss: float | None
    """In nats; None where this epoch was not evaluated, or on validation images only."""
    test_accuracy: float | None
    """Fraction classified right; None as `test_loss`."""
    num_test_images: int
    """Behind both; 0 where they are None."""
    eval_seconds: float | None
    """Of all evaluation at this epoch's end; None where there was none."""
    validation_loss: float | None = None
    """In nats; None where this epoch was not evaluated, or nothing is held out (data.validation_fraction)."""
    validation_accuracy: float | None = None
    """Fraction classified right; None as `validation_loss`."""
    num_validation_images: int = 0
    """Behind both; 0 where they are None."""
    num_skipped_steps: int = 0
    """Steps left out because loss or gradient was not finite (train.on_nonfinite)."""


@dataclass(frozen=True)
class MemoryRecord:
    """Peak memory of training at one effective and micro-batch size; evaluation is not in it."""

    device: str
    """Its name."""
    method: str
    """`allocator` (CUDA's own count) or `tracked tensors` (storages alive during tracked steps; CPU)."""
    effective_batch_size: int
    """Images behind one step."""
    micro_batch_size: int
    """Images in memory at once."""
    peak_bytes: int | None
    """allocator: allocated at the peak; tracked tensors: live storages at the peak, kernels' scratch not included."""
    reserved_bytes: int | None
    """Taken by the allocator from the device."""
    device_bytes: int | None
    """Of the whole card in use by all processes when last looked at."""
    process_bytes: int | None
    """Peak resident memory of the process (CPU), libraries and data set included."""
    parameter_bytes: int | None
    """Of the peak: weights and statistics."""
    gradient_bytes: int | None
    """Of the peak: their gradients, where those have a place of their own."""
    optimizer_bytes: int | None
    """Of the peak: momentum and the like."""
    activation_bytes: int | None
    """Of the peak: whatever a step creates and frees again: saved tensors, temporaries, inputs."""
    other_bytes: int | None
    """Of the peak: buffers, and what was alive before."""


@dataclass(frozen=True)
class TimelineRecord:
    """Live tensor bytes through one optimizer step, at points that are in order but not evenly spaced.

    Each list of bytes has a value for each point. Of the operators behind a point it is the one with most bytes alive, so the
    largest sum over the kinds is the step's peak.
    """

    effective_batch_size: int
    micro_batch_size: int
    num_micro_steps: int
    phases: list[str]
    """In order: forward and backward of the first micro-step, `between` for all others but the last, forward and backward of the
    last, optimizer, probe."""
    num_points: list[int]
    """Points of each phase; `between` has one."""
    parameter_bytes: list[int]
    gradient_bytes: list[int]
    optimizer_bytes: list[int]
    activation_bytes: list[int]
    other_bytes: list[int]


@dataclass(frozen=True)
class NoticeRecord:
    """Something the user should know: it changes no result, but explains one."""

    text: str
    """A sentence or more."""
    step: int = 0
    """Steps done when it came up; 0 for what is said before the first."""


@dataclass(frozen=True)
class InputSpec:
    """The images a network was trained on, as far as its use needs them; a checkpoint keeps it."""

    image_size: int
    """Pixels a side."""
    mean: tuple[float, ...]
    """What is subtracted from each colour channel, (3,) in units of pixel / 255."""
    std: tuple[float, ...]
    """What it is divided by then, (3,) in the same units."""
    class_names: tuple[str, ...]
    """In the order of the network's outputs."""


Record = StepRecord | EpochRecord | MemoryRecord | TimelineRecord | NoticeRecord
_KINDS: dict[str, type[Any]] = {
    "step": StepRecord,
    "epoch": EpochRecord,
    "memory": MemoryRecord,
    "timeline": TimelineRecord,
    "notice": NoticeRecord,
}


def best_validation(epochs: Sequence[EpochRecord]) -> dict[str, Any]:
    """Lowest validation loss and highest accuracy, each with the first epoch that had it; all None where nothing is held out.

    They are two choices of an epoch, as the method's authors report them. A loss that is not finite is none: it was logged as
    null, which is what a resumed run finds.
    """
    losses = {e.epoch: loss for e in epochs if (loss := e.validation_loss) is not None and math.isfinite(loss)}
    accuracies = {e.epoch: accuracy for e in epochs if (accuracy := e.validation_accuracy) is not None}
    loss_epoch = min(losses, key=losses.__getitem__, default=None)
    accuracy_epoch = max(accuracies, key=accuracies.__getitem__, default=None)
    return {
        "best_validation_loss": None if loss_epoch is None else losses[loss_epoch],
        "best_validation_loss_epoch": loss_epoch,
        "best_validation_accuracy": None if accuracy_epoch is None else accuracies[accuracy_epoch],
        "best_validation_accuracy_epoch": accuracy_epoch,
        "num_validation_images": epochs[-1].num_validation_images if epochs else 0,
    }


def record_to_dict(record: Record) -> dict[str, Any]:
    """The record as a JSON-ready dict with its `kind`."""
    kind = next(name for name, cls in _KINDS.items() if isinstance(record, cls))
    return {"kind": kind, **asdict(record)}


def record_from_dict(data: dict[str, Any]) -> Record:
    """Inverse of `record_to_dict`; raises KeyError or TypeError on anything else."""
    fields = dict(data)
    if fields.get("layers") is not None:
        fields["layers"] = {name: LayerRecord(**values) for name, values in fields["layers"].items()}
    record: Record = _KINDS[fields.pop("kind")](**fields)
    return record
