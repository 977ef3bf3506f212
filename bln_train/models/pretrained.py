"""Trained weights from a file into a network with BatchNorm, all or none, and from there under the norm that is wanted."""

from __future__ import annotations

import math
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bln_train.errors import CheckpointError, UsageError
from bln_train.models.build import build_model, norm_factory
from bln_train.models.layers import NormFactory
from bln_train.norm.base import LikelihoodNorm
from bln_train.norm.batchless_channel import BatchlessChannelNorm
from bln_train.norm.convert.layers import (
    copy_batchnorm,
    copy_batchnorm_statistics,
    has_activation,
    is_batchnorm,
    replace_batchnorms,
    variance_from_std,
    with_activation_of,
)
from bln_train.norm.convert.state_dicts import NUM_GROUPS, batchless_layers, layers_with_groups, state_to_batch

_MAX_LISTED = 5
_OF_A_RUN = "bln_train_format"  # the key of runs/checkpoint.py


def build_trained_model(
    name: str,
    num_classes: int,
    *,
    norm: NormFactory,
    init: str,
    shortcut: str = "A",
    image_size: int = 32,
    dtype: torch.dtype = torch.float32,
) -> tuple[nn.Module, list[str]]:
    """A network of `models.build` with the weights of a file, and what the user should know; arguments of `load_trained`.

    Raises:
        ValueError: the network cannot be built so, or a trained layer has no form under that norm.
        CheckpointError: the trained weights are missing, damaged or of another network.
    """
    model = build_model(name, num_classes, norm=norm_factory("batch"), shortcut=shortcut, image_size=image_size)
    model = model.to(dtype)
    own_eps: dict[nn.Module, float] = {old: old.eps for old in model.modules() if isinstance(old, _BatchNorm)}
    notices, groups = load_trained(model, Path(init).expanduser(), name, num_classes)
    check_groups(model, groups, norm)
    replace_batchnorms(model, lambda old: trained_norm(old, norm, own_eps[old], dtype))
    return model, notices


def check_groups(model: nn.Module, groups: dict[nn.Module, int], norm: NormFactory) -> None:
    """Raise ValueError unless `norm` has behind each trained BatchNorm's statistics the groups of channels that were there."""
    for old in (module for module in model.modules() if isinstance(module, _BatchNorm)):
        number, new = groups.get(old, 0), norm(old.num_features, 2)
        found = new[1].num_groups if isinstance(new, BatchlessChannelNorm) else 0
        if found != (math.gcd(number, old.num_features) if number else 0):
            raise ValueError(
                f"its trained norms have {number or 'no'} groups of channels behind them; use norm.name=batchless and "
                f"norm.channel_groups={number}"
            )


def trained_norm(old: Any, norm: NormFactory, eps: float, dtype: torch.dtype) -> nn.Module:
    """The norm in place of a trained BatchNorm, with its function in eval mode.

    Args:
        old: as trained; its eps is 0 where its file was batchless. Where groups of channels were behind it, weight and bias are
            theirs; see `check_groups`.
        eps: of a BatchNorm in its place.

    Raises:
        ValueError: there is none with that function.
    """
    new: Any = norm(old.num_features, 0 if isinstance(old, nn.BatchNorm1d) else 2).to(dtype)
    if isinstance(new, BatchlessChannelNorm):
        copy_batchnorm_statistics(old, new.batchless)
        new[1].load_state_dict({key: getattr(old, key) for key in ("weight", "bias")})
    elif isinstance(new, LikelihoodNorm):
        copy_batchnorm(old, new)
    elif isinstance(new, _BatchNorm):
        if old.eps != eps:
            old.running_var.copy_(variance_from_std((old.running_var + old.eps).sqrt(), eps))
        return batchnorm_like(old, new, eps)
    else:
        raise ValueError(f"{type(new).__name__} would throw the trained statistics away; use batchless or batch")
    return with_activation_of(old, new)


def batchnorm_like(old: Any, new: Any, eps: float) -> nn.Module:
    """`old` with the momentum of `new`, or, where that is another class of BatchNorm, `new` with what `old` holds."""
    old.eps = new.eps = eps
    if type(new) in (nn.BatchNorm1d, nn.BatchNorm2d):
        old.momentum = new.momentum
        return old
    own = new.state_dict()
    new.load_state_dict({key: tensor for key, tensor in old.state_dict().items() if key in own})
    return with_activation_of(old, new)


def load_trained(
    model: nn.Module,
    file: Path,
    name: str,
    num_classes: int,
    rename: Callable[[str], str] = lambda key: key,
    ignored: tuple[str, ...] = (),
) -> tuple[list[str], dict[nn.Module, int]]:
    """Copy trained weights into a network with BatchNorm, all or none.

    Returns: what the user should know, and of each BatchNorm with groups of channels behind it their number.

    Where the file is batchless, a BatchNorm gets eps 0, with which it computes the same. A classifier for another number of
    classes is not taken.

    Args:
        file: a state dict of the same network with BatchNorm or, as `bln-train migrate` writes it, with batchless layers.
        name: of the network, for messages.
        rename: from a key of the file to the network's.
        ignored: beginnings of keys to leave out.

    Raises:
        CheckpointError: the trained weights are missing, damaged or of another network.
    """
    given = {rename(key): tensor for key, tensor in read_weights(file).items()}
    given = plain_names(given, model)
    given = {key: tensor for key, tensor in given.items() if not key.startswith(ignored)}
    norms = {key: module for key, module in model.named_modules() if is_batchnorm(module)}
    batchless = [key for key in batchless_layers(given) if key in norms]
    try:
        groups = {norms[key]: number for key, number in layers_with_groups(given).items() if key in norms}
        for key in batchless:
            given.pop(f"{key}.{NUM_GROUPS}", None)
        given, _ = state_to_batch(given, dict.fromkeys(batchless_layers(given), 0.0))
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    for key in batchless:
        norms[key].eps = sys.float_info.min  # nothing; PyTorch 2.11 refuses 0

    own, notices = model.state_dict(), []
    head = _head(model, num_classes)
    found, wanted = given.get(f"{head}.weight"), own[f"{head}.weight"]
    if found is not None and found.dim() == 2 and found.shape[0] != num_classes and found.shape[1] == wanted.shape[1]:
        notices.append(
            f"{file.name} has a classifier for {len(found)} classes, the data have {num_classes}: `{head}` starts afresh."
        )
        for key in (f"{head}.weight", f"{head}.bias"):
            given.pop(key, None)
            own.pop(key, None)
    check_fit(given, own, file, name)
    copy_weights(given, own, file)
    return notices, groups


def copy_weights(given: dict[str, Tensor], own: dict[str, Tensor], file: Path) -> None:
    """Copy what fits, see `check_fit`, into tensors that share their memory with a network."""
    try:
        for key, tensor in given.items():
            own[key].copy_(tensor)
    except RuntimeError as error:  # sparse, or without data
        raise CheckpointError(f"{file}: {key} cannot be copied: {error}") from error


def plain_names(given: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a run under the keys of the original network, which has no NormAct; see norm/convert/layers.py."""
    layers = [key for key, module in model.named_modules() if has_activation(module)]
    inside = {f"{key}.norm.": f"{key}." for key in layers}
    # With groups of channels the norm is itself of two parts.
    parts = inside | {f"{old}{part}.": f"{new}{part}." for old, new in inside.items() for part in (0, 1)}

    def plain(key: str) -> str:
        old = key.rpartition(".")[0] + "."
        return parts[old] + key.removeprefix(old) if old in parts else key

    return {plain(key): tensor for key, tensor in given.items()}


def _head(model: nn.Module, num_classes: int) -> str:
    """Name of the final classifier: the last linear layer."""
    head, linear = [(key, module) for key, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    assert linear.out_features == num_classes
    return head


def check_fit(given: dict[str, Tensor], own: dict[str, Tensor], file: Path, name: str) -> None:
    """Raise CheckpointError, with everything that is missing, unexpected, of another shape or not finite."""
    # Files of before torch 0.4.1 do not count the batches, and nothing of ours reads the count.
    missing = [key for key in own if key not in given and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in given if key not in own]
    shared = [key for key in given if key in own]
    shapes = [
        f"{key} {_describe(given[key])} for {_describe(own[key])}"
        for key in shared
        if given[key].shape != own[key].shape or given[key].is_floating_point() != own[key].is_floating_point()
    ]
    damaged = [
        key
        for key in shared
        if given[key].is_floating_point()
        and not (given[key].isfinite().all() and (given[key].min() >= 0 or not key.endswith("running_var")))
    ]
    kinds = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": shapes,
        "not finite, or a negative variance": damaged,
    }
    problems = [f"{kind}: {listed(keys)}" for kind, keys in kinds.items() if keys]
    if problems:
        raise CheckpointError(
            f"{file} does not fit {name}; " + "; ".join(problems),
            f"model.init takes the state dict of a {name} with BatchNorm.",
        )


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def listed(keys: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(keys) - _MAX_LISTED} more" if len(keys) > _MAX_LISTED else ""
    return ", ".join(keys[:_MAX_LISTED]) + more


def read_state_file(file: Path) -> dict[str, Any]:
    """What a .safetensors file or a file of torch.save holds; read by readers that build tensors and plain containers only.

    Raises:
        CheckpointError: there is no such file, or it is damaged or holds something else.
        UsageError: safetensors is not installed.
    """
    if not file.is_file():
        raise CheckpointError(f"no file at {file}", "Give a state dict (.pt, .pth, .safetensors) that exists.")
    try:
        if file.suffix == ".safetensors":
            state: Any = _safetensors().load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except UsageError:
        raise
    except Exception as error:  # a damaged file ends in whatever error its damage leads to
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, pickle.UnpicklingError):
            reason = "it holds something other than tensors and plain containers, or none at all"
        raise CheckpointError(f"{file} cannot be read as a state dict: {reason}") from error
    return state if isinstance(state, dict) else {}


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise UsageError(
            "safetensors is not installed, which .safetensors files need",
            "Install it: pip install 'bln-train[migrate]'",
        ) from error
    return safetensors.torch


def write_state(state: dict[str, Tensor], file: Path) -> None:
    """Write a state dict as its name's ending says: .safetensors, or else as torch.save does."""
    if file.suffix == ".safetensors":
        # Neither views nor shared memory are allowed there.
        tensors = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in state.items()}
        _safetensors().save_file(tensors, file, {"format": "pt"})
    else:
        torch.save(state, file)


def state_dict_in(content: dict[str, Any], file: Path) -> dict[str, Tensor]:
    """The state dict that a file's content is, or has under `model` or `state_dict`; raises CheckpointError for none."""
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), dict):
            content = content[key]
    if not content or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise CheckpointError(f"{file} holds no state dict", "It is a dict from names to tensors.")
    return {str(key).removeprefix("module."): tensor for key, tensor in content.items()}  # of DataParallel


def read_weights(file: Path) -> dict[str, Tensor]:
    """A state dict whose weights are what the network computes with, as `model.init` takes it.

    Raises:
        CheckpointError: it is none, or of a run whose recipe is needed to know what its weights stand for.
    """
    try:
        content = read_state_file(file)
        state = state_dict_in(content, file)
    except CheckpointError as error:
        raise CheckpointError(f"model.init: {error.problem}", error.hint) from error
    if _OF_A_RUN in content:
        standardized = re.search(r"^ *weight_standardization: true", str(content.get("recipe")), re.M)
        if batchless_layers(state) or standardized:
            raise CheckpointError(
                f"model.init: {file} is a run's checkpoint, whose weights stand for others (standardised, or another form of "
                "the standard deviation)",
                f"Make it a plain file first: bln-train migrate {file} -o trained.pt",
            )
    return state
