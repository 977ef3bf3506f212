"""Initialisation over splits and passes: difference to the whole sample, work, memory and time.

    python benchmarks/initialisation.py [--model resnet20] [--images 128] [--size 32] [--splits 1,7,64] [--float64]

Models are those of recipes, `torchvision:googlenet` and the like included; weights and images are drawn. The result
of the whole sample comes from one forward in one batch, in which each norm is set from its input before it runs. Forwards are
multiplications of convolutions and linear layers, in units of one forward of the whole sample. The peak is that of tracked
tensors above parameters, buffers and the sample. Seconds are the processor's, tracking included: compare them with each other.
"""

import argparse
import copy
import time

import torch
from torch import nn

from bln_train.memory.tracker import StorageTracker
from bln_train.models.build import build_model, norm_factory
from bln_train.models.library_models import build_torchvision_model
from bln_train.norm import initialize_statistics
from bln_train.norm.batchless import _BatchlessNorm
from bln_train.norm.calibrate.levels import find_levels
from bln_train.system.machine import device_name
from bln_train.system.units import format_bytes


def norms_of(net):
    return {name: m for name, m in net.named_modules() if isinstance(m, _BatchlessNorm)}


@torch.no_grad()
def whole_sample(net, x):
    """Statistics from one forward of all images; for networks that use each norm once."""

    def set_from_input(norm, args):
        variance, mean = torch.var_mean(args[0].double(), [i for i in range(args[0].dim()) if i != 1], correction=0)
        norm.set_statistics(mean.to(norm.mean.dtype), variance.sqrt().to(norm.mean.dtype))

    net = copy.deepcopy(net).eval()
    for norm in norms_of(net).values():
        norm.register_forward_pre_hook(set_from_input)
    net(x)
    return norms_of(net)


def largest_difference(found, expected):
    """Of means and standard deviations, in units of the standard deviation."""
    return max(
        float(((getattr(found[name], what) - getattr(norm, what)).abs() / norm.std).detach().max())
        for name, norm in expected.items()
        for what in ("mean", "std")
    )


def count_products(net, counts):
    def count(module, _, out):
        counts[0] += out.numel() * module.weight[0].numel()

    return [m.register_forward_hook(count) for m in net.modules() if isinstance(m, nn.modules.conv._ConvNd | nn.Linear)]


@torch.no_grad()
def measure(net, x, split, **how):
    """Differences are judged by the caller; returns the initialised norms, forwards, peak bytes and seconds."""
    tracked = copy.deepcopy(net)
    counts = [0]
    hooks = count_products(tracked, counts)
    tracked.eval()(x[:1])
    per_image, counts[0] = counts[0], 0
    existing = [*tracked.parameters(), *tracked.buffers(), x]
    tracker = StorageTracker(existing)
    before = tracker.live_bytes
    began = time.process_time()
    with tracker:
        initialize_statistics(tracked, lambda: x.split(split), **how)
    seconds = time.process_time() - began
    for hook in hooks:
        hook.remove()
    return norms_of(tracked), counts[0] / (per_image * len(x)), tracker.peak_bytes - before, seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--splits", default="1,7,64")
    parser.add_argument("--float64", action="store_true")
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64 if args.float64 else torch.float32)
    torch.manual_seed(0)
    norm = norm_factory("batchless")
    if args.model.startswith("torchvision:"):
        name = args.model.removeprefix("torchvision:")
        net, _ = build_torchvision_model(name, 10, norm=norm, image_size=args.size)
    else:
        net = build_model(args.model, 10, norm=norm, weight_standardization=True, image_size=args.size)
    x = torch.randn(args.images, 3, args.size, args.size)
    net = net.to(x.dtype)
    expected = whole_sample(net, x)
    net_names = norms_of(net)
    levels = find_levels(net.eval(), net_names.values(), x[:1])
    print(
        f"{args.model}, {args.images} images of {args.size}x{args.size}: {len(net_names)} norms in {len(levels)} levels"
    )
    print(
        f"{device_name(torch.device('cpu'))}, torch {torch.__version__}, {torch.get_num_threads()} thread(s), "
        f"{'float64' if args.float64 else 'float32'}"
    )
    print(f"{'split':>5} {'passes':>6} {'largest difference / std':>24} {'forwards':>9} {'peak':>10} {'s':>7}")
    for split in map(int, args.splits.split(",")):
        for passes in (1, 2):
            found, forwards, peak, seconds = measure(net, x, split, passes=passes)
            difference = largest_difference(found, expected)
            print(f"{split:5} {passes:6} {difference:24.1e} {forwards:9.2f} {format_bytes(peak):>10} {seconds:7.2f}",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
