"""The training loop: a generator of records that prints nothing and opens no files."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch

from bln_train.data.datasets import DataSet, ImageSet, epoch_order
from bln_train.errors import CheckpointError, DivergedError, first_line
from bln_train.memory.peak import PeakMeter
from bln_train.records import EpochRecord, MemoryRecord, NoticeRecord, Record, StepRecord
from bln_train.system.signals import never
from bln_train.train.batches import EffectiveBatch
from bln_train.train.check_state import (
    check_counts,
    check_numbers,
    check_optimizer,
    check_rng,
    check_sums,
    check_tensors,
)
from bln_train.train.diagnose import find_fault
from bln_train.train.evaluate import Evaluation
from bln_train.train.health import HealthWatch, layer_records
from bln_train.train.optim import Schedule
from bln_train.train.recovery import RecoveringStep
from bln_train.train.step import AccumulationStep, StepResult

MAX_SKIPPED_IN_A_ROW = 10
"""Steps whose gradient is not finite, after which the next one stops the run even where they are skipped."""


class TrainerSettings(NamedTuple):
    """The numbers of a run that a recipe states."""

    epochs: int
    effective_batch_size: int
    """Images behind each step; the last step of an epoch may have fewer."""
    seed: int
    """Of the order of images and of every random draw."""
    eval_every_epochs: int = 1
    """Epochs from one evaluation to the next; the end of training is always evaluated."""
    max_steps: int | None = None
    """Stop early; the schedule still spans all epochs."""
    detail_every_steps: int = 10
    """How often a step's record carries each layer's likelihood."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """After a step whose loss or gradient is not finite: raise, or leave the step out."""


class Trainer:
    """Runs optimizer steps over epochs, evaluates, measures memory, and can stop and go on at any step.

    Everything random is a function of (seed, epoch, image), and the schedule of the step, so the state to save is the
    network, the optimizer and a step count; see `state_dict`.

    Args:
        accumulation: takes one optimizer step.
        data: training, test and perhaps validation images. With validation images, these are what training is evaluated on,
            and the test images are for its end; without, the test images are for both.
        schedule: sets the learning rate of each step.
        evaluate: gives loss and accuracy of the network as it is; may raise StopRequested where `accumulation.stop_asked` says yes.
        settings: see `TrainerSettings`.

    Attributes:
        num_steps, num_steps_done: steps of the whole run, and those taken so far.
    """

    def __init__(
        self,
        accumulation: AccumulationStep,
        data: DataSet,
        schedule: Schedule,
        evaluate: Callable[[ImageSet], Evaluation],
        settings: TrainerSettings,
    ) -> None:
        self.accumulation, self.data, self.schedule, self.evaluate = accumulation, data, schedule, evaluate
        self.recovering_step = RecoveringStep(accumulation)
        self.effective_batch_size, self.seed = settings.effective_batch_size, settings.seed
        self.eval_every_epochs, self.detail_every_steps = settings.eval_every_epochs, settings.detail_every_steps
        self.on_nonfinite = settings.on_nonfinite
        self.steps_per_epoch = math.ceil(len(data.train) / settings.effective_batch_size)
        self.num_steps = min(self.steps_per_epoch * settings.epochs, settings.max_steps or sys.maxsize)
        self.meter = PeakMeter(accumulation.model, accumulation.optimizer, accumulation.gradients, accumulation.device)
        self.health = HealthWatch(accumulation.statistics.layers)
        self.num_steps_done = 0
        self._skipped, self._skipped_in_a_row = 0, 0
        self._epoch_sums = _EpochSums()
        self._notices: list[str] = []  # until the next record is out
        self._measured_from = 0  # the step at which the meter began

    def steps(self, stop_asked: Callable[[], bool] = never) -> Iterator[Record]:
        """Train to the end, yielding a record after each step, epoch and memory measurement.

        Whenever a record is out, the state is that of a whole step and may be saved. A run that was resumed yields what it
        would have yielded from there.

        Raises:
            StopRequested: `stop_asked` said yes between two micro-steps or while evaluating; the state is that of the last whole
                step and may be saved, the gradients of the step under way are gone.
            DivergedError: the loss, the gradient norm or the update norm is not finite, with the first layer at fault. Unless it
                is the update norm, the state is that of before the step.
        """
        self.meter.start()
        self.accumulation.stop_asked = stop_asked
        self._measured_from = self.num_steps_done
        yield from self._take_notices()
        order_epoch, order = -1, torch.empty(0, dtype=torch.int64)
        while True:
            epoch, position = divmod(self.num_steps_done, self.steps_per_epoch)
            # Asked before the step, not after: a run stopped between an epoch's last step and its end resumes here.
            if self._epoch_sums.is_open and (position == 0 or self.num_steps_done == self.num_steps):
                yield self._end_epoch((self.num_steps_done - 1) // self.steps_per_epoch)
                self._notices += self.health.notices()
                yield from self._take_notices()
            if self.num_steps_done >= self.num_steps:
                break
            if epoch != order_epoch:
                order_epoch, order = epoch, epoch_order(len(self.data.train), seed=self.seed, epoch=epoch)
            begin = position * self.effective_batch_size
            index = order[begin : begin + self.effective_batch_size]
            record = self._train_on(EffectiveBatch(self.data.train, index, self.seed, epoch))
            if record is not None:
                yield record
            yield from self._take_notices()
            if self.num_steps_done - self._measured_from == PeakMeter.NUM_NOTED:
                yield self.memory_record()
                timeline = self.meter.timeline(*self._batch_sizes())
                if timeline is not None:
                    yield timeline
        yield self.memory_record()

    def _train_on(self, batch: EffectiveBatch) -> StepRecord | NoticeRecord | None:
        began = time.perf_counter()
        tracked = self.meter.tracks_next_step
        learning_rate = self.schedule.apply(self.accumulation.optimizer, self.num_steps_done)
        micro_batch_size = self.accumulation.micro_batch_size
        with self.meter.step() as gradients_ready:
            result = self.recovering_step(batch, gradients_ready)
        self._notices += result.notices
        if not result.is_finite:
            return self._skip(batch, result)
        self._skipped_in_a_row = 0
        self.num_steps_done += 1
        if self.accumulation.micro_batch_size != micro_batch_size:
            # A record pairs the peak with the micro-batch that needs it: neither the failed attempt nor what fitted before.
            self.meter.restart()
            self._measured_from = self.num_steps_done
        record = self._read(result, len(batch), learning_rate, began)
        if not tracked:
            self._epoch_sums.timed_images += len(batch)
            self._epoch_sums.timed_seconds += record.seconds
        return record

    def _skip(self, batch: EffectiveBatch, result: StepResult) -> NoticeRecord | None:
        """Count a step that was not finite as done, and say so the first time; or stop."""
        stops = self.on_nonfinite == "stop" or self._skipped_in_a_row == MAX_SKIPPED_IN_A_ROW
        fault = ""
        if stops or not self._skipped:
            self.meter.stop()
            loss = float(result.loss)
            what = "a gradient is not finite" if math.isfinite(loss) else f"the loss is {loss}"
            fault = f"step {self.num_steps_done + 1}: {what}; {find_fault(self.accumulation, batch)}"
            self.meter.start()
        self.accumulation.give_up()
        if stops:
            after = f" after {self._skipped_in_a_row} skipped steps in a row" if self._skipped_in_a_row else ""
            raise DivergedError(
                f"{fault}; training diverged{after}",
                "Lower optimizer.lr, lengthen schedule.warmup_epochs, or set optimizer.clip_norm=1.0.",
            )
        self.num_steps_done += 1
        self._skipped += 1
        self._skipped_in_a_row += 1
        self._epoch_sums.skipped += 1
        return (
            NoticeRecord(f"{fault}. It is skipped; later ones are counted in the epochs' records.", self.num_steps_done)
            if fault
            else None
        )

    def _read(self, result: StepResult, num_images: int, learning_rate: float, began: float) -> StepRecord:
        """Bring a step's sums to the host: the one synchronisation of the step, but for the layers' at an epoch's last."""
        norm, of = (result.grad_norm, "gradient") if result.update_norm is None else (result.update_norm, "update")
        assert norm is not None
        values = [result.loss, result.correct, norm]
        nll = result.nll if result.nll is not None else torch.empty(0, device=result.loss.device)
        loss, correct, size, *layers = torch.cat([torch.stack([v.double() for v in values]), nll.double()]).tolist()
        seconds = time.perf_counter() - began
        if not math.isfinite(loss) or not (math.isfinite(size) or self.accumulation.loss_scale.is_enabled()):
            what = f"the loss is {loss}" if not math.isfinite(loss) else f"the {of} norm is {size}"
            raise DivergedError(
                f"step {self.num_steps_done}: {what}; training diverged",
                "Lower optimizer.lr, lengthen schedule.warmup_epochs, or set optimizer.clip_norm=1.0.",
            )
        self._epoch_sums.images += num_images
        self._epoch_sums.loss += loss
        self._epoch_sums.correct += correct
        followed = [value for value in layers if math.isfinite(value)]  # NaN: a layer whose statistics are frozen
        names = list(self.accumulation.statistics.layers)
        last_of_epoch = self.num_steps_done % self.steps_per_epoch == 0 or self.num_steps_done == self.num_steps
        detail = self.num_steps_done % self.detail_every_steps == 0 or last_of_epoch
        return StepRecord(
            step=self.num_steps_done,
            epoch=self.num_steps_done / self.steps_per_epoch,
            num_images=num_images,
            loss=loss / num_images,
            accuracy=correct / num_images,
            nll=sum(followed) / len(followed) if followed else None,
            learning_rate=learning_rate,
            grad_norm=size if of == "gradient" else None,
            update_norm=size if of == "update" else None,
            seconds=seconds,
            nll_by_layer=dict(zip(names, layers, strict=True)) if layers and detail else None,
            layers=layer_records(self.accumulation.statistics.layers) if layers and last_of_epoch else None,
        )

    def _take_notices(self) -> Iterator[NoticeRecord]:
        texts, self._notices = self._notices, []
        for text in texts:
            yield NoticeRecord(f"step {self.num_steps_done}: {text}", self.num_steps_done)

    def _end_epoch(self, epoch: int) -> EpochRecord:
        sums, last = self._epoch_sums, self.num_steps_done == self.num_steps
        on_validation, on_test, seconds = None, None, None
        if last or (epoch + 1) % self.eval_every_epochs == 0:
            self.meter.stop()
            began = time.perf_counter()
            if self.data.validation is not None:
                on_validation = self.evaluate(self.data.validation)
            if self.data.validation is None or last:
                on_test = self.evaluate(self.data.test)
            seconds = time.perf_counter() - began
            for found in (on_validation, on_test):
                self._notices += found.notices if found else ()
            self.meter.start()
        self._epoch_sums = _EpochSums()  # not before: an evaluation that is stopped begins anew
        return EpochRecord(
            step=self.num_steps_done,
            epoch=epoch + 1,
            train_loss=sums.loss / sums.images if sums.images else math.nan,
            train_accuracy=sums.correct / sums.images if sums.images else math.nan,
            images_per_second=sums.timed_images / sums.timed_seconds if sums.timed_images else None,
            test_loss=on_test.loss if on_test else None,
            test_accuracy=on_test.accuracy if on_test else None,
            num_test_images=on_test.num_images if on_test else 0,
            eval_seconds=seconds,
            validation_loss=on_validation.loss if on_validation else None,
            validation_accuracy=on_validation.accuracy if on_validation else None,
            num_validation_images=on_validation.num_images if on_validation else 0,
            num_skipped_steps=sums.skipped,
        )

    def memory_record(self) -> MemoryRecord:
        """Peak memory so far."""
        return self.meter.record(*self._batch_sizes())

    def _batch_sizes(self) -> tuple[int, int]:
        """Effective batch and micro-batch; neither can be larger than the data set."""
        num_images = len(self.data.train)
        return min(self.effective_batch_size, num_images), min(self.accumulation.micro_batch_size, num_images)

    @property
    def epoch_is_open(self) -> bool:
        """Whether steps were taken of an epoch whose end is still to come."""
        return self._epoch_sums.is_open

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and strings from which `load_state_dict` goes on bit for bit.

        Raises:
            DivergedError: a weight, statistic or momentum is not finite, so there is nothing to go on from.
        """
        self._check_finite()
        loss_scale = self.accumulation.loss_scale
        return {
            "step": self.num_steps_done,
            "micro_batch_size": self.accumulation.micro_batch_size,
            "asked_micro_batch_size": self.recovering_step.asked_micro_batch_size,
            "epoch_sums": vars(self._epoch_sums).copy(),
            "skipped": [self._skipped, self._skipped_in_a_row],
            "health": self.health.state_dict(),
            "model": self.accumulation.model.state_dict(),
            "optimizer": self.accumulation.optimizer.state_dict(),
            "scaler": loss_scale.state_dict() if loss_scale.is_enabled() else None,
            "torch_rng": torch.get_rng_state(),
        }

    def _check_finite(self) -> None:
        optimizer, model = self.accumulation.optimizer, self.accumulation.model
        of: dict[torch.Tensor, str] = {p: name for name, p in model.named_parameters()}
        tensors = dict(model.state_dict())
        tensors |= {
            f"{key} of {of[p]}": value
            for p, values in optimizer.state.items()
            for key, value in values.items()
            if isinstance(value, torch.Tensor)
        }
        floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
        if floats and not bool(torch.stack([tensor.isfinite().all() for tensor in floats.values()]).all()):
            first = next(name for name, tensor in floats.items() if not bool(tensor.isfinite().all()))
            raise DivergedError(
                f"after step {self.num_steps_done}: {first} is not finite; training diverged, and this state is not saved",
                "Lower optimizer.lr, or lengthen schedule.warmup_epochs.",
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            CheckpointError: the state is of another network, optimizer or length of run, or it is none; nothing was taken of it.
        """
        accumulation = self.accumulation
        try:
            check_tensors(accumulation.model.state_dict(), state["model"])
            check_optimizer(accumulation.optimizer, state["optimizer"])
            check_sums(state["epoch_sums"], len(self.data.train))
            check_counts(state)
            self.health.check_state_dict(state["health"])
            if accumulation.loss_scale.is_enabled():
                check_numbers("its loss scale", state["scaler"])
            check_rng(torch.get_rng_state(), state["torch_rng"])
            if type(state["step"]) is not int or not 0 <= state["step"] <= self.num_steps:
                raise ValueError(f"its step is not one of the run's {self.num_steps}")
            epoch_sums = _EpochSums(**state["epoch_sums"])
            accumulation.model.load_state_dict(state["model"])
            accumulation.optimizer.load_state_dict(state["optimizer"])
            if accumulation.loss_scale.is_enabled():
                accumulation.loss_scale.load_state_dict(state["scaler"])
            torch.set_rng_state(state["torch_rng"])
            self.num_steps_done, self._epoch_sums = state["step"], epoch_sums
            found, asked = state["micro_batch_size"], state["asked_micro_batch_size"]
            if asked == accumulation.micro_batch_size != found:
                self.recovering_step.go_on_with(found)
                self._notices.append(
                    f"goes on with micro-batch {found}, not {asked}, for which memory ran out; another "
                    "train.micro_batch_size is taken as asked."
                )
            self._skipped, self._skipped_in_a_row = state["skipped"]
            self.health.load_state_dict(state["health"])
        except KeyError as error:
            raise CheckpointError(f"the checkpoint does not fit this recipe: it lacks {error}") from error
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise CheckpointError(f"the checkpoint does not fit this recipe: {first_line(error)}") from error


class _EpochSums:
    """Running sums of the epoch under way; part of the state, so that a resumed epoch reports the whole of itself."""

    def __init__(
        self,
        images: int = 0,
        loss: float = 0.0,
        correct: float = 0.0,
        timed_images: int = 0,
        timed_seconds: float = 0.0,
        skipped: int = 0,
    ) -> None:
        self.images, self.loss, self.correct = images, loss, correct
        self.timed_images, self.timed_seconds, self.skipped = timed_images, timed_seconds, skipped

    @property
    def is_open(self) -> bool:
        """Whether the epoch has had a step."""
        return self.images > 0 or self.skipped > 0
