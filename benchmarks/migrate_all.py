"""Whether migration keeps what a network computes: every torchvision classifier with BatchNorm, and ten CNNs of timm.

    python benchmarks/migrate_all.py [NAME ...]

Random weights, running statistics, scales and shifts far from their defaults, float64, eval mode: the largest difference of the
logits, relative to the largest logit, after migration and after going back. Networks are converted in place and freed one by
one, so that the peak is one network's. Exits with 1 if a difference is above 1e-10.
"""

import gc
import resource
import sys
import time

import torch
from torchvision import models

from bln_train.norm import convert_batchnorm, convert_to_batchnorm
from bln_train.norm.convert.layers import is_batchnorm

BOUND = 1e-10
TIMM = ("resnet26d", "regnety_004", "efficientnet_b0", "mobilenetv3_small_100", "densenet121", "dla34", "hrnet_w18_small",
        "repvgg_a0", "levit_128s", "ghostnet_100")  # fmt: skip
SIDES = (64, 96, 128, 224, 299)
"""Pixels: the smallest that a network takes."""


def build(name):
    """The network in float64 with drawn weights, disturbed statistics, in eval mode."""
    torch.manual_seed(0)
    library, _, own = name.partition(":")
    if library == "timm":
        import timm

        model = timm.create_model(own, num_classes=10)
    else:
        quick = {"init_weights": False} if own in ("googlenet", "inception_v3") else {}  # theirs takes minutes
        model = models.get_model(own, weights=None, num_classes=10, **quick)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.double().eval()
    generator = torch.Generator().manual_seed(1)
    for norm in model.modules():
        if is_batchnorm(norm):
            for tensor, low in (
                (norm.running_mean, -0.5),
                (norm.running_var, 0.5),
                (norm.weight, 0.5),
                (norm.bias, -0.5),
            ):
                if tensor is not None:
                    tensor.copy_(low + torch.rand(tensor.shape, generator=generator))
    return model


def logits_of(model):
    """Logits of one image, and its side."""
    reason = None
    for side in SIDES:
        x = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        try:
            return model(x), x
        except (RuntimeError, ValueError, AssertionError) as error:
            reason = error
    raise reason


def measure(name):
    """Number of norms, side of the image, differences there and back."""
    model = build(name)
    reference, x = logits_of(model)
    number = sum(is_batchnorm(m) for m in model.modules())
    largest = reference.abs().max()
    assert torch.isfinite(largest)
    assert largest > 0
    model = convert_batchnorm(model)
    assert not any(is_batchnorm(m) for m in model.modules())
    there = float((model(x) - reference).abs().max() / largest)
    model = convert_to_batchnorm(model)
    back = float((model(x) - reference).abs().max() / largest)
    return number, x.shape[-1], there, back


def with_batchnorm(name):
    """Whether torchvision's network has a BatchNorm, found without memory for its weights."""
    quick = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    try:
        with torch.device("meta"):
            model = models.get_model(name, weights=None, **quick)
    except NotImplementedError:  # its initialisation computes with values
        model = models.get_model(name, weights=None, **quick)
    return any(is_batchnorm(m) for m in model.modules())


@torch.inference_mode()
def main():
    names = sys.argv[1:]
    if not names:
        names = [f"torchvision:{n}" for n in models.list_models(module=models) if with_batchnorm(n)]
        names += [f"timm:{n}" for n in TIMM]
    worst, began = 0.0, time.perf_counter()
    for name in names:
        start = time.perf_counter()
        number, side, there, back = measure(name)
        gc.collect()
        worst = max(worst, there, back)
        print(f"{name:36} {number:4} norms  {side:3} pixels  there {there:.1e}  back {back:.1e}  "
              f"{time.perf_counter() - start:5.1f} s", flush=True)  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{len(names)} networks, largest difference {worst:.1e} (bound {BOUND:g}), {time.perf_counter() - began:.0f} s, "
          f"peak {peak:.1f} GiB, torch {torch.__version__}")  # fmt: skip
    return int(worst > BOUND)


if __name__ == "__main__":
    sys.exit(main())
