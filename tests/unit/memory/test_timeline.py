"""Live bytes through one step: the measured peak and its split, phases in order, no more points for larger batches."""

import pytest
import torch
from helpers import advance, tiny_recipe

from bln_train.build.experiment import build_experiment
from bln_train.memory.timeline import TimelineTracker
from bln_train.memory.tracker import storage_bytes
from bln_train.records import MemoryRecord, TimelineRecord, record_from_dict, record_to_dict

KIB = 1024
KINDS = ("parameter", "gradient", "optimizer", "activation", "other")


def recorded(**changes):
    """The peak and the timeline that a trainer yields after its second step."""
    trainer = build_experiment(tiny_recipe(train__precision="fp32", **changes)).trainer
    records = []
    for record in trainer.steps():
        records.append(record)
        if trainer.num_steps_done == 3:
            break
    (timeline,) = [r for r in records if isinstance(r, TimelineRecord)]
    return next(r for r in records if isinstance(r, MemoryRecord)), timeline, trainer


def totals(timeline):
    return [sum(values) for values in zip(*(getattr(timeline, f"{kind}_bytes") for kind in KINDS), strict=True)]


def test_tracker_writes_down_when_storages_came_and_went():
    """A point for each operator; what Python drops between two is gone at the second, what an operator frees is not in it."""
    base = torch.zeros(256)  # 1 KiB of float32
    tracker = TimelineTracker([base], torch.device("cpu"))
    with tracker:
        tracker.enter("forward")
        a = base + 1
        b = a + 1
        tracker.enter("optimizer")
        del a
        c = b + 1
        del b
        c += 1
    timeline = tracker.timeline({"parameter": tracker.births([base])})
    assert timeline.phases == ["forward", "optimizer"]
    assert timeline.num_points == [3, 2]
    assert timeline.live["parameter"] == [KIB] * 5
    assert timeline.live["activation"] == [0, KIB, 2 * KIB, 2 * KIB, KIB]


@pytest.mark.parametrize("micro", [1, 5, 8, 16])
@pytest.mark.parametrize("norm", ["batchless", "group"])
def test_timeline_has_the_measured_peak_and_its_split(norm, micro):
    """Its largest sum is the peak of the memory record, with the same parts; phases are those of the step, in order."""
    norm = {"name": norm, **({"probe_images": 4, "init_images": 4} if norm == "batchless" else {})}
    memory, timeline, trainer = recorded(norm=norm, train__micro_batch_size=micro)
    live = totals(timeline)
    assert max(live) == memory.peak_bytes
    at = live.index(max(live))
    assert [getattr(timeline, f"{kind}_bytes")[at] for kind in KINDS] == [
        getattr(memory, f"{kind}_bytes") for kind in KINDS
    ]
    one = ["forward", "backward"]
    number = {1: 16, 5: 4, 8: 2, 16: 1}[micro]
    between = ["between"] if number > 2 else []
    assert timeline.num_micro_steps == number
    assert timeline.phases == [
        *one, *between, *(one if number > 1 else []), "optimizer", *(["probe"] if norm["name"] == "batchless" else []),
    ]  # fmt: skip
    assert sum(timeline.num_points) == len(live)
    assert timeline.gradient_bytes[0] == 0
    if norm["name"] == "batchless":
        assert timeline.gradient_bytes[-1] == 0
    parameters = storage_bytes(trainer.accumulation.model.parameters())
    assert set(timeline.parameter_bytes) == {parameters}
    assert max(timeline.gradient_bytes) >= parameters - storage_bytes(
        trainer.accumulation.statistics.natural_parameters
    )


def test_timeline_is_as_short_for_any_effective_batch():
    """Points do not grow with the number of micro-steps, nor does what the tracker keeps."""
    norm = {"name": "batchless", "probe_images": 4, "init_images": 4}
    lengths = []
    for effective in (8, 32):
        _, timeline, _ = recorded(
            data__num_train=3 * effective,
            norm=norm,
            train__micro_batch_size=1,
            train__effective_batch_size=effective,
        )
        lengths.append(len(timeline.parameter_bytes))
        assert timeline.num_points[2] == 1
    assert lengths[0] == lengths[1]


def test_record_survives_the_log():
    """What is read back from JSON equals what was written."""
    import json

    _, timeline, _ = recorded(train__micro_batch_size=16)
    assert record_from_dict(json.loads(json.dumps(record_to_dict(timeline)))) == timeline


def test_gradients_in_the_momentum_are_optimizer_bytes():
    """With accumulate_into: momentum, weights' gradients are their momentum and count once."""
    optimizer = {"name": "sgd", "lr": 0.1, "accumulate_into": "momentum"}
    memory, timeline, _ = recorded(optimizer=optimizer)
    assert max(totals(timeline)) == memory.peak_bytes
    assert max(timeline.gradient_bytes) < 0.2 * max(timeline.optimizer_bytes)


def test_layers_hold_what_the_batch_showed():
    """At the last step of an epoch: moments as an unfolded network observes them on the same batch, learned values as they are."""
    norm = {"name": "batchless", "probe_images": 0, "init_images": 10, "fold": False}
    recipe = tiny_recipe(norm=norm, train__effective_batch_size=40, train__micro_batch_size=7, data__augment={})
    trainer = build_experiment(recipe).trainer
    step = trainer.accumulation
    learned, seen = {}, {}
    for name, layer in step.statistics.layers.items():
        learned[name] = layer.mean.detach().clone(), layer.std.detach().clone()
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0].detach()))
    record = advance(trainer, 1)[0]
    assert record.layers is not None
    assert record.layers.keys() == learned.keys()
    for name, found in record.layers.items():
        x = torch.cat(seen[name])
        mean, std = learned[name]
        offset, ratio = (x.mean((0, 2, 3)) - mean) / std, x.std((0, 2, 3), correction=0) / std
        assert found.offset_rms == pytest.approx(float(offset.square().mean().sqrt()), rel=1e-9)
        expected = float(ratio.min()), float(ratio.log().mean().exp()), float(ratio.max())
        assert (found.ratio_low, found.ratio_mean, found.ratio_high) == pytest.approx(expected, rel=1e-7)
        mean, std = (x.detach() for x in (step.statistics.layers[name].mean, step.statistics.layers[name].std))
        assert (found.std_low, found.std_high) == (float(std.min()), float(std.max()))
        assert (found.mean_low, found.mean_high) == (float(mean.min()), float(mean.max()))
        assert (found.num_channels, found.num_dead, found.num_at_floor) == (len(mean), 0, 0)


def test_layers_count_dead_channels():
    """A filter of zeros gives a channel whose inputs do not vary."""
    trainer = build_experiment(tiny_recipe(norm={"name": "batchless", "probe_images": 0})).trainer
    name, layer = next(iter(trainer.accumulation.statistics.layers.items()))
    records = advance(trainer, 2)
    assert all(r.layers is None for r in records[:2])
    layer.second_moment[3] = 1e-9
    from bln_train.train.health import layer_records

    assert layer_records({name: layer})[name].num_dead == 1
