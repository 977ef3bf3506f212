"""Classification networks of torchvision with the recipe's norm in place of BatchNorm, fresh or from trained weights."""

from __future__ import annotations

import difflib
import http.client
import itertools
import pickle
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision import models
from torchvision.ops import StochasticDepth

from bln_train.errors import CheckpointError
from bln_train.models.layers import InstanceDropout, InstanceStochasticDepth, NormFactory
from bln_train.norm.batchless import _BatchlessNorm
from bln_train.norm.convert import copy_batchnorm, replace_modules
from bln_train.norm.standardize import StandardizedConv2d

PRETRAINED = "pretrained"
_HAVE_BATCHNORM = "resnet*, resnext*, densenet*, mobilenet_*, efficientnet_*, regnet_*, vgg*_bn and others"
_DOWNLOAD_TIMEOUT_SECONDS = 30.0
_MAX_LISTED = 5
# Auxiliary heads return a second and third output in training; the names are theirs in trained files.
_WITHOUT_AUXILIARY = {"aux_logits": False, "init_weights": True}
_BUILD_ARGUMENTS: dict[str, dict[str, Any]] = {"googlenet": _WITHOUT_AUXILIARY, "inception_v3": _WITHOUT_AUXILIARY}
_AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}
_OLD_DENSENET_KEY = re.compile(r"^(.*denselayer\d+\.(?:norm|conv))\.([12]\..*)$")  # of torchvision's own files


def build_torchvision_model(
    name: str,
    num_classes: int,
    *,
    norm: NormFactory,
    weight_standardization: bool = False,
    image_size: int = 224,
    init: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[nn.Module, list[str]]:
    """Build torchvision's `name` with each BatchNorm replaced by `norm`: (N, 3, S, S) to (N, num_classes) logits.

    Module names stay. Dropout and stochastic depth become those of `layers`, whose masks belong to the images; auxiliary
    heads are left out. A BatchNorm keeps the model's eps. Without a norm (Identity) a convolution whose output went
    straight into one gets a bias.

    Args:
        weight_standardization: replace convolutions with more than one weight per filter by StandardizedConv2d.
        image_size: S; without weights or memory, the network is run once to see whether it takes such images.
        init: file with a state dict of the same network with BatchNorm, or "pretrained" for torchvision's own; a BatchNorm
            stays as it was trained, a batchless layer computes the same function. A classifier for another number of
            classes is not taken from it.
        dtype: of the weights; with `init` the conversion is exact to its rounding.

    Returns: the network, and what the user should know about it.

    Raises:
        ValueError: the name is unknown, or the network has no BatchNorm, cannot take the images, or cannot have that norm.
        CheckpointError: the trained weights are missing, damaged or of another network.
    """
    known = models.list_models(module=models)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        meant = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
        raise ValueError(f"torchvision has no such classification model; {meant}")
    model: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **_BUILD_ARGUMENTS.get(name, {}))
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        found = sorted({type(m).__name__ for m in model.modules() if isinstance(m, nn.LayerNorm | nn.GroupNorm)})
        raise ValueError(
            f"it has no BatchNorm to replace (its norms: {', '.join(found) or 'none'}); {_HAVE_BATCHNORM} have"
        )
    model = model.to(dtype)
    notices = _load_trained(model, name, num_classes, init) if init else []
    sources, positions = _trace(model, num_classes, image_size, dtype)

    def replace_norm(old: _BatchNorm) -> nn.Module:
        new = norm(old.num_features, 0 if isinstance(old, nn.BatchNorm1d) else 2).to(dtype)
        if isinstance(new, _BatchNorm):
            new.eps = old.eps
            new.load_state_dict(old.state_dict())
        elif isinstance(new, _BatchlessNorm) and init:
            _keep_function(old, new)
        elif init:
            raise ValueError(f"{type(new).__name__} would throw the trained statistics away; use batchless or batch")
        elif isinstance(new, nn.Identity) and old in sources and sources[old].bias is None:
            conv = sources[old]
            conv.bias = nn.Parameter(torch.zeros(conv.out_channels, dtype=dtype))
        elif isinstance(new, nn.InstanceNorm2d) and positions.get(old) == 1:
            raise ValueError(f"instance norm needs positions to average over, and {image_size} pixels leave only one")
        return new

    purposes = itertools.count(100)
    replace_modules(model, _BatchNorm, replace_norm)
    replace_modules(model, nn.Dropout, lambda old: InstanceDropout(old.p, next(purposes)))
    replace_modules(model, StochasticDepth, lambda old: InstanceStochasticDepth(old.p, next(purposes)))
    if weight_standardization:
        replace_modules(model, nn.Conv2d, _standardized)
    return model, notices


def _trace(
    model: nn.Module, num_classes: int, image_size: int, dtype: torch.dtype
) -> tuple[dict[nn.Module, nn.Conv2d], dict[nn.Module, int]]:
    """Run the network once on shapes alone; returns the convolution straight before each norm, and each norm's positions.

    Raises ValueError if it cannot take images of that size.
    """
    last: list[tuple[Tensor, nn.Conv2d]] = []
    sources: dict[nn.Module, nn.Conv2d] = {}
    positions: dict[nn.Module, int] = {}

    def note_output(conv: nn.Module, _: Any, output: Tensor) -> None:
        assert isinstance(conv, nn.Conv2d)
        last[:] = [(output, conv)]

    def note_input(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        if last and last[0][0] is args[0]:
            sources[norm] = last[0][1]
        positions[norm] = args[0][0, 0].numel()

    hooks = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(note_output))
        elif isinstance(module, _BatchNorm):
            hooks.append(module.register_forward_pre_hook(note_input))
    shapes = {key: tensor.to("meta") for key, tensor in (*model.named_parameters(), *model.named_buffers())}
    images = torch.empty(1, 3, image_size, image_size, dtype=dtype, device="meta")
    model.eval()
    try:
        with torch.no_grad():
            logits = torch.func.functional_call(model, shapes, (images,))
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"it cannot take images of {image_size}x{image_size} pixels: {reason}") from error
    finally:
        model.train()
        for hook in hooks:
            hook.remove()
    assert isinstance(logits, Tensor)
    assert logits.shape == (1, num_classes)
    return sources, positions


def _standardized(conv: nn.Conv2d) -> nn.Conv2d:
    if conv.weight[0].numel() == 1:  # a filter of one weight has no variance
        return conv
    assert isinstance(conv.padding, str | tuple)
    new = StandardizedConv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]  # torch's tuples have no length
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        conv.groups,
        conv.bias is not None,
        conv.padding_mode,
    )
    new.weight, new.bias = conv.weight, conv.bias
    return new


def _keep_function(old: _BatchNorm, new: _BatchlessNorm) -> None:
    """Give a batchless layer a trained BatchNorm's function, or say with which settings it has none."""
    if new.share == "layer":
        raise ValueError("norm.share: a trained BatchNorm has a mean and standard deviation per channel; use channel")
    assert old.running_var is not None
    smallest = float((old.running_var + old.eps).sqrt().min())
    if smallest < new.eps:
        raise ValueError(f"norm.eps is {new.eps:g}, above a trained standard deviation, {smallest:.3g}; lower it")
    copy_batchnorm(old, new)


def _load_trained(model: nn.Module, name: str, num_classes: int, init: str) -> list[str]:
    """Copy trained weights into the network with BatchNorm, all or none; see `build_torchvision_model`."""
    file = _pretrained_file(name) if init == PRETRAINED else Path(init).expanduser()
    given, own = _read_state(file), model.state_dict()
    given = {_OLD_DENSENET_KEY.sub(r"\1\2", key): tensor for key, tensor in given.items()}
    given = {key: tensor for key, tensor in given.items() if not key.startswith(_AUXILIARY.get(name, ()))}
    head, notices = _head(model, num_classes), []
    found, wanted = given.get(f"{head}.weight"), own[f"{head}.weight"]
    if found is not None and found.dim() == 2 and found.shape[0] != num_classes and found.shape[1] == wanted.shape[1]:
        notices.append(
            f"{file.name} has a classifier for {len(found)} classes, the data have {num_classes}: `{head}` starts afresh."
        )
        for key in (f"{head}.weight", f"{head}.bias"):
            given.pop(key, None)
            own.pop(key, None)
    _check_fit(given, own, file, name)
    try:
        for key, tensor in given.items():
            own[key].copy_(tensor)  # own shares its memory with the network
    except RuntimeError as error:  # sparse, or without data
        raise CheckpointError(f"{file}: {key} cannot be copied: {error}") from error
    if name in _AUXILIARY and init == PRETRAINED:
        notices.append(f"torchvision trained {name} on images in [-1, 1]: data.normalize=symmetric gives it those.")
    return notices


def _head(model: nn.Module, num_classes: int) -> str:
    """Name of the final classifier: the last linear layer."""
    head, linear = [(key, module) for key, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    assert linear.out_features == num_classes
    return head


def _check_fit(given: dict[str, Tensor], own: dict[str, Tensor], file: Path, name: str) -> None:
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
    problems = [f"{kind}: {_listed(keys)}" for kind, keys in kinds.items() if keys]
    if problems:
        raise CheckpointError(
            f"{file} does not fit torchvision's {name}; " + "; ".join(problems),
            f"model.init takes the state dict of a {name} with BatchNorm.",
        )


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - _MAX_LISTED} more" if len(keys) > _MAX_LISTED else ""
    return ", ".join(keys[:_MAX_LISTED]) + more


def _read_state(file: Path) -> dict[str, Tensor]:
    """Read a state dict, also one under `model` or `state_dict`, by torch's weights-only unpickler, which executes nothing."""
    if not file.is_file():
        raise CheckpointError(f"model.init: no file at {file}", "Give a state dict (.pt, .pth) that exists.")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file ends in whatever error its damage leads to
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, pickle.UnpicklingError):
            reason = "it holds something other than tensors and plain containers, or none at all"
        raise CheckpointError(f"model.init: {file} cannot be read as a state dict: {reason}") from error
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise CheckpointError(f"model.init: {file} holds no state dict", "It is a dict from names to tensors.")
    return {str(key).removeprefix("module."): tensor for key, tensor in state.items()}  # of DataParallel


def _pretrained_file(name: str) -> Path:
    """Torchvision's default weights in torch.hub's folder, downloaded if they are not there."""
    url: str = models.get_model_weights(name).DEFAULT.url
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if file.is_file():
        return file
    checksum = re.search(r"-([a-f0-9]+)\.", file.name)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT_SECONDS)
    download: Callable[..., None] = torch.hub.download_url_to_file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        download(url, str(file), hash_prefix=checksum[1] if checksum else None, progress=sys.stderr.isatty())
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise CheckpointError(
            f"cannot download torchvision's weights of {name} from {url}: {error}",
            f"Put that file at {file}, or give a state dict that you have: --set model.init=PATH.",
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    return file
