"""Measured peaks: counted exactly, split fully, and flat in the effective batch."""

import gc

import pytest
import torch
from helpers import advance, state, tiny_recipe
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from bln_train.build.experiment import build_experiment
from bln_train.build.first_statistics import probe_images
from bln_train.experiments.sweep import measure_floor
from bln_train.memory.peak import PeakMeter
from bln_train.memory.tracker import StorageTracker, storage_bytes
from bln_train.norm import BatchlessNorm2d

KIB = 1024


def test_tracker_counts_storages_once_and_only_while_alive():
    """Views are free, temporaries count while they live, in-place changes do not."""
    base = torch.zeros(256)  # 1 KiB of float32
    tracker = StorageTracker([base])
    with tracker:
        a = base + 1
        view = a[10:].view(2, 123)
        b = torch.cat([a, a])
        assert tracker.live_bytes == 4 * KIB
        del a
        assert tracker.live_bytes == 4 * KIB  # the view holds it
        del view
        assert tracker.live_bytes == 3 * KIB
        b.add_(1)
        c = b.sum()
    assert tracker.peak_bytes == 4 * KIB
    assert tracker.bytes_at_peak(tracker.births([base, c])) == KIB  # c came after the peak
    assert tracker.bytes_at_peak(tracker.births([b])) == 2 * KIB


def test_tracker_sees_what_autograd_saves():
    """A chain of n saved activations peaks at n of them; backward frees them."""
    x = torch.zeros(256, requires_grad=True)
    tracker = StorageTracker([x])
    with tracker:
        y = x
        for _ in range(5):
            y = torch.exp(y)  # saves its result
        loss = y.sum()
        del y
        loss.backward()
        del loss
    assert 6 * KIB <= tracker.peak_bytes <= 9 * KIB
    assert tracker.live_bytes == 2 * KIB  # x and its gradient


def measured(**changes):
    trainer = build_experiment(tiny_recipe(train__precision="fp32", **changes)).trainer
    advance(trainer, 2)
    return trainer.memory_record(), trainer


def test_split_adds_up_to_the_peak():
    """Parameters, gradients, momentum, activations and the rest are the whole peak, and the known parts are exact."""
    record, trainer = measured()
    model = trainer.accumulation.model
    parts = (
        record.parameter_bytes,
        record.gradient_bytes,
        record.optimizer_bytes,
        record.activation_bytes,
        record.other_bytes,
    )
    assert sum(parts) == record.peak_bytes
    assert record.parameter_bytes == storage_bytes(model.parameters())
    assert record.other_bytes == storage_bytes(model.buffers())
    assert record.optimizer_bytes == storage_bytes(
        s["momentum_buffer"] for s in trainer.accumulation.optimizer.state.values()
    )
    assert record.reserved_bytes is None
    assert record.device_bytes is None


def test_tracking_changes_no_bit():
    """A tracked step computes what an untracked one computes."""
    tracked = build_experiment(tiny_recipe(train__precision="fp32")).trainer
    plain = build_experiment(tiny_recipe(train__precision="fp32")).trainer
    plain.meter._steps_left = 0
    advance(tracked, 3)
    advance(plain, 3)
    assert plain.memory_record().peak_bytes is None
    found, expected = state(tracked), state(plain)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("norm", ["batchless", "group"])
def test_peak_is_flat_in_the_effective_batch(norm):
    """At micro-batch 1 the peak for an effective batch of 8, 24 and 72 images is equal within 1 %."""
    peaks = []
    for effective in (8, 24, 72):
        record, _ = measured(
            data__num_train=2 * effective,
            norm={"name": norm},
            train__effective_batch_size=effective,
            train__micro_batch_size=1,
        )
        peaks.append(record.peak_bytes)
    assert max(peaks) <= 1.01 * min(peaks)


def test_peak_grows_with_the_micro_batch():
    """Activations are a constant plus a part proportional to the micro-batch."""
    four, eight, sixteen = (
        measured(norm={"name": "group"}, train__micro_batch_size=n)[0].activation_bytes for n in (4, 8, 16)
    )
    assert sixteen - eight == pytest.approx(2 * (eight - four), rel=0.05)  # the peak's moment moves


@pytest.mark.parametrize(
    ("model", "images"),
    [("paper_cnn", 4), ("resnet8", 4), ("resnet18", 4), ("wrn16_4", 4), ("resnet20", 5), ("resnet44", 10)],
)
def test_auto_probe_is_a_rule_of_shapes(model, images):
    """norm.probe_images: auto is the same number on every code path, at most an effective batch."""

    def number(**changes):
        changes = {"norm": {"name": "batchless", "init_images": 0}, "model__name": model, **changes}
        return build_experiment(tiny_recipe(**changes)).trainer.accumulation.probe_images

    assert number() == images
    for path in (
        {"norm": {"name": "batchless", "init_images": 0, "fold": False}},
        {"train__precision": "fp32", "train__channels_last": False},
        {"train__precision": "bf16", "train__micro_batch_size": 1},
        {"runtime": {"device": "cpu", "compiled": False}},
    ):
        assert number(**path) == images
    assert number(train__effective_batch_size=3, train__micro_batch_size=1) == 3


def test_auto_probe_is_deeper_in_deeper_networks():
    """From one image for 8 norms to one for 4, in between half the ratio of the sum of the norms' inputs to the largest."""

    def net(*sides):
        layers = [m for side in sides for m in (nn.AdaptiveAvgPool2d(side), BatchlessNorm2d(3))]
        return nn.Sequential(nn.Conv2d(3, 3, 1), *layers)

    recipe = tiny_recipe(norm={"name": "batchless"}, train__effective_batch_size=128)
    for sides, images in (([8] * 80, 20), ([8] + [1] * 79, 10), ([8] * 32 + [1] * 48, 16), ([8] * 12, 6), ([8], 4)):
        assert probe_images(recipe, net(*sides), 16) == images


def test_auto_probe_adds_nothing_to_the_peak():
    """At micro-batch 1 the images of the probe take no more than one image's training."""
    (peak,), (least,) = (
        {measured(norm={"name": "batchless", "init_images": 4, **probe}, model__name="resnet20", data__num_train=16,
                  train__micro_batch_size=1)[0].peak_bytes}
        for probe in ({}, {"probe_images": 1})
    )  # fmt: skip
    assert peak == least


def test_peak_at_micro_batch_1_is_near_the_floor():
    """Folded, with gradients in the momentum: at most 1.10 times parameters, momentum and one image's tensors without norm.

    It may be less by one filter's gradient, no more: the compiled kernel adds it where it gathers, PyTorch's makes it apart, first.
    """
    size = {"model__name": "resnet20", "train__micro_batch_size": 1}
    optimizer = {"name": "sgd", "lr": 0.1, "accumulate_into": "momentum"}
    bare = build_experiment(tiny_recipe(norm={"name": "none"}, optimizer=optimizer, train__precision="fp32", **size))
    floor = measure_floor(bare).floor_bytes
    norm = {"name": "batchless", "init_images": 4}
    record, _ = measured(norm=norm, optimizer=optimizer, data__num_train=16, **size)
    largest = max(storage_bytes([p]) for p in bare.trainer.accumulation.parameters)
    assert floor - largest <= record.peak_bytes <= 1.10 * floor


def test_nothing_is_left_alive_between_steps():
    """After each step the live tensors are the parameters, buffers, momentum and the data: no leak."""
    trainer = build_experiment(tiny_recipe(train__precision="fp32", train__micro_batch_size=3)).trainer

    def live():
        gc.collect()
        tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
        # Exports of other tests leave fake tensors, which have no memory; sparse ones hold others.
        return storage_bytes(t for t in tensors if not issubclass(type(t), FakeTensor) and t.layout is torch.strided)

    advance(trainer, PeakMeter.NUM_NOTED + 1)
    first = live()
    advance(trainer, PeakMeter.NUM_NOTED + 3)
    assert live() <= first + KIB
