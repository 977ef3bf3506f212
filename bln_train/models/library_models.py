"""Classification networks of torchvision and timm with the recipe's norm in place of BatchNorm, fresh or from trained weights."""

from __future__ import annotations

import difflib
import http.client
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

from bln_train.errors import CheckpointError, UsageError
from bln_train.models.layers import NormFactory
from bln_train.models.names import TIMM, TORCHVISION
from bln_train.models.pretrained import batchnorm_like, check_groups, listed, load_trained, trained_norm
from bln_train.norm.convert.layers import replace_batchnorms, with_activation_of
from bln_train.norm.dropout import keep_masks
from bln_train.norm.replace import replace_modules
from bln_train.norm.standardize import StandardizedConv2d, conv_like

PRETRAINED = "pretrained"
_HAVE_BATCHNORM = "resnet*, resnext*, densenet*, mobilenet_*, efficientnet_*, regnet_*, vgg*_bn and others"
_DOWNLOAD_TIMEOUT_SECONDS = 30.0
# Auxiliary heads return a second and third output in training; the names are theirs in trained files.
_WITHOUT_AUXILIARY = {"aux_logits": False, "init_weights": True}
_BUILD_ARGUMENTS: dict[str, dict[str, Any]] = {"googlenet": _WITHOUT_AUXILIARY, "inception_v3": _WITHOUT_AUXILIARY}
_AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}
_OLD_DENSENET_KEY = re.compile(r"^(.*denselayer\d+\.(?:norm|conv))\.([12]\..*)$")  # of torchvision's own files


def build_torchvision_model(name: str, num_classes: int, **settings: Any) -> tuple[nn.Module, list[str]]:
    """Build torchvision's `name` with each BatchNorm replaced; arguments, results and errors of `build_foreign_model`."""
    return build_foreign_model(TORCHVISION + name, num_classes, **settings)


def build_foreign_model(
    name: str,
    num_classes: int,
    *,
    norm: NormFactory,
    weight_standardization: bool = False,
    image_size: int = 224,
    init: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[nn.Module, list[str]]:
    """Build a network of torchvision or timm with each BatchNorm replaced by `norm`: (N, 3, S, S) to (N, num_classes) logits.

    Module names stay, but for an activation inside a BatchNorm of timm's, which follows the new norm (NormAct). Dropout and
    stochastic depth become those of `layers`, whose masks belong to the images; auxiliary heads are left out. A BatchNorm
    keeps the model's eps. Without a norm (Identity) a convolution whose output went straight into one gets a bias.

    Args:
        name: `torchvision:<name>` or `timm:<name>`.
        weight_standardization: replace convolutions with more than one weight per filter by StandardizedConv2d; not subclasses
            of nn.Conv2d, which do something else too.
        image_size: S; without weights or memory, the network is run once to see whether it takes such images.
        init: file with a state dict of the same network, with BatchNorm or migrated, or "pretrained" for the library's own; a
            BatchNorm stays as it was trained, a batchless layer computes the same function. A classifier for another number
            of classes is not taken from it.
        dtype: of the weights; with `init` the conversion is exact to its rounding.

    Returns: the network, and what the user should know about it.

    Raises:
        ValueError: the name is unknown, or the network has no BatchNorm, cannot take the images, or cannot have that norm.
        CheckpointError: the trained weights are missing, damaged or of another network.
        UsageError: timm is not installed.
    """
    model = original(name, num_classes, pretrained=init == PRETRAINED and name.startswith(TIMM)).to(dtype)
    own_eps = {old: old.eps for old in model.modules() if isinstance(old, _BatchNorm)}
    notices = list[str]()
    if init:
        notices, groups = _load(model, name, num_classes, init)
        check_groups(model, groups, norm)
    sources, positions = _trace(model, num_classes, image_size, dtype)

    def replace_norm(old: nn.Module) -> nn.Module:
        assert isinstance(old, _BatchNorm)
        if init:
            return trained_norm(old, norm, own_eps[old], dtype)
        new = norm(old.num_features, 0 if isinstance(old, nn.BatchNorm1d) else 2).to(dtype)
        if isinstance(new, _BatchNorm):
            return batchnorm_like(old, new, old.eps)
        if isinstance(new, nn.Identity) and old in sources and sources[old].bias is None:
            conv = sources[old]
            conv.bias = nn.Parameter(torch.zeros(conv.out_channels, dtype=dtype))
        elif isinstance(new, nn.InstanceNorm2d) and positions.get(old) == 1:
            raise ValueError(f"instance norm needs positions to average over, and {image_size} pixels leave only one")
        return with_activation_of(old, new)

    replace_batchnorms(model, replace_norm)
    keep_masks(model)
    if weight_standardization:
        replace_modules(model, nn.Conv2d, _standardized)
        kept = [
            key
            for key, m in model.named_modules()
            if type(m) not in (nn.Conv2d, StandardizedConv2d) and isinstance(m, nn.Conv2d)
        ]
        if kept:
            notices.append(f"{len(kept)} convolutions do more than convolve and are not standardised: {listed(kept)}.")
    return model, notices


def original(name: str, num_classes: int | None, *, pretrained: bool = False) -> nn.Module:
    """The library's own network, of drawn weights, or with `pretrained` of timm's; see `build_foreign_model`.

    Args:
        num_classes: None for the library's number.
    """
    own = name.partition(":")[2]
    if name.startswith(TIMM):
        model = _timm_model(own, num_classes, pretrained=pretrained)
    else:
        known = models.list_models(module=models)
        if own not in known:
            raise ValueError(f"torchvision has no such classification model; {_meant(own, known)}")
        size = {} if num_classes is None else {"num_classes": num_classes}
        model = models.get_model(own, weights=None, **size, **_BUILD_ARGUMENTS.get(own, {}))
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        found = sorted({type(m).__name__ for m in model.modules() if isinstance(m, nn.LayerNorm | nn.GroupNorm)})
        raise ValueError(
            f"it has no BatchNorm to replace (its norms: {', '.join(found) or 'none'}); {_HAVE_BATCHNORM} have"
        )
    return model


def pretrained_network(name: str) -> nn.Module:
    """The library's own network with its own weights, auxiliary heads left out; errors of `build_foreign_model`."""
    model = original(name, None, pretrained=name.startswith(TIMM))
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    _load(model, name, linears[-1].out_features, PRETRAINED)
    return model


def _meant(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"


def _timm_model(name: str, num_classes: int | None, *, pretrained: bool) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise UsageError(f"timm:{name} needs timm, which is not installed", "pip install 'bln-train[timm]'") from error
    if not timm.is_model(name):
        raise ValueError(f"timm has no such model; {_meant(name.partition('.')[0], timm.list_models())}")
    size: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if not pretrained:
        return timm.create_model(name, pretrained=False, **size)
    try:
        return timm.create_model(name, pretrained=True, **size)
    except Exception as error:  # the hub's client has errors of its own for every way a download can fail
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"timm cannot load its weights of {name}: {reason}",
            "Give a state dict file that you have instead.",
        ) from error


def _load(model: nn.Module, name: str, num_classes: int, init: str) -> tuple[list[str], dict[nn.Module, int]]:
    """Trained weights into the network with BatchNorm; see `load_trained`."""
    own = name.partition(":")[2]
    if name.startswith(TIMM):
        return ([], {}) if init == PRETRAINED else load_trained(model, Path(init).expanduser(), name, num_classes)
    notices, groups = load_trained(
        model,
        pretrained_file(own) if init == PRETRAINED else Path(init).expanduser(),
        f"torchvision's {own}",
        num_classes,
        rename=lambda key: _OLD_DENSENET_KEY.sub(r"\1\2", key),
        ignored=_AUXILIARY.get(own, ()),
    )
    if own in _AUXILIARY and init == PRETRAINED:
        notices.append(f"torchvision trained {own} on images in [-1, 1]: data.normalize=symmetric gives it those.")
    return notices, groups


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
    if type(conv) is not nn.Conv2d or conv.weight[0].numel() == 1:  # a filter of one weight has no variance
        return conv
    assert isinstance(conv.weight, nn.Parameter)
    return conv_like(conv, StandardizedConv2d, conv.weight)


def pretrained_file(name: str) -> Path:
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
            f"Put that file at {file}, or name a state dict that you have instead: --set model.init=PATH, or migrate PATH.",
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    return file
