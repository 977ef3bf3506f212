"""Whether a state is one of this network and optimizer: each rule by itself, since a file's checksums come before them."""

import math

import pytest
import torch
from torch import nn

from bln_train.train.check_state import check_counts, check_optimizer, check_rng, check_sums, check_tensors

COUNTS = {"micro_batch_size": 1, "asked_micro_batch_size": 1, "skipped": [0, 0]}


def counts(changes):
    check_counts(COUNTS | changes)


def make_optimizer(kind):
    """An optimizer with state over two parameters."""
    model = nn.Linear(3, 2)
    given = {"lr": 0.1, "momentum": 0.9} if kind is torch.optim.SGD else {"lr": 0.1}
    optimizer = kind(model.parameters(), **given)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return optimizer


def changed(path, value):
    """Put `value` into a nested state at `path`."""

    def change(state):
        *way, last = path
        for key in way:
            state = state[key]
        state[last] = value

    return change


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (torch.optim.SGD, changed(["state"], [1]), "no state dict"),
        (torch.optim.SGD, changed(["param_groups"], []), "other parameter groups"),
        (torch.optim.SGD, changed(["param_groups", 0], 3), "other parameters"),
        (torch.optim.SGD, changed(["param_groups", 0, "params"], [1, 0]), "other parameters"),
        (torch.optim.SGD, changed(["param_groups", 0, "momentum"], 0.5), "another momentum"),
        (torch.optim.SGD, changed(["param_groups", 0, "weight_decay"], math.nan), "another weight_decay"),
        (torch.optim.Adam, changed(["param_groups", 0, "betas"], (0.9, 0.99)), "another betas"),
        (torch.optim.SGD, changed(["state", 2], {}), "a state of no parameter"),
        (torch.optim.SGD, changed(["state", "0"], {}), "a state of no parameter"),
        (torch.optim.SGD, changed(["state", 0], []), "a state of no parameter"),
        (torch.optim.SGD, changed(["state", 0, "momentum_buffer"], 1.0), "not a tensor"),
        (torch.optim.SGD, changed(["state", 0, "momentum_buffer"], torch.ones(2, 3, dtype=torch.half)), "float16"),
        (torch.optim.SGD, changed(["state", 0, "momentum_buffer"], torch.ones(3, 2)), r"\(3, 2\)"),
        (torch.optim.SGD, changed(["state", 0, "momentum_buffer"], torch.eye(2, 3).to_sparse()), "not a tensor"),
        (torch.optim.SGD, changed(["state", 0, "momentum_buffer"], torch.ones(2, 3, device="meta")), "not a tensor"),
        (torch.optim.Adam, changed(["state", 0, "step"], torch.tensor(math.nan)), "not a count"),
        (torch.optim.Adam, changed(["state", 0, "step"], torch.tensor(-1.0)), "not a count"),
        (torch.optim.Adam, changed(["state", 0, "step"], torch.ones(2)), "not a count"),
    ],
)
def test_an_optimizer_of_another_kind_is_refused(kind, change, message):
    optimizer = make_optimizer(kind)
    state = optimizer.state_dict()
    check_optimizer(optimizer, state)
    state["param_groups"][0]["lr"] = 0.05  # the schedule's
    check_optimizer(optimizer, state)
    change(state)
    with pytest.raises(ValueError, match=message):
        check_optimizer(optimizer, state)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "no state dict"),
        ({"a": torch.ones(2)}, "lacks b"),
        ({"a": torch.ones(2), "b": torch.ones(1), "c": torch.ones(1)}, "too much: c"),
        ({"a": torch.ones(3), "b": torch.ones(1)}, r"\(3,\)"),
        ({"a": torch.ones(2).double(), "b": torch.ones(1)}, "float64"),
        ({"a": torch.eye(2, 3).to_sparse(), "b": torch.ones(1)}, "not a tensor"),
        ({"a": [1.0, 1.0], "b": torch.ones(1)}, "not a tensor"),
    ],
)
def test_tensors_of_another_network_are_refused(given, message):
    own = {"a": torch.ones(2), "b": torch.ones(1)}
    check_tensors(own, {"a": torch.zeros(2), "b": torch.zeros(1)})
    with pytest.raises(ValueError, match=message):
        check_tensors(own, given)


@pytest.mark.parametrize(
    ("check", "given", "message"),
    [
        (lambda sums: check_sums(sums, 10), {"images": 11}, "not those of one"),
        (lambda sums: check_sums(sums, 10), {"images": 5, "correct": 6}, "not those of one"),
        (lambda sums: check_sums(sums, 10), {"images": 5, "correct": -1}, "not those of one"),
        (lambda sums: check_sums(sums, 10), {"timed_seconds": -1.0}, "not those of one"),
        (lambda sums: check_sums(sums, 10), {"loss": math.inf}, "no numbers"),
        (counts, {"micro_batch_size": 0}, "not one of 1 to 1"),
        (
            lambda counts: check_counts({**COUNTS, **counts}),
            {"micro_batch_size": 4, "asked_micro_batch_size": 2},
            "not one of 1 to 2",
        ),
        (counts, {"micro_batch_size": True}, "not a count"),
        (counts, {"skipped": [1]}, "not two"),
        (counts, {"skipped": [-1, 0]}, "not a count"),
        (lambda rng: check_rng(torch.get_rng_state(), rng), torch.zeros(3, dtype=torch.uint8), r"\(3,\)"),
        (lambda rng: check_rng(torch.get_rng_state(), rng), torch.get_rng_state().float(), "float32"),
    ],
)
def test_numbers_that_cannot_be_are_refused(check, given, message):
    with pytest.raises(ValueError, match=message):
        check(given)
