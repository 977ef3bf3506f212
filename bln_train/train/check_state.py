"""Whether a state from a file is one of this network and this optimizer, found out before any of it is taken."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# What a recipe says of an optimizer. Rates follow the schedule; the rest is how PyTorch computes.
_SETTINGS = ("peak_lr", "weight_decay", "momentum", "dampening", "nesterov", "betas", "eps")


def check_tensors(own: dict[str, Tensor], given: Any, what: str = "its network") -> None:
    """Raise ValueError unless `given` has tensors of the names, shapes and dtypes of `own`, and nothing else.

    `Module.load_state_dict` would turn any dtype into its own without a word.
    """
    if not isinstance(given, dict):
        raise ValueError(f"{what} is no state dict")
    for verb, names in (("lacks", own.keys() - given.keys()), ("has too much:", given.keys() - own.keys())):
        if names:
            raise ValueError(f"{what} {verb} {_few(names)}")
    for name, tensor in own.items():
        _check_tensor(name, given[name], tensor.shape, tensor.dtype)


def check_optimizer(optimizer: torch.optim.Optimizer, given: Any) -> None:
    """Raise ValueError unless `given` is a state of such an optimizer over such parameters, with the same settings."""
    own = optimizer.state_dict()
    if not isinstance(given, dict) or not isinstance(given.get("state"), dict):
        raise ValueError("its optimizer is no state dict")
    groups = given.get("param_groups")
    if not isinstance(groups, list) or len(groups) != len(own["param_groups"]):
        raise ValueError("its optimizer has other parameter groups")
    for old, new in zip(own["param_groups"], groups, strict=True):
        if not isinstance(new, dict) or new.get("params") != old["params"]:
            raise ValueError("its optimizer has other parameters")
        for key in _SETTINGS:
            if key in old and key in new and new[key] != old[key]:
                raise ValueError(f"its optimizer has another {key}")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, values in given["state"].items():
        if type(number) is not int or not 0 <= number < len(parameters) or not isinstance(values, dict):
            raise ValueError("its optimizer has a state of no parameter")
        parameter = parameters[number]
        for key, value in values.items():
            if key == "step":  # Adam's, a count in a tensor
                steps = value if isinstance(value, Tensor) and value.numel() == 1 else None
                if steps is None or not math.isfinite(float(steps)) or float(steps) < 0:
                    raise ValueError("its optimizer's step is not a count")
            elif value is not None:
                _check_tensor(f"optimizer state {key}", value, parameter.shape, parameter.dtype)


def check_numbers(what: str, values: Any) -> None:
    """Raise ValueError unless `values` is a dict of finite numbers."""
    if not isinstance(values, dict) or not all(type(v) in (int, float) and math.isfinite(v) for v in values.values()):
        raise ValueError(f"{what} are no numbers")


def check_sums(sums: Any, num_images: int) -> None:
    """Raise ValueError unless `sums` are the running sums of an epoch of `num_images` images."""
    check_numbers("its sums of the epoch", sums)
    images, correct = sums.get("images", 0), sums.get("correct", 0)
    if not 0 <= correct <= images <= num_images or sums.get("timed_seconds", 0) < 0:
        raise ValueError("its sums of the epoch are not those of one")


def check_counts(state: dict[str, Any]) -> None:
    """Raise ValueError unless micro-batches and skipped steps are counts that can be."""
    found, asked, skipped = state["micro_batch_size"], state["asked_micro_batch_size"], state["skipped"]
    if not isinstance(skipped, list) or len(skipped) != 2:
        raise ValueError("its counts of skipped steps are not two")
    if not all(type(count) is int and count >= 0 for count in (found, asked, *skipped)):
        raise ValueError("its micro-batch or its number of skipped steps is not a count")
    if not 1 <= found <= asked:
        raise ValueError(f"its micro-batch {found} is not one of 1 to {asked}, which was asked for")


def check_rng(own: Tensor, given: Any) -> None:
    """Raise ValueError unless `given` is a state of the generator whose state `own` is."""
    _check_tensor("the state of the random generator", given, own.shape, own.dtype)


def _check_tensor(name: str, value: Any, shape: torch.Size, dtype: torch.dtype) -> None:
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.device.type == "meta":
        raise ValueError(f"{name} is not a tensor")
    if value.shape != shape or value.dtype != dtype:
        raise ValueError(f"{name} is {tuple(value.shape)} {value.dtype}, not {tuple(shape)} {dtype}")


def _few(names: set[str]) -> str:
    shown = sorted(str(name)[:80] for name in names)
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")
