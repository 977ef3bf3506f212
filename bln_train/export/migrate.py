"""Trained weights from BatchNorm to Batchless Normalization and back, from a file, a run or a library into a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bln_train.build.first_statistics import calibration_sample
from bln_train.errors import BlnError, CheckpointError, RecipeError, UsageError
from bln_train.models.build import build_model, norm_factory
from bln_train.models.names import is_foreign
from bln_train.models.pretrained import (
    check_fit,
    copy_weights,
    listed,
    plain_names,
    read_state_file,
    state_dict_in,
    write_state,
)
from bln_train.norm.calibrate.initialize import initialize_statistics
from bln_train.norm.convert.layers import replace_batchnorms, to_batchless
from bln_train.norm.convert.state_dicts import (
    Change,
    batchless_layers,
    batchnorm_layers,
    groups_as_one_layer,
    layers_with_groups,
    state_to_batch,
    state_to_batchless,
)
from bln_train.norm.standardize import standardize_weight
from bln_train.paper.layer import std_from_raw
from bln_train.recipe.load import parse_recipe
from bln_train.recipe.norms import BatchlessNormSection
from bln_train.recipe.paper_norm import PaperNormSection
from bln_train.recipe.recipe import Recipe
from bln_train.runs.checkpoint import FORMAT_KEY, Found, find_checkpoint, load_checkpoint
from bln_train.runs.checkpoint_files import CHECKPOINT, has_checkpoint

DEFAULT_EPS = 1e-5
SUFFIXES = (".pt", ".pth", ".safetensors")


class LayerChange(NamedTuple):
    """A row of what was done."""

    layer: str
    before: str
    after: str
    num_channels: int
    smallest_std: float | None
    """Over channels, in units of the layer's input; None for a convolution."""
    largest_std: float | None


@dataclass(frozen=True)
class _Source:
    """Weights under the names of the original network, and what is known of it."""

    state: dict[str, Tensor]
    """Batchless layers as `norm.convert_state` has them."""
    network: nn.Module | None = None
    """The original network, with BatchNorm; its weights are of no importance."""
    changes: tuple[LayerChange, ...] = ()
    notices: tuple[str, ...] = ()
    """What has been done to come so far."""
    is_run: bool = False


def migrate(
    source: str,
    out: Path,
    *,
    to: str = "batchless",
    eps: float | None = None,
    calibrate: Recipe | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Write the weights of `source` to `out` with every norm converted; executes nothing from a file.

    Returns: what was written and each LayerChange, as a document.

    Args:
        source: a run folder or checkpoint of ours, a state dict file, `torchvision:<name>` or `timm:<name>`.
        out: .pt, .pth or .safetensors.
        to: "batchless": mean = running_mean, raw_std = log sqrt(running_var + eps); "batch": the inverse.
        eps: of the BatchNorm; default that of the network where it is known, else 1e-5.
        calibrate: a recipe with the network of a state dict whose BatchNorm kept no running statistics; they are taken from its
            first training images, as many as its norm.init_images.
        force: replace an existing file.

    Raises:
        UsageError: the arguments do not go together, or name what is not there.
        CheckpointError: the source cannot be read or does not fit its network.
        BlnError: layers that cannot be converted, all of them named. Nothing is written in any of these cases.
    """
    _check_out(out, force)
    if eps is not None and not 0 < eps < 1:
        raise UsageError(f"--eps: {eps:g} is not between 0 and 1", "PyTorch's default is 1e-5.")
    found = _read(source)
    if calibrate is not None:
        if to == "batch" or found.network is not None:
            raise UsageError("--calibrate is for a state dict that becomes batchless", "Leave it out.")
        found = _calibrated(source, found.state, calibrate, eps)
    try:
        groups = set(layers_with_groups(found.state).values())
    except ValueError as error:
        raise CheckpointError(f"{source} is damaged\n{error}") from error
    if to == "batch" and groups:
        raise BlnError(
            f"{source} has groups of channels behind its norms, which BatchNorm has not; nothing was written",
            "Run `bln-train export`, which writes the network for inference, or train with norm=batchless-plain.",
        )
    layers = batchnorm_layers(found.state) if to == "batchless" else batchless_layers(found.state)
    if not layers and not (found.is_run and to == "batchless"):  # a run is made a plain file all the same
        raise _nothing_to_do(source, found.state, to)
    layer_eps, notices = _eps_of(found.network, layers, eps)
    convert = state_to_batchless if to == "batchless" else state_to_batch
    try:
        state, done = convert(found.state, layer_eps)
    except ValueError as error:
        raise BlnError(f"{source} cannot be migrated; nothing was written\n{error}") from error
    if found.network is not None:
        original = found.network.state_dict()  # carries the versions of its modules, which some ask for
        original.clear()
        original.update(state)
        state = original
    _write(state, out)
    notices += [
        f"Its norms have {n} groups of channels behind them: go on with norm.channel_groups={n}." for n in groups
    ]
    if found.network is None and to == "batchless":
        notices += _scales_without_statistics(found.state, layers)
    changes = (*found.changes, *_rows(done, found.network, to))
    return {
        "source": source,
        "out": str(out),
        "to": to,
        "changes": [change._asdict() for change in changes],
        "notices": [*found.notices, *notices],
        "num_tensors": len(state),
    }


def _check_out(out: Path, force: bool) -> None:
    if out.suffix not in SUFFIXES:
        raise UsageError(f"{out}: the name must end in {', '.join(SUFFIXES)}", "Example: -o trained.pt")
    if out.is_dir() or not out.parent.is_dir():
        raise UsageError(f"{out} is a folder" if out.is_dir() else f"there is no folder {out.parent}")
    if out.exists() and not force:
        raise BlnError(f"{out} exists; nothing was written", "Give another name, or --force to replace it.")


def _read(source: str) -> _Source:
    if is_foreign(source):
        from bln_train.models.library_models import pretrained_network  # torchvision.models takes long to import

        try:
            network = pretrained_network(source)
        except ValueError as error:
            raise UsageError(f"{source}: {error}") from error
        return _Source(dict(network.state_dict()), network)
    path = Path(source).expanduser()
    if path.is_dir():
        if not has_checkpoint(path):
            raise CheckpointError(f"{source} is no run folder: it has no {CHECKPOINT}")
        return _from_run(find_checkpoint(path))
    if not path.exists():
        raise UsageError(
            f"{source} does not exist",
            "Give a run folder, a checkpoint, a state dict (.pt, .pth, .safetensors), torchvision:<name> or timm:<name>.",
        )
    content = read_state_file(path)
    if FORMAT_KEY in content:
        return _from_run(Found(path, load_checkpoint(path), []))
    return _Source(state_dict_in(content, path))


def _from_run(found: Found) -> _Source:
    """A checkpoint of ours: its recipe says what the weights stand for; here they come to stand for themselves."""
    file, content = found.file, found.state
    try:
        recipe = parse_recipe(str(content.get("recipe")), origin=f"{file} (recipe)")
    except RecipeError as error:
        raise CheckpointError(f"{file} carries a damaged recipe: {error.problem}") from error
    norm = recipe.norm
    if norm.name not in ("batch", "batch-frozen") and not isinstance(norm, BatchlessNormSection | PaperNormSection):
        raise BlnError(f"{file} is of a run with norm {norm.name}, which has no counterpart; nothing was written")
    state = state_dict_in(content, file)
    network = _network(recipe, state)
    state, changes = plain_names(state, network), list[LayerChange]()
    if recipe.weight_standardization:
        for name, module in network.named_modules():
            weight = state.get(f"{name}.weight") if type(module) is nn.Conv2d else None
            if weight is not None and weight[0].numel() > 1:
                state[f"{name}.weight"] = standardize_weight(weight.double()).to(weight.dtype)
                changes.append(LayerChange(name, "standardised Conv2d", "Conv2d", len(weight), None, None))
    if recipe.channel_groups:
        try:
            state = groups_as_one_layer(state, recipe.channel_groups)
        except ValueError as error:
            raise CheckpointError(f"{file} does not fit its recipe\n{error}") from error
    if isinstance(norm, BatchlessNormSection | PaperNormSection):
        # By way of a BatchNorm with eps 0, which has the function of any form; corrections start anew.
        none = dict.fromkeys(batchless_layers(state), 0.0)
        form: Callable[[Tensor], Tensor] = torch.exp
        if isinstance(norm, PaperNormSection):
            form = partial(std_from_raw, parametrization=norm.parametrization, eps=norm.eps)
        try:
            state, _ = state_to_batch(state, none, std_from_raw=form)
            state, done = state_to_batchless(state, none)
        except ValueError as error:
            raise CheckpointError(f"{file} is damaged\n{error}") from error
        if isinstance(norm, PaperNormSection) and (norm.parametrization, norm.share) != ("log", "channel"):
            before = f"batchless, {norm.parametrization}, per {norm.share}"
            changes += [LayerChange(c.layer, before, "batchless", *c[1:]) for c in done]
    return _Source(state, network, tuple(changes), tuple(found.notices), is_run=True)


def _network(recipe: Recipe, state: dict[str, Tensor]) -> nn.Module:
    """The recipe's network with BatchNorm, for as many classes as the last matrix of the state dict has rows."""
    rows = [len(tensor) for key, tensor in state.items() if key.endswith(".weight") and tensor.dim() == 2]
    if not rows:
        raise CheckpointError(f"the weights have no classifier, so they are not of {recipe.model.name}")
    try:
        if is_foreign(recipe.model.name):
            from bln_train.models.library_models import original

            return original(recipe.model.name, rows[-1])
        shortcut, size = recipe.model.shortcut or "A", recipe.data.image_size or 32
        return build_model(recipe.model.name, rows[-1], norm=norm_factory("batch"), shortcut=shortcut, image_size=size)
    except ValueError as error:
        raise UsageError(f"{recipe.model.name}: {error}") from error


@torch.no_grad()
def _calibrated(source: str, state: dict[str, Tensor], recipe: Recipe, eps: float | None) -> _Source:
    """The state dict with the running statistics that it lacks, over training images of the recipe, whose network it fits."""
    network = _network(recipe, state)
    state = plain_names(state, network)
    norms = {name: module for name, module in network.named_modules() if isinstance(module, _BatchNorm)}
    untracked = {name: norm for name, norm in norms.items() if f"{name}.running_mean" not in state}
    if not untracked:
        raise UsageError(f"--calibrate: every BatchNorm of {source} has its statistics", "Leave it out.")
    own = {k: v for k, v in network.state_dict().items() if k in state or k.rpartition(".")[0] not in untracked}
    check_fit(state, own, Path(source), f"the recipe's {recipe.model.name}")
    copy_weights(state, own, Path(source))
    for norm in norms.values():
        norm.eps = norm.eps if eps is None else eps
    for norm in untracked.values():
        assert norm.running_var is not None
        norm.running_var.fill_(torch.nan)  # until it is taken
    sample, num_images, dtype = calibration_sample(recipe)
    network = network.to(dtype)
    try:  # what has statistics is a batchless layer from here on, so that only the others are taken from data
        replace_batchnorms(network, lambda norm: norm if norm in untracked.values() else to_batchless(norm))
    except ValueError as error:
        raise BlnError(f"{source} cannot be migrated; nothing was written\n{error}") from error
    floored = initialize_statistics(network, sample, (_BatchNorm,))
    unreached = [name for name, norm in untracked.items() if not bool(_finite(norm))]
    if unreached:
        raise BlnError(
            f"{source} cannot be migrated; nothing was written\n"
            + "\n".join(
                f"{name}: no statistics, and its input over {num_images} images is not finite or never comes"
                for name in unreached
            )
        )
    for name, norm in untracked.items():
        assert norm.running_mean is not None
        assert norm.running_var is not None
        kept = state[f"{name}.weight"].dtype if f"{name}.weight" in state else norm.running_mean.dtype
        state[f"{name}.running_mean"] = norm.running_mean.to(kept)
        state[f"{name}.running_var"] = norm.running_var.to(kept)
    notices = [
        f"Statistics of {len(untracked)} norms are those of {num_images} training images of {recipe.data.name}: with batches "
        "of their own, as they were trained, they computed something else for each."
    ]
    if floored:
        notices.append(f"Channels without variance over these images: {', '.join(floored)}.")
    return _Source(state, _network(recipe, state), notices=tuple(notices))


def _finite(norm: _BatchNorm) -> Tensor:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean.isfinite().all() & norm.running_var.isfinite().all()


def _eps_of(network: nn.Module | None, layers: list[str], eps: float | None) -> tuple[dict[str, float], list[str]]:
    """Eps of each layer's BatchNorm, and what to say of it."""
    if eps is not None:
        return dict.fromkeys(layers, eps), []
    if network is None:
        return dict.fromkeys(layers, DEFAULT_EPS), [
            f"A state dict does not say its BatchNorm's eps: {DEFAULT_EPS:g} is taken, PyTorch's default; --eps changes it."
        ]
    modules = dict(network.named_modules())
    unknown = [name for name in layers if not hasattr(modules.get(name), "eps")]
    if unknown:
        raise CheckpointError("the weights do not fit their network, which has no norm at: " + ", ".join(unknown))
    return {name: modules[name].eps for name in layers}, []


def _scales_without_statistics(state: dict[str, Tensor], converted: list[str]) -> list[str]:
    """What to say of layers that may be BatchNorm without running statistics, which no key tells from other norms."""
    scales = [key.rpartition(".")[0] for key, tensor in state.items() if key.endswith(".weight") and tensor.dim() == 1]
    others = [name for name in scales if name not in converted and f"{name}.raw_std" not in state]
    if not others:
        return []
    return [
        f"{len(others)} layers have a scale per channel and no running statistics, and stay: {listed(others)}. If they are "
        "BatchNorm, --calibrate RECIPE takes their statistics from images."
    ]


def _nothing_to_do(source: str, state: dict[str, Tensor], to: str) -> BlnError:
    if to == "batch":
        return BlnError(f"{source} has no batchless layer (mean, raw_std); nothing was written")
    if batchless_layers(state):
        return BlnError(f"{source} is batchless already; nothing was written", "The way back is --to batch.")
    return BlnError(
        f"{source} has no BatchNorm with running statistics (running_mean, running_var); nothing was written",
        "If its BatchNorm kept none (track_running_stats=False), --calibrate RECIPE takes them from images.",
    )


def _rows(done: list[Change], network: nn.Module | None, to: str) -> list[LayerChange]:
    modules = {} if network is None else dict(network.named_modules())

    def row(change: Change) -> LayerChange:
        own = type(modules[change.layer]).__name__ if change.layer in modules else "BatchNorm"
        before, after = (own, "batchless") if to == "batchless" else ("batchless", own)
        return LayerChange(change.layer, before, after, *change[1:])

    return [row(change) for change in done]


def _write(state: dict[str, Tensor], out: Path) -> None:
    """Under a temporary name, then renamed: whole or not at all."""
    temporary = out.with_name(f".{out.stem}.partial{out.suffix}")
    try:
        write_state(state, temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, out)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        raise BlnError(f"cannot write {out}: {error}", "Free some space or choose another folder.") from error
    finally:
        temporary.unlink(missing_ok=True)
