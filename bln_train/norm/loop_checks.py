"""What a training loop of somebody's own may have forgotten, or done in another order: told instead of trained with.

All that is looked at are numbers that the host has anyway. Only the first effective batch is read from the device, once.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from bln_train.norm.base import LikelihoodNorm
from bln_train.norm.batchless import _BatchlessNorm
from bln_train.norm.update import likelihood_moments

_GIVE_UP = "call discard() to give an effective batch up"
_FAR_OFF = math.log(2)
"""Of a channel's log of the mean of xhat^2."""

_NOISE = (
    "the forward of follow() drew random numbers before a norm, and not those that training drew for these images: statistics then "
    "follow the noise. Use InstanceDropout, InstanceStochasticDepth or InstanceChannelDropout (convert_batchnorm puts them in the "
    "place of dropout modules, not of F.dropout), and give follow the very images of training"
)


class LoopChecks:
    """The checks of one BatchlessStatistics, which calls each method where its name says.

    An effective batch that begins without a number of images is only checked for having begun: whoever balances parts of it, as
    the trainer does, takes care of the rest.

    Args:
        layers: all of a network, by name.
        followers: those of them that have a correction and follow the probe, which the published layer does not.
    """

    def __init__(self, layers: Mapping[str, LikelihoodNorm], followers: Mapping[str, _BatchlessNorm]) -> None:
        self.layers, self.followers = layers, followers
        self.is_proven = False
        """Whether the loss of an effective batch of more than one image had the right weight."""
        self.is_first = True
        self.is_told = False
        """Whether a probe was looked at for random numbers."""
        self.num_watched = 0
        """Images of the last effective batch that wait for `follow`."""
        self._positions: dict[_BatchlessNorm, int] = {}
        self._warned: set[str] = set()
        self.reset()

    def reset(self) -> None:
        """No effective batch is under way."""
        self.has_begun = False
        self.num_begun: int | None = None
        self.num_to_watch = self.num_taken = self.num_backward = 0
        self._weight: Tensor | None = None
        self._versions: list[int] = []

    @property
    def has_feedback(self) -> bool:
        """Whether what is taken out of an image's gradient depends on the images before it."""
        return any(layer.feedback is not None for layer in self.followers.values())

    def begin(self, num_images: int | None, num_watched: int) -> None:
        """An effective batch begins."""
        if self.num_begun is not None and self.num_taken:
            self._fail(f"update({self.num_begun}) was not called for the effective batch before this one; {_GIVE_UP}")
        if self.num_watched and num_images is not None:
            self._warn(
                f"follow() was not called after the last step: statistics do not follow the weights on the {self.num_watched} "
                "images that begin() watched, without which deep networks hardly train"
            )
        self.reset()
        self.num_watched = 0
        self.has_begun, self.num_begun, self.num_to_watch = True, num_images, num_watched

    def take(self, likelihood: Tensor) -> None:
        """A loss takes the likelihood, (), of a forward."""
        if self.num_begun is None:
            if not self.has_begun:
                versions = [layer.weight_version for layer in self.layers.values()]
                if self._versions not in ([], versions):
                    self._fail(
                        "weights moved since the training forwards before: call update(N) before the optimizer's step"
                    )
                self._versions = versions
            return
        if self.num_taken > self.num_backward and self.has_feedback:
            self._fail(
                "the correction of an image depends on the backwards before it: call backward() after each forward, before the "
                f"next one's nll(); {_GIVE_UP}"
            )
        self.num_taken += 1
        if not likelihood.requires_grad:  # all statistics are frozen
            self.num_backward += 1
            return
        is_done = False

        def see(grad: Tensor) -> None:
            nonlocal is_done
            if is_done:
                self._fail("backward() ran twice through one forward: add up the losses, or run the forward again")
            is_done = True
            self.num_backward += 1
            if self._weight is None and not self.is_proven:
                self._weight = grad.detach()

        likelihood.register_hook(see)

    def update(self, num_images: int) -> None:
        """An effective batch ends."""
        if not self.has_begun and self.has_feedback:
            self._fail(f"begin({num_images}) was not called before the forwards of this effective batch")
        if self.num_begun is None:
            return
        if num_images != self.num_begun:
            self._fail(
                f"update({num_images}) after begin({self.num_begun}): both take the images of the effective batch"
            )
        counts = [layer.account.num_forwarded for layer in self.layers.values() if layer.training]
        if len(set(counts)) == 1 and num_images not in counts:  # in a branch there may be fewer
            self._fail(
                f"the training forwards between begin({num_images}) and update({num_images}) had {max(counts)} images: give both "
                "the number of images that there are"
            )
        if self.num_backward < self.num_taken:
            self._fail(f"{self.num_taken} forwards and {self.num_backward} backwards: call backward() before update()")
        seen = [layer for layer in self.layers.values() if layer.account.num_images]
        if any(layer.account.weight_version != layer.weight_version for layer in seen):
            self._fail("weights moved since the forwards: call update(N) before the optimizer's step")
        for name, layer in self.layers.items():
            if layer.account.num_images and layer.mean.requires_grad and layer.mean.grad is None:
                self._fail(
                    f"the statistics of '{name}' have no gradient: call update(N) after the `with fold_once(...)` block and before "
                    "zero_grad()"
                )
        if self._weight is not None and num_images > 1:
            self._check_weight(float(self._weight) * num_images, num_images)
            self.is_proven = True
        if self.is_first:
            self._check_statistics(num_images)
            self.is_first = False
        accounts = {layer: layer.account for layer in self.followers.values()}
        self.num_watched = self.num_to_watch - min(
            (a.num_to_watch for a in accounts.values()), default=self.num_to_watch
        )
        self._positions = {layer: account.num_watched for layer, account in accounts.items()}

    @torch.no_grad()
    def _check_weight(self, ratio: float, num_images: int) -> None:
        """Check the first weight of an image in the loss, times the number of images: 1, or a loss scale."""
        natural = list(self.followers.values())
        if abs(ratio - 1) < 1e-2 or not natural:
            return
        exponent = math.log2(ratio) if ratio > 0 else 0.5
        # A loss that was not divided has a ratio of num_images, one that was divided by a micro-batch a smaller one.
        if abs(exponent - round(exponent)) > 1e-3 or ratio <= num_images:
            self._fail(
                f"an image has a weight of {ratio / num_images:.3g} in the loss, not of 1/{num_images}: with N the images of the "
                "effective batch, ((loss summed over images + nll()) / N).backward()"
            )
        for layer in natural:
            if layer.mean.grad is not None and bool((likelihood_moments(layer, num_images)[1] < -1e-2).any()):
                self._fail(
                    f"the gradients of natural_parameters are those of a loss that was scaled by {ratio:.0f}: divide them by the "
                    "scale before update(N), as GradScaler.unscale_(optimizer) does with the others"
                )

    @torch.no_grad()
    def _check_statistics(self, num_images: int) -> None:
        """Warn where statistics are none of any data, and the first effective batch has others."""
        untouched = []
        for name, layer in self.followers.items():
            if layer.mean.grad is None or layer.raw_std.grad is None:
                continue
            if bool(layer.mean.any()) or bool(((layer.std - 1).abs() > 1e-3).any()):
                continue
            second = likelihood_moments(layer, num_images)[1].clamp(min=1e-30)
            if float(second.log().abs().median()) > _FAR_OFF:
                untouched.append(name)
        if untouched:
            self._warn(
                f"the statistics of {len(untouched)} norms ('{untouched[0]}' first) are still mean 0 and deviation 1, and those of "
                "their inputs far from it: call initialize_statistics(model, ...) before training an untrained network"
            )

    def follow(self) -> None:
        """The probe's forward begins."""
        if self.num_begun is not None and self.num_taken:
            self._fail(f"update({self.num_begun}) was not called before follow()")
        watched = [layer.training for layer in self.followers.values() if layer.old_moments is not None]
        if watched and not any(watched):
            self._fail(
                "follow() takes a forward in training mode, and the norms are in eval mode: call model.train() before"
            )

    @contextmanager
    def following(self) -> Iterator[None]:
        """Around the probe's forward, after which no layer has moved for good but those used twice."""
        counted = {layer: num for layer, num in self._positions.items() if num and layer.following is not None}
        before = after = None if self.is_told or not counted else _random_state(self.followers)

        def note() -> None:
            nonlocal after
            after = _random_state(self.followers)

        for layer in counted if before is not None else ():
            assert layer.following is not None
            layer.following.begins = note
        yield
        if before is not None and after is not None and not all(map(torch.equal, before, after)):
            self._warn(_NOISE)
        nums = {layer: layer.following.num for layer in counted if layer.following is not None and layer.following.num}
        others = [layer for layer, num in nums.items() if num != counted[layer]]
        if others and len(others) == len(nums):
            num = nums[others[0]] * self.num_watched / counted[others[0]]
            self._fail(
                f"follow() ran on {num:g} images, and begin() watched {self.num_watched}: give follow the first "
                f"{self.num_watched} images of the effective batch, in one forward"
            )
        for layer in others:  # images took another branch than in training: there is nothing to compare
            assert layer.following is not None
            layer.following.found = None
        self.num_watched, self._positions = 0, {}
        self.is_told = self.is_told or bool(counted)

    def _fail(self, text: str) -> None:
        raise RuntimeError(text)

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(text, UserWarning, stacklevel=4)


def _random_state(layers: Mapping[str, _BatchlessNorm]) -> list[Tensor]:
    """Of the generators of the processor and of the layers' devices."""
    devices = {layer.mean.device for layer in layers.values() if layer.mean.is_cuda}
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]
