"""The training loop: a generator of records that prints nothing and opens no files."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bln_train.data import DataSet, ImageSet, epoch_order
from bln_train.errors import CheckpointError, DivergedError, first_line
from bln_train.memory.peak import PeakMeter
from bln_train.optim import Schedule
from bln_train.records import EpochRecord, MemoryRecord, Record, StepRecord
from bln_train.signals import never
from bln_train.train.evaluate import Evaluation
from bln_train.train.fit import check_network, check_numbers, check_optimizer, check_rng, check_sums
from bln_train.train.step import AccumulationStep, StepTotals


class Trainer:
    """Runs optimizer steps over epochs, evaluates, measures memory, and can stop and go on at any step.

    Everything random is a function of (seed, epoch, image), and the schedule of the step, so the state to save is the
    network, the optimizer and a step count; see `state_dict`.

    Args:
        step: takes one optimizer step.
        data: training, test and perhaps validation images. With validation images, these are what training is evaluated on,
            and the test images are for its end; without, the test images are for both.
        evaluate: gives loss and accuracy of the network as it is; may raise StopRequested where `step.stop_asked` says yes.
        effective_batch_size: images behind each step; the last of an epoch may be shorter.
        max_steps: stop early; the schedule still spans all epochs.
        detail_every_steps: how often a step's record carries each layer's likelihood.
    """

    def __init__(
        self,
        step: AccumulationStep,
        data: DataSet,
        schedule: Schedule,
        evaluate: Callable[[ImageSet], Evaluation],
        *,
        epochs: int,
        effective_batch_size: int,
        seed: int,
        eval_every_epochs: int = 1,
        max_steps: int | None = None,
        detail_every_steps: int = 10,
    ) -> None:
        self.take_step, self.data, self.schedule, self.evaluate = step, data, schedule, evaluate
        self.epochs, self.effective_batch_size, self.seed = epochs, effective_batch_size, seed
        self.eval_every_epochs, self.detail_every_steps = eval_every_epochs, detail_every_steps
        self.steps_per_epoch = math.ceil(len(data.train) / effective_batch_size)
        self.num_steps = min(self.steps_per_epoch * epochs, max_steps or sys.maxsize)
        self.meter = PeakMeter(step.model, step.optimizer, step.gradients, step.device)
        self.step = 0
        self._epoch_sums = _EpochSums()

    def steps(self, stop_asked: Callable[[], bool] = never) -> Iterator[Record]:
        """Train to the end, yielding a record after each step, epoch and memory measurement.

        Whenever a record is out, the state is that of a whole step and may be saved. A run that was resumed yields what it
        would have yielded from there.

        Raises:
            StopRequested: `stop_asked` said yes between two micro-steps or while evaluating; the state is that of the last whole
                step and may be saved, the gradients of the step under way are gone.
            DivergedError: the loss, the gradient norm or the update norm is not finite.
        """
        self.meter.start()
        self.take_step.stop_asked = stop_asked
        first_step = self.step
        order_epoch, order = -1, torch.empty(0, dtype=torch.int64)
        while True:
            epoch, position = divmod(self.step, self.steps_per_epoch)
            # Asked before the step, not after: a run stopped between an epoch's last step and its end resumes here.
            if self._epoch_sums.images and (position == 0 or self.step == self.num_steps):
                yield self._end_epoch((self.step - 1) // self.steps_per_epoch)
            if self.step >= self.num_steps:
                break
            if epoch != order_epoch:
                order_epoch, order = epoch, epoch_order(len(self.data.train), seed=self.seed, epoch=epoch)
            begin = position * self.effective_batch_size
            index = order[begin : begin + self.effective_batch_size]
            yield self._train_on(index, epoch)
            if self.step - first_step == PeakMeter.NUM_NOTED:
                yield self.memory_record()
        yield self.memory_record()

    def _train_on(self, index: torch.Tensor, epoch: int) -> StepRecord:
        began = time.perf_counter()
        tracked = self.meter.tracks_next_step
        learning_rate = self.schedule.apply(self.take_step.optimizer, self.step)
        with self.meter.step() as gradients_ready:
            totals = self.take_step(self.data.train, index, self.seed, epoch, gradients_ready)
        self.step += 1
        detail = self.step % self.detail_every_steps == 0 or self.step == self.num_steps
        record = self._read(totals, len(index), learning_rate, began, detail)
        if not tracked:
            self._epoch_sums.timed_images += len(index)
            self._epoch_sums.timed_seconds += record.seconds
        return record

    def _read(
        self, totals: StepTotals, num_images: int, learning_rate: float, began: float, detail: bool
    ) -> StepRecord:
        """Bring a step's sums to the host: the one synchronisation of the step."""
        norm, of = (totals.grad_norm, "gradient") if totals.update_norm is None else (totals.update_norm, "update")
        assert norm is not None
        values = [totals.loss, totals.correct, norm]
        nll = totals.nll if totals.nll is not None else torch.empty(0, device=totals.loss.device)
        loss, correct, size, *layers = torch.cat([torch.stack([v.double() for v in values]), nll.double()]).tolist()
        seconds = time.perf_counter() - began
        if not math.isfinite(loss) or not (math.isfinite(size) or self.take_step.scaler is not None):
            what = f"the loss is {loss}" if not math.isfinite(loss) else f"the {of} norm is {size}"
            raise DivergedError(
                f"step {self.step}: {what}; training diverged",
                "Lower optimizer.lr, lengthen schedule.warmup_epochs, or set "
                f"optimizer.{'clip_norm' if of == 'gradient' else 'clip_update'}=1.0.",
            )
        self._epoch_sums.images += num_images
        self._epoch_sums.loss += loss
        self._epoch_sums.correct += correct
        followed = [value for value in layers if math.isfinite(value)]  # NaN: a layer whose statistics are frozen
        names = list(self.take_step.statistics.layers)
        return StepRecord(
            step=self.step,
            epoch=self.step / self.steps_per_epoch,
            num_images=num_images,
            loss=loss / num_images,
            accuracy=correct / num_images,
            nll=sum(followed) / len(followed) if followed else None,
            learning_rate=learning_rate,
            grad_norm=size if of == "gradient" else None,
            update_norm=size if of == "update" else None,
            seconds=seconds,
            nll_by_layer=dict(zip(names, layers, strict=True)) if layers and detail else None,
        )

    def _end_epoch(self, epoch: int) -> EpochRecord:
        sums, last = self._epoch_sums, self.step == self.num_steps
        on_validation, on_test, seconds = None, None, None
        if last or (epoch + 1) % self.eval_every_epochs == 0:
            self.meter.stop()
            began = time.perf_counter()
            if self.data.validation is not None:
                on_validation = self.evaluate(self.data.validation)
            if self.data.validation is None or last:
                on_test = self.evaluate(self.data.test)
            seconds = time.perf_counter() - began
            self.meter.start()
        self._epoch_sums = _EpochSums()  # not before: an evaluation that is stopped begins anew
        return EpochRecord(
            step=self.step,
            epoch=epoch + 1,
            train_loss=sums.loss / sums.images,
            train_accuracy=sums.correct / sums.images,
            images_per_second=sums.timed_images / sums.timed_seconds if sums.timed_images else None,
            test_loss=on_test.loss if on_test else None,
            test_accuracy=on_test.accuracy if on_test else None,
            num_test_images=on_test.num_images if on_test else 0,
            eval_seconds=seconds,
            validation_loss=on_validation.loss if on_validation else None,
            validation_accuracy=on_validation.accuracy if on_validation else None,
            num_validation_images=on_validation.num_images if on_validation else 0,
        )

    def memory_record(self) -> MemoryRecord:
        """Peak memory so far; an effective batch cannot be larger than the data set."""
        return self.meter.record(
            min(self.effective_batch_size, len(self.data.train)),
            min(self.take_step.micro_batch_size, len(self.data.train)),
        )

    @property
    def epoch_is_open(self) -> bool:
        """Whether steps were taken of an epoch whose end is still to come."""
        return self._epoch_sums.images > 0

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and strings from which `load_state_dict` goes on bit for bit."""
        scaler = self.take_step.scaler
        return {
            "step": self.step,
            "epoch_sums": vars(self._epoch_sums).copy(),
            "model": self.take_step.model.state_dict(),
            "optimizer": self.take_step.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "torch_rng": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            CheckpointError: the state is of another network, optimizer or length of run, or it is none; nothing was taken of it.
        """
        step = self.take_step
        try:
            check_network(step.model.state_dict(), state["model"])
            check_optimizer(step.optimizer, state["optimizer"])
            check_sums(state["epoch_sums"], len(self.data.train))
            if step.scaler is not None:
                check_numbers("its loss scale", state["scaler"])
            check_rng(torch.get_rng_state(), state["torch_rng"])
            if type(state["step"]) is not int or not 0 <= state["step"] <= self.num_steps:
                raise ValueError(f"its step is not one of the run's {self.num_steps}")
            epoch_sums = _EpochSums(**state["epoch_sums"])
            step.model.load_state_dict(state["model"])
            step.optimizer.load_state_dict(state["optimizer"])
            if step.scaler is not None:
                step.scaler.load_state_dict(state["scaler"])
            torch.set_rng_state(state["torch_rng"])
            self.step, self._epoch_sums = state["step"], epoch_sums
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
    ) -> None:
        self.images, self.loss, self.correct = images, loss, correct
        self.timed_images, self.timed_seconds = timed_images, timed_seconds
