"""A training loop of somebody's own: the right one is silent, and each wrong one is told what it lacks (docstrings are laws)."""

import contextlib
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bln_train.norm import (
    BatchlessNorm2d,
    BatchlessStatistics,
    convert_batchnorm,
    fold_once,
    folded_layers,
    fuse,
    initialize_statistics,
)

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 3 + 1
LABELS = torch.arange(8) % 4


class Net(nn.Module):
    """Two norms, and what comes `between` the first and the second."""

    def __init__(self, between=nn.Identity, **settings):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3), BatchlessNorm2d(8, **settings), nn.ReLU(), between(),
            nn.Conv2d(8, 8, 3), BatchlessNorm2d(8, **settings), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


class Loop:
    """The right loop, in parts; a wrong one leaves some out or has others."""

    def __init__(self, *, initialize=True, fused=False, net=None):
        torch.manual_seed(0)
        self.net = Net() if net is None else net
        if initialize:
            initialize_statistics(self.net, lambda: IMAGES[:4].split(2))
        if fused:
            fuse(self.net)
        self.net.train()
        self.statistics = BatchlessStatistics(self.net)
        natural = set(self.statistics.natural_parameters)
        self.optimizer = torch.optim.SGD([p for p in self.net.parameters() if p not in natural], lr=0.05)

    def loss(self, part=slice(None), reduction="sum"):
        return F.cross_entropy(self.net(IMAGES[part]), LABELS[part], reduction=reduction)

    def backwards(self, num=8, size=2, weight=1 / 8):
        with fold_once(folded_layers(self.net)):
            for start in range(0, num, size):
                ((self.loss(slice(start, min(start + size, num))) + self.statistics.nll()) * weight).backward()

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()

    def follow(self, num=4):
        self.statistics.follow(lambda: self.net(IMAGES[:num]))

    def take(self, size=2):
        self.statistics.begin(8, 4)
        self.backwards(size=size)
        self.statistics.update(8)
        self.step()
        self.follow()


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_the_right_loop_is_silent(fused, size):
    """With evaluations, forwards without gradients and inspections between, a short last batch, one given up, a scaled loss."""
    loop = Loop(fused=fused)
    statistics = loop.statistics
    for _ in range(3):
        loop.loss().backward()  # somebody looks at gradients before the batch
        loop.step()
        statistics.begin(8, 4)
        loop.backwards(4, size=min(size, 2))
        loop.net.eval()
        loop.loss()
        loop.net.train()
        with torch.no_grad():
            loop.loss()
        with fold_once(folded_layers(loop.net)):
            ((loop.loss(slice(4, 8)) + statistics.nll()) / 8).backward()
        statistics.update(8)
        loop.step()
        loop.follow()
    statistics.begin(3, 4)
    loop.backwards(3, size=size, weight=1 / 3)
    statistics.update(3)
    loop.step()
    loop.follow(3)
    statistics.begin(8, 4)
    loop.backwards(4)
    statistics.discard()
    loop.optimizer.zero_grad()
    loop.take(size)
    scaled = Loop(fused=fused)
    scaled.statistics.begin(8)
    scaled.backwards(weight=65536 / 8)
    for p in scaled.net.parameters():
        p.grad /= 65536
    scaled.statistics.update(8)


def test_the_right_loops_without_correction_or_with_frozen_statistics_are_silent():
    """Without a correction one backward may be of several forwards; frozen statistics need no calls at all."""
    loop = Loop(net=Net(correction_rate=0.0))
    loop.statistics.begin(8)
    losses = [loop.loss(part) + loop.statistics.nll() for part in (slice(0, 4), slice(4, 8))]
    (sum(losses) / 8).backward()
    loop.statistics.update(8)
    loop = Loop()
    for norm in loop.statistics.layers.values():
        norm.mean.requires_grad_(False)
        norm.raw_std.requires_grad_(False)
    for _ in range(3):
        loop.loss().backward()
        loop.step()


def test_evaluations_between_change_nothing():
    """The same weights and statistics with and without eval forwards between a batch's micro-batches."""
    ends = []
    for evaluates in (False, True):
        loop = Loop()
        loop.statistics.begin(8, 4)
        for start in range(0, 8, 2):
            ((loop.loss(slice(start, start + 2)) + loop.statistics.nll()) / 8).backward()
            if evaluates:
                loop.net.eval()
                loop.loss()
                loop.net.train()
        loop.statistics.update(8)
        loop.step()
        loop.follow()
        ends.append(loop.net.state_dict())
    assert all(torch.equal(one, ends[1][name]) for name, one in ends[0].items())


def ordinary(loop):
    for _ in range(2):
        loop.loss().backward()
        loop.step()


def no_begin(loop):
    loop.backwards()
    loop.statistics.update(8)


def no_begin_no_update(loop):
    for _ in range(2):
        loop.backwards()
        loop.step()


def no_update(loop):
    for _ in range(2):
        loop.statistics.begin(8, 4)
        loop.backwards()
        loop.step()


def no_update_but_follow(loop):
    loop.statistics.begin(8, 4)
    loop.backwards()
    loop.step()
    loop.follow()


def begin_for_each_micro_batch(loop):
    for start in range(0, 8, 2):
        loop.statistics.begin(8)
        ((loop.loss(slice(start, start + 2)) + loop.statistics.nll()) / 8).backward()


def weighted(weight):
    def run(loop):
        loop.statistics.begin(8)
        loop.backwards(weight=weight)
        loop.statistics.update(8)

    return run


def still_scaled(loop):
    loop.statistics.begin(8)
    loop.backwards(weight=65536 / 8)
    loop.statistics.update(8)


def four_of_eight(loop):
    loop.statistics.begin(8)
    loop.backwards(4)
    loop.statistics.update(8)


def eight_of_four(loop):
    loop.statistics.begin(4)
    loop.backwards(8, weight=1 / 4)
    loop.statistics.update(4)


def other_number(loop):
    loop.statistics.begin(8)
    loop.backwards()
    loop.statistics.update(4)


def no_nll(loop):
    loop.statistics.begin(8)
    (loop.loss() / 8).backward()
    loop.statistics.update(8)


def no_backward(loop):
    loop.statistics.begin(8)
    loop.loss() + loop.statistics.nll()
    loop.statistics.update(8)


def one_backward(loop):
    loop.statistics.begin(8)
    losses = [loop.loss(slice(start, start + 2)) + loop.statistics.nll() for start in range(0, 8, 2)]
    (sum(losses) / 8).backward()


def two_backwards(loop):
    loop.statistics.begin(8)
    loss = (loop.loss() + loop.statistics.nll()) / 8
    loss.backward(retain_graph=True)
    loss.backward()


def update_after_step(loop):
    loop.statistics.begin(8)
    loop.backwards()
    loop.optimizer.step()
    loop.statistics.update(8)


def update_after_zero_grad(loop):
    loop.statistics.begin(8)
    loop.backwards()
    loop.net.zero_grad()
    loop.statistics.update(8)


def update_twice(loop):
    loop.take()
    loop.statistics.update(8)


def follow_others(num):
    def run(loop):
        loop.statistics.begin(8, 4)
        loop.backwards()
        loop.statistics.update(8)
        loop.step()
        loop.follow(num)

    return run


def follow_in_eval(loop):
    loop.statistics.begin(8, 4)
    loop.backwards()
    loop.statistics.update(8)
    loop.net.eval()
    loop.follow()


WRONG = {
    "an ordinary loop": (ordinary, r"weights moved since .* begin\(N\), nll\(\) in the loss, update\(N\)"),
    "no begin": (no_begin, r"begin\(8\) was not called before the forwards"),
    "no begin, no update": (no_begin_no_update, r"call update\(N\) before the optimizer's step"),
    "no update": (no_update, r"update\(8\) was not called for the effective batch before"),
    "no update, but follow": (no_update_but_follow, r"update\(8\) was not called before follow"),
    "begin for each micro-batch": (begin_for_each_micro_batch, r"update\(8\) was not called.* call discard\(\)"),
    "loss not divided": (weighted(1.0), "has a weight of 1 in the loss, not of 1/8"),
    "loss divided by the micro-batch": (weighted(1 / 2), "has a weight of 0.5 in the loss, not of 1/8"),
    "loss divided by another number": (weighted(1 / 24), "has a weight of 0.0417 in the loss, not of 1/8"),
    "loss scale left in": (still_scaled, "scaled by 65536: divide them by the scale"),
    "four images of eight": (four_of_eight, r"between begin\(8\) and update\(8\) had 4 images"),
    "eight images of four": (eight_of_four, r"between begin\(4\) and update\(4\) had 8 images"),
    "another number": (other_number, r"update\(4\) after begin\(8\)"),
    "no nll": (no_nll, r"call nll\(\) after each training forward"),
    "no backward": (no_backward, r"1 forwards and 0 backwards: call backward\(\) before update"),
    "one backward of several forwards": (one_backward, r"call backward\(\) after each forward"),
    "two backwards of one forward": (two_backwards, r"backward\(\) ran twice through one forward"),
    "update after the step": (update_after_step, r"call update\(N\) before the optimizer's step"),
    "update after zero_grad": (update_after_zero_grad, r"call update\(N\) after the .* block and before zero_grad"),
    "update twice": (update_twice, r"begin\(8\) was not called"),
    "follow more images": (follow_others(8), r"follow\(\) ran on 8 images, and begin\(\) watched 4"),
    "follow fewer images": (follow_others(2), r"follow\(\) ran on 2 images, and begin\(\) watched 4"),
    "follow in eval mode": (follow_in_eval, r"call model.train\(\)"),
}


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_forgotten_is_named(wrong, fused):
    run, message = WRONG[wrong]
    with pytest.raises(RuntimeError, match=message):
        run(Loop(fused=fused))


def test_update_inside_fold_once_is_named():
    """There the gradients of a fused network's statistics are not theirs yet: nothing would move."""
    loop = Loop(fused=True)
    loop.statistics.begin(8)
    with fold_once(folded_layers(loop.net)):
        ((loop.loss() + loop.statistics.nll()) / 8).backward()
        with pytest.raises(RuntimeError, match="after the `with fold_once"):
            loop.statistics.update(8)


def test_after_an_error_the_batch_is_forgotten():
    """The next effective batch is an ordinary one, with the result of a loop that met no error."""
    ends = []
    for errs in (True, False):
        loop = Loop()
        if errs:
            with pytest.raises(RuntimeError):
                four_of_eight(loop)
            loop.optimizer.zero_grad()
        loop.take()
        ends.append(loop.net.state_dict())
    assert all(torch.equal(one, ends[1][name]) for name, one in ends[0].items())


def not_initialized():
    loop = Loop(initialize=False)
    for _ in range(2):
        loop.take()


def no_follow():
    loop = Loop()
    for _ in range(3):
        loop.statistics.begin(8, 4)
        loop.backwards()
        loop.statistics.update(8)
        loop.step()


class Functional(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5)


def draws():
    loop = Loop(net=Net(Functional))
    for _ in range(2):
        loop.take()


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (not_initialized, r"statistics of 2 norms \('features.1' first\) .* call initialize_statistics"),
        (no_follow, r"follow\(\) was not called after the last step"),
        (draws, r"drew random numbers before a norm.*InstanceDropout"),
    ],
)
def test_what_may_be_meant_is_a_warning_once(run, message):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run()
    assert len(seen) == 1
    with pytest.warns(UserWarning, match=message):
        run()


def test_random_numbers_after_the_last_norm_are_nobodys_business():
    loop = Loop()
    loop.net.head = nn.Sequential(Functional(), loop.net.head)
    loop.take()


def converted(between, **settings):
    """A network with BatchNorm and dropout, converted, in float64."""
    torch.manual_seed(0)
    net = Net(between)
    for n in (1, 5):
        net.features[n] = nn.BatchNorm2d(8)
    return convert_batchnorm(net, **settings).double()


@contextlib.contextmanager
def float64():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def stochastic_depth():
    return pytest.importorskip("torchvision.ops").StochasticDepth(0.5, "row")


def drop_path():
    return pytest.importorskip("timm.layers.drop").DropPath(0.5)


DROPS = {
    "dropout": lambda: nn.Dropout(0.5),
    "of channels": lambda: nn.Dropout2d(0.5),
    "stochastic depth": stochastic_depth,
    "timm's": drop_path,
    "used twice": lambda: (lambda drop: nn.Sequential(drop, drop))(nn.Dropout(0.3)),
}


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("drop", DROPS)
def test_dropout_of_a_converted_network_keeps_laws_1_and_2(drop, fused):
    """Weights and statistics after three steps do not depend on the split, and what `follow` sees has the masks of training."""
    ends = []
    with float64():
        for size in (1, 3, 8):
            net = converted(DROPS[drop])
            initialize_statistics(net, lambda: IMAGES.double().split(4))
            loop = Loop(net=net, initialize=False, fused=fused)
            loop.loss = lambda part, loop=loop: F.cross_entropy(
                loop.net(IMAGES[part].double()), LABELS[part], reduction="sum"
            )
            loop.follow = lambda loop=loop: loop.statistics.follow(lambda: loop.net(IMAGES[:4].double()))
            before = loop.net.state_dict()["features.5.mean"].clone()
            for _ in range(3):
                loop.take(size)
            ends.append(loop.net.state_dict())
            assert not torch.equal(before, ends[-1]["features.5.mean"])
    for end in ends[1:]:
        for name, one in ends[0].items():
            torch.testing.assert_close(end[name], one, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.filterwarnings("ignore:the statistics of")  # they are meant to stay
@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("drop", DROPS)
def test_without_a_step_the_probe_of_dropped_images_moves_nothing(drop, fused):
    """The same weights, statistics and masks on both sides; the masks of two batches differ."""
    with float64():
        net = converted(DROPS[drop], statistics_rate=1e-15)
        loop = Loop(net=net, initialize=False, fused=fused)
        before = {name: tensor.clone() for name, tensor in net.named_parameters()}
        outputs = []
        for _ in range(2):
            loop.statistics.begin(8, 4)
            for part in IMAGES.double().split(3):
                out = net(part)
                ((out.sum() + loop.statistics.nll()) / 8).backward()
            outputs.append(out.detach())
            loop.statistics.update(8)
            net.zero_grad()
            loop.statistics.follow(lambda: net(IMAGES[:4].double()))
    assert not torch.allclose(outputs[0], outputs[1])
    for name, tensor in net.named_parameters():
        torch.testing.assert_close(tensor, before[name], rtol=1e-12, atol=1e-12, msg=name)


DDP = """
import sys, torch, bln_train
import torch.distributed as dist
from torch import nn
rank, file = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + file, rank=rank, world_size=2)
net = nn.Sequential(nn.Conv2d(3, 4, 3), bln_train.BatchlessNorm2d(4), nn.ReLU())
statistics, shared = bln_train.BatchlessStatistics(net), nn.parallel.DistributedDataParallel(net)
try:
    bln_train.BatchlessStatistics(shared)
except ValueError as error:
    print(error)
statistics.begin(2)
try:
    shared(torch.randn(2, 3, 5, 5))
except RuntimeError as error:
    print(error)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_distributed_data_parallel_is_refused(tmp_path):
    """Two processes: the corrections and the probe would be each one's own, and the parameters drift apart."""
    command = [sys.executable, "-c", DDP]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    try:
        found = [rank.communicate(timeout=120)[0].splitlines() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    message = "DistributedDataParallel cannot share batchless statistics: train with `torchrun -m bln_train run`, or with Trainer"
    for lines in found:
        assert len(lines) == 2
        assert all(line.startswith(message) for line in lines)


def test_data_parallel_is_refused():
    """Its replicas' statistics would be lost; told by whichever call meets it first."""
    net = Net()
    with pytest.raises(ValueError, match="DataParallel cannot share"):
        BatchlessStatistics(nn.DataParallel(net))
    with pytest.raises(RuntimeError, match=r"nn\.DataParallel cannot share"):
        net.features[1]._replicate_for_data_parallel()
