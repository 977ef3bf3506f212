"""What surrounds a folded convolution on CUDA, forward and backward, by Triton's kernels and by PyTorch's operators.

    python benchmarks/epilogue.py --device cuda [--dtype float32] [--groups 8] [--graph] [--repeats 50]

Shapes are those of ResNet-20 and ResNet-50, channels-last, relu, with the residual sum where a block ends. Microseconds are medians
of repeats by CUDA events, both paths by turns; with --graph those of a replay, where the host launches nothing. GB/s counts what
has to move: each tensor of the layer read or written once. A small layer stays in the cache from one repeat to the next, as it does
in training.
"""

import argparse
import statistics
import sys

import torch

from bln_train.norm.kernels.backend import EAGER, TRITON, why_not_triton
from bln_train.norm.kernels.feedback import no_feedback
from bln_train.norm.kernels.table import Correction, Epilogue, Gradients, Row
from bln_train.system import machine

LAYERS = {  # channels, side, whether a residual comes in
    "resnet20": [(16, 32, False), (16, 32, True), (32, 16, True), (64, 8, True)],
    "resnet50": [
        (64, 112, False),
        (64, 56, False),
        (256, 56, True),
        (128, 28, False),
        (512, 28, True),
        (256, 14, False),
        (1024, 14, True),
        (512, 7, False),
        (2048, 7, True),
    ],
}
_WARM_UPS = 3


def directions(shape, has_residual, groups, dtype, device):
    """Both directions of a layer as functions of the backend, and the bytes that each has to move."""
    y, grad_z, residual, new = (
        torch.randn(shape, device=device, dtype=dtype).to(memory_format=torch.channels_last) for _ in range(4)
    )
    residual, inner = (residual, grad_z) if has_residual else (None, None)
    table = torch.zeros(len(Row), shape[1], device=device)
    table[[Row.INNER, Row.INVERSE, Row.OUTER]] = 0.5  # repeated in place it stays finite
    epilogue = Epilogue(table, shape[1] // groups if groups else 0, 1e-5, relu=True)
    nll, sums = table.new_zeros(()), table.new_ones(shape[0], 2, shape[1])
    running = torch.zeros_like(table[:2])
    correction = Correction(table.new_ones(()), running, no_feedback(running))
    gradients = Gradients(new, inner, torch.zeros(6 if groups else 4, shape[1], device=device))

    def there(backend):
        backend.forward(y, y, residual, epilogue, nll, None)

    def back(backend):
        backend.backward(grad_z, y, y, sums, epilogue, correction, gradients)

    return {"forward": (there, (2 + has_residual) * y.nbytes), "backward": (back, (4 + has_residual) * y.nbytes)}


def prepared(work, backend, graph):
    """The work by a backend, after what it does only the first time."""

    def run():
        work(backend)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    if not graph:
        return run
    recording = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recording):
        run()
    return recording.replay


def microseconds(work):
    """Of one run, by the device's clock."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end)


def main():
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--groups", type=int, default=8, help="of channels; 0 for none")
    parser.add_argument("--graph", action="store_true")
    parser.add_argument("--repeats", type=int, default=50)
    args = parser.parse_args()
    if not args.device.startswith("cuda") or not torch.cuda.is_available():
        print(f"needs a CUDA device, not {args.device}: --device cuda on a machine that has one", file=sys.stderr)
        raise SystemExit(2)
    device = torch.device(args.device)
    torch.cuda.set_device(device)
    why = why_not_triton(device)
    if why:
        print(f"there is nothing to compare: {why}", file=sys.stderr)
        raise SystemExit(1)
    print(
        "network   images  channels  side  residual  direction  PyTorch us  Triton us  PyTorch/Triton  PyTorch GB/s  Triton GB/s"
    )
    for network, layers in LAYERS.items():
        for num_images in (1, 8, 64):
            for channels, side, has_residual in layers:
                shape = (num_images, channels, side, side)
                for name, (work, num_bytes) in directions(
                    shape, has_residual, args.groups, getattr(torch, args.dtype), device
                ).items():
                    paths = [prepared(work, backend, args.graph) for backend in (EAGER, TRITON)]
                    times = [[microseconds(path) for path in paths] for _ in range(args.repeats)]
                    theirs, ours = (statistics.median(own) for own in zip(*times, strict=True))
                    print(f"{network:9} {num_images:6} {channels:9} {side:5} {'yes' if has_residual else 'no':>9}  {name:9} "
                          f"{theirs:11.1f} {ours:10.1f} {theirs / ours:15.2f} {num_bytes / theirs / 1e3:13.0f} "
                          f"{num_bytes / ours / 1e3:12.0f}")  # fmt: skip
    how = "replayed" if args.graph else "launched"
    what = f"{args.dtype}, groups: {args.groups}, medians of {args.repeats}"
    print(f"{how}, {what}; {machine.device_name(device)}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
