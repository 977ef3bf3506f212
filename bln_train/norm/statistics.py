"""The batchless layers of a network together, as a training loop handles them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, nn

from bln_train.norm.accounts import Account
from bln_train.norm.base import USE_PROCESSES, LikelihoodNorm
from bln_train.norm.batchless import _BatchlessNorm
from bln_train.norm.dropout import InstanceDropout, begin_masks, first_masks_again, go_on_with_masks
from bln_train.norm.kernels.feedback import begin_feedback
from bln_train.norm.loop_checks import LoopChecks
from bln_train.norm.probe import prepare_following, settle_following
from bln_train.norm.replay import Run, addresses, at_once
from bln_train.norm.update import update_layers


class BatchlessStatistics:
    """The batchless layers of a network, and what a training loop does with them.

    net.train()
    for each effective batch of N images:
        statistics.begin(N, p)                         # the first p images are the probe
        with fold_once(folded_layers(net)):            # of a fused network
            for each micro-batch:                      # of any size
                loss = cross_entropy(net(x), y, reduction="sum") + statistics.nll()
                (loss / N).backward()
        statistics.update(N)                           # correction and natural step
        optimizer.step()                               # over everything but statistics.natural_parameters
        optimizer.zero_grad()
        statistics.follow(lambda: net(first p))        # with p > 0: the statistics follow the weights

    Each call tells what was forgotten before it, see `LoopChecks`: as a RuntimeError, or once as a warning. Masks of the dropout
    layers that `convert_batchnorm` puts in belong to the images' places in the effective batch: any split has the same, and so has
    `follow`. With a GradScaler the gradients of `natural_parameters` are to be divided by its scale before `update`, as
    `unscale_` does with the optimizer's. Several processes share a step in `Trainer` only; DistributedDataParallel is refused.

    Args:
        model: any module; one without batchless layers makes every method a no-op.

    Raises:
        ValueError: the model is or has a DistributedDataParallel or DataParallel.
    """

    def __init__(self, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
                raise ValueError(f"{type(module).__name__} cannot share batchless statistics: {USE_PROCESSES}")
        self.layers = {name: m for name, m in model.named_modules() if isinstance(m, LikelihoodNorm)}
        self._followers = {name: m for name, m in self.layers.items() if isinstance(m, _BatchlessNorm)}
        self._dropouts = [m for m in model.modules() if isinstance(m, InstanceDropout)]
        self._checks = LoopChecks(self.layers, self._followers)

    @property
    def natural_parameters(self) -> list[nn.Parameter]:
        """Parameters whose gradients `update` takes, and which no optimizer may move."""
        return [parameter for layer in self.layers.values() for parameter in layer.natural_parameters]

    @property
    def gradient_parameters(self) -> list[nn.Parameter]:
        """Means and raw_stds that belong into the optimizer."""
        natural = {id(parameter) for parameter in self.natural_parameters}
        return [p for m in self.layers.values() for p in (m.mean, m.raw_std) if id(p) not in natural]

    def nll(self) -> Tensor | float:
        """Sum of the layers' negative log likelihoods of the last forward's images, (); to be added to a summed loss.

        Raises:
            RuntimeError: the forward before had no backward yet, or weights moved without `update`; in backward, a second one.
        """
        pending = []
        for layer in self.layers.values():
            account = layer.account
            if account.nll is not None:
                pending.append(account.nll)
                account.nll = None
            account.is_open = account.num_to_watch > 0
            account.num_uses = 0
        likelihood = torch.stack(pending).sum() if pending else None
        if likelihood is not None:
            self._checks.take(likelihood)
        go_on_with_masks(self._dropouts)
        return 0.0 if likelihood is None else likelihood

    def update(self, num_images: int, run: Run = at_once) -> Tensor | None:
        """Update each layer from the gradients of an effective batch of `num_images`; (L,) nll of each, None if L = 0.

        `run` does it (norm/replay.py).

        Raises:
            RuntimeError: a forward's likelihood was never taken by `nll`, so the statistics would not follow the data; or `begin`,
                the number of images, a backward or the weight 1/N of an image is missing. The effective batch is forgotten then.
        """
        for name, layer in self.layers.items():
            if layer.account.nll is not None:
                self.discard()
                raise RuntimeError(
                    f"the likelihood of layer '{name}' was not added to the loss: call nll() after each training forward. "
                    "Activation checkpointing runs forwards again during backward and cannot be used with this layer."
                )
        try:
            self._checks.update(num_images)
        except RuntimeError:
            self.discard()
            raise
        self._checks.reset()
        nll = {layer: layer.end_batch(num_images) for name, layer in self.layers.items() if name not in self._followers}
        followers = list(self._followers.values())
        if followers:
            nll |= dict(zip(followers, update_layers(followers, num_images, run).unbind(0), strict=True))
        return torch.stack([nll[layer] for layer in self.layers.values()]) if nll else None

    def discard(self) -> None:
        """Forget a half-done effective batch."""
        self._checks.reset()
        begin_masks(self._dropouts, None)
        for layer in self.layers.values():
            layer.discard()

    def begin(self, num_images: int | None, num_watched: int = 0) -> None:
        """Begin an effective batch of `num_images`: the first `num_watched` are noted for `follow`.

        Where the number is None, the correction of all images is that of the batches before, until `begin_part`.

        Raises:
            RuntimeError: `update` was not called for the batch before.
        """
        self._checks.begin(num_images, num_watched)
        # From PyTorch's generator, so that its seed is the run's; none is drawn where nobody needs one.
        drawn = self._dropouts and num_images is not None
        begin_masks(self._dropouts, int(torch.randint(2**62, ())) if drawn else None)
        for layer in self.layers.values():
            layer.account = Account(num_watched, has_begun=True)
        self.begin_part(num_images)

    def begin_part(self, num_images: int | None) -> None:
        """Begin a part of the effective batch with a feedback of its own, of `num_images`; see kernels/feedback.py."""
        for is_reused in (False, True):
            states = [
                x.feedback for x in self._followers.values() if x.feedback is not None and x.is_reused == is_reused
            ]
            begin_feedback(states, None if is_reused else num_images)

    def follow(self, forward: Callable[..., object], inputs: Sequence[Tensor] = (), run: Run = at_once) -> None:
        """After the step run `forward(*inputs)`, a call of the network in training mode on the images that were watched.

        Layer after layer, statistics move by what the step did to those images. `run` does it (norm/replay.py).

        Raises:
            RuntimeError: `update` was not called, the network is in eval mode, or the images are not as many as were watched.
        """
        self._checks.follow()
        layers = list(self._followers.values())

        def kind() -> tuple[Hashable, ...]:
            old = [moment for layer in layers for moment in layer.old_moments or (None, None)]
            return "follow", tuple(x.shape for x in inputs), addresses(old)

        old_moments = run(lambda *own: self._follow(lambda: forward(*own)), kind, inputs)
        for layer, old in zip(layers, old_moments, strict=True):
            layer.old_moments = old

    @torch.no_grad()
    def _follow(self, forward: Callable[[], object]) -> list[tuple[Tensor, Tensor] | None]:
        """Returns what is left of each layer's `old_moments`."""
        layers = list(self._followers.values())
        try:
            prepare_following(layers)
            with first_masks_again(self._dropouts), self._checks.following():
                forward()
            settle_following(layers)
        finally:
            for layer in layers:
                layer.following = None
        return [layer.old_moments for layer in layers]

    def counts(self) -> list[int]:
        """Of each layer: images, positions of them, positions of the probe's images; for several processes to add up."""
        accounts = [layer.account for layer in self.layers.values()]
        return [n for a in accounts for n in (a.num_images, a.num_positions, a.num_watched)]

    def set_counts(self, counts: Sequence[int]) -> None:
        """Put the sums of `counts` in the place of each layer's own."""
        for n, layer in enumerate(self.layers.values()):
            account = layer.account
            account.num_images, account.num_positions, account.num_watched = counts[3 * n : 3 * n + 3]
            if not account.num_watched:
                account.watched = None

    def probe_sums(self) -> list[Tensor]:
        """Of each layer the sums over the probe's images, (2, C), in units of its input; zeros where it saw none of them.

        To be added up in place. A layer whose account watched in another unit is converted: only who saw an image knows the unit.
        """
        for layer in self.layers.values():
            account = layer.account
            if account.watched is None:
                account.watched = torch.zeros(2, layer.num_features, dtype=layer.mean.dtype, device=layer.mean.device)
            elif account.unit is not None:
                account.watched *= torch.stack((account.unit, account.unit.square()))
            account.unit = None
        return [layer.account.watched for layer in self.layers.values() if layer.account.watched is not None]
