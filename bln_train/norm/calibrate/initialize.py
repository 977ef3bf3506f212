"""Initialise statistics from data: stratum after stratum, each normalised before the next is observed."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from bln_train.norm.base import LikelihoodNorm
from bln_train.norm.calibrate.moments import MicroBatches, Moments, Passes, evaluating, observe, on_input
from bln_train.norm.calibrate.paused import PausedForward
from bln_train.norm.calibrate.strata import Strata, find_strata
from bln_train.norm.fused.network import folded_layers

Settle = Callable[[nn.Module, Moments], None]
MAX_THREADS = 4096
"""Of waiting forwards and their OpenMP helpers: a system that has no more ends the process."""


@torch.no_grad()
def initialize_statistics(
    model: nn.Module,
    micro_batches: Callable[[], Iterable[Tensor]],
    kinds: tuple[type[nn.Module], ...] = (LikelihoodNorm, nn.modules.batchnorm._BatchNorm),
    *,
    passes: Passes = 1,
    cache: bool = False,
) -> list[str]:
    """Set each norm's mean and standard deviation to those of its input over a sample, the norms before it being set so.

    Norms whose inputs depend on no norm that is still to be set form a stratum (see `strata.find_strata`; one image shows which)
    and are observed together, in forwards that end as soon as the last of them has seen its input. Memory is one micro-batch's
    inference. The result does not depend on how the sample is split (moments are float64). A norm used at several places gets
    the moments of all its inputs; one whose output comes back into it, those of its first uses, whose inputs do not depend on it.
    A norm that the forward does not reach keeps its statistics.

    Args:
        model: evaluated in eval mode (no dropout); its mode is restored. Not fused.
        micro_batches: called once for each pass, and once more for the image; yields the sample as (n, C, H, W) inputs, any n.
        kinds: which modules are norms; a batchless layer gets its parameters, a BatchNorm its running statistics.
        passes: 1 merges the moments of images; 2 takes the variance in a second pass about the mean of the first: see `Moments`.
        cache: keep every micro-batch's forward waiting at the next norm, its activations in host memory, so that all strata
            together cost one evaluation of the sample (and norms used at several places one more each); host memory is the
            sample's activations at the widest place. A thread for each micro-batch. Not for networks that keep activations
            in attributes from one module to the next: micro-batches take turns between norms.

    Returns: names of the norms that saw a channel without variance, whose standard deviation was floored at eps.

    Raises:
        ValueError: the sample is empty, the model is fused, a BatchNorm keeps no running statistics, or there are more
            micro-batches than `cache` can have threads for.
        RuntimeError: with `cache`, micro-batches take different ways through the network, or the system gives no thread.
    """
    norms = {module: name for name, module in model.named_modules() if isinstance(module, kinds)}
    if folded_layers(model):
        raise ValueError("a fused network's norms never see their input: initialise before fuse, or unfuse")
    untracked = [name for norm, name in norms.items() if getattr(norm, "running_mean", True) is None]
    if untracked:
        raise ValueError(f"BatchNorm without running statistics has none to set: {', '.join(untracked)}")
    floored: list[nn.Module] = []

    def settle(norm: nn.Module, moments: Moments) -> None:
        if _set_statistics(norm, moments):
            floored.append(norm)

    with evaluating(model):
        first = next(iter(micro_batches()), None)
        if first is None:
            raise ValueError("there are no images to initialise statistics from")
        strata = find_strata(model, norms, first[:1])
        del first
        if cache:
            _settle_in_one_evaluation(model, micro_batches, strata, passes, settle)
        else:
            for stratum in strata.strata:
                for norm, moments in observe(model, micro_batches, stratum, passes).items():
                    settle(norm, moments)
    return [name for norm, name in norms.items() if norm in floored]


def _settle_in_one_evaluation(
    model: nn.Module, micro_batches: MicroBatches, strata: Strata, passes: Passes, settle: Settle
) -> None:
    """As described at `cache`: norm after norm in execution order, since a waiting forward cannot pass one that is not set."""
    uses = {norm: counted for stratum in strata.strata for norm, counted in stratum.items()}
    unsettled = set(uses)
    running: PausedForward | None = None
    forwards: list[PausedForward] = []

    def see(norm: nn.Module, x: Tensor) -> None:
        if running is not None and norm in unsettled:  # None: the calling thread observes a norm used at several places
            running.wait(norm, x)

    def advance(forward: PausedForward) -> nn.Module | None:
        nonlocal running
        forward.to_device()
        running = forward
        try:
            forward.resume()
        finally:
            running = None
        return forward.norm

    def settle_with_others(target: nn.Module) -> None:
        """Observe a norm, and what it depends on, in forwards that do not wait."""
        wanted = unsettled & (strata.needs[target] | {target})
        for stratum in strata.strata:
            part = {norm: counted for norm, counted in stratum.items() if norm in wanted}
            for norm, moments in observe(model, micro_batches, part, passes).items() if part else ():
                settle(norm, moments)
        unsettled.difference_update(wanted)

    def read(forward: PausedForward, moments: Moments) -> None:
        assert forward.input is not None
        moments.add(forward.input)

    def settle_next(begun: Iterable[PausedForward]) -> bool:
        """Run every forward to the next norm and set that; False if there is none."""
        targets, moments = set[nn.Module | None](), Moments()
        for forward in begun:
            target = advance(forward)
            targets.add(target)
            if len(targets) > 1:
                raise RuntimeError("micro-batches take different ways through the network: use cache=False")
            if target is not None and uses[target] == {0}:
                read(forward, moments)
            _offload(forward)
        target = targets.pop() if targets else None
        if target is None:
            return False
        if not moments.count:
            settle_with_others(target)
            return True
        if passes == 2:
            moments.recentre()
            for forward in forwards:
                forward.to_device()
                read(forward, moments)
                _offload(forward)
        settle(target, moments)
        unsettled.discard(target)
        return True

    def begin() -> Iterable[PausedForward]:
        for x in micro_batches():
            if (len(forwards) + 1) * torch.get_num_threads() > MAX_THREADS:
                raise ValueError(
                    f"the cache takes {torch.get_num_threads()} threads for each micro-batch, and more than {MAX_THREADS} in "
                    "all: use larger micro-batches, fewer threads, or no cache"
                )
            forwards.append(PausedForward(model, x))
            del x  # it keeps a copy
            yield forwards[-1]

    try:
        with on_input(uses, see):
            more = bool(uses) and settle_next(begin())
            while unsettled and more:
                more = settle_next(forwards)
    finally:
        for forward in forwards:
            forward.end()


def _offload(forward: PausedForward) -> None:
    """Free the device of a waiting forward; on the CPU it is where it belongs."""
    if forward.input is not None and forward.input.device.type != "cpu":
        forward.to_host()


def _set_statistics(norm: nn.Module, moments: Moments) -> bool:
    """Write the observed moments into the norm; True if a channel had no variance."""
    if isinstance(norm, LikelihoodNorm):
        mean, variance = moments.read(shared=norm.is_shared)
        norm.set_statistics(mean.to(norm.mean.dtype), variance.sqrt().to(norm.mean.dtype))
        return bool((variance.sqrt() < norm.eps).any())
    mean, variance = moments.read()
    running_mean, running_var = norm.running_mean, norm.running_var
    assert isinstance(running_mean, Tensor)
    assert isinstance(running_var, Tensor)
    running_mean.copy_(mean)
    running_var.copy_(variance)
    return bool((variance == 0).any())
