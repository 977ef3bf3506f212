"""The Triton kernels: equal to PyTorch's operators, compiled for cards that are not here, no more memory, no harm where absent."""

import copy
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bln_train.norm.kernels.epilogue import Row, backward, forward_, map_, sums_of
from helpers import tiny_recipe

from bln_train.build import experiment as build
from bln_train.build import runtime
from bln_train.memory.tracker import StorageTracker
from bln_train.norm.kernels import channel, compiled, triton_launch
from bln_train.norm.kernels.feedback import BalanceRow
from bln_train.plan.predict import plan_memory

LAST, FIRST = torch.channels_last, torch.contiguous_format
ACTIVATIONS = ["identity", "relu", "leaky_relu"]


@pytest.fixture(autouse=True)
def as_found():
    yield
    compiled.use_compiled(True)


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_both_paths(device):
    """tests/triton_paths.py, by itself."""
    pytest.importorskip("triton")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        str(Path(__file__).parents[2] / "support" / "triton_paths.py"),
    ]
    environment = {
        name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET" and "XDIST" not in name
    }
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


# Launches without a device


class Launches:
    """In the place of norm/kernels/triton_kernels.py: writes calls down and launches nothing."""

    def __init__(self):
        self.calls = []
        self.partial_bytes = 0
        self.keeps = True

    def __getattr__(self, name):
        return _Kernel(name, self)


class _Kernel:
    def __init__(self, name, launches):
        self.name, self.launches = name, launches

    def __getitem__(self, grid):
        return lambda *args, **options: self._call(grid, args, options)

    def _call(self, grid, args, options):
        if self.name.startswith("finish"):
            self.launches.partial_bytes = max(self.launches.partial_bytes, args[0].nbytes)
        self.launches.calls.append((self.name, grid, args, options) if self.launches.keeps else self.name)


@pytest.fixture
def launches(monkeypatch):
    """Tensors of the CPU stand for those of a CUDA device; what would be launched on it."""
    pytest.importorskip("triton")
    found = Launches()
    monkeypatch.setattr(triton_launch, "_TYPES", ("cpu",))
    monkeypatch.setattr(triton_launch, "_trial", lambda device: "")
    monkeypatch.setattr(triton_launch, "_kernels", lambda: found)
    monkeypatch.setattr(triton_launch, "_group_kernels", lambda: found)
    return found


def there_and_back(shape, dtype, order, activation, residual, given, corrects, overwrite, watched):
    """Both directions of a layer on empty tensors; the residual may be of another precision."""
    real = torch.promote_types(dtype, torch.float32)
    table, vectors = torch.zeros(len(Row), shape[1], dtype=real), torch.zeros(4, shape[1], dtype=real)
    z, grad_out = (torch.empty(shape, dtype=dtype).contiguous(memory_format=order) for _ in range(2))
    other = torch.empty(shape, dtype=real).contiguous(memory_format=order) if residual else None
    seen = torch.zeros_like(vectors) if watched else None

    prior, state = torch.zeros(2, shape[1], dtype=real), torch.zeros(len(BalanceRow), shape[1], dtype=real)

    def run():
        sums = forward_(z, other, table, activation, 0.3, table.new_zeros(()), int(watched), seen)
        return backward(
            grad_out, z, torch.empty_like(z) if given else None, other, table, sums, table.new_zeros(()), activation, 0.3,
            vectors, prior=prior if corrects else None, state=state if corrects else None, wants_grad=residual,
            may_overwrite=overwrite,
        )  # fmt: skip

    return run, [t for t in (table, vectors, z, grad_out, other, seen, prior, state) if t is not None]


def groups_there_and_back(shape, dtype, order, activation, residual, corrects, overwrite, watched):
    """The same of a layer with groups of channels."""
    real = torch.promote_types(dtype, torch.float32)
    groups = torch.nn.GroupNorm(1 if shape[1] % 2 else 2, shape[1], dtype=real)
    table, vectors = torch.zeros(len(Row), shape[1], dtype=real), torch.zeros(6, shape[1], dtype=real)
    z, given, grad_out = (torch.empty(shape, dtype=dtype).contiguous(memory_format=order) for _ in range(3))
    other = torch.empty(shape, dtype=real).contiguous(memory_format=order) if residual else None
    seen = torch.zeros_like(vectors)[:4] if watched else None
    prior, state = torch.zeros(2, shape[1], dtype=real), torch.zeros(len(BalanceRow), shape[1], dtype=real)

    def run():
        sums = channel.forward_(z, other, table, groups, activation, 0.3, table.new_zeros(()), int(watched), seen)
        with torch.no_grad():
            channel.map_(given, other, groups, activation, 0.3, real)
        return channel.backward(
            grad_out, z, given, table, sums, table.new_zeros(()), groups, activation, 0.3, vectors,
            prior=prior if corrects else None, state=state if corrects else None, wants_grad=residual, may_overwrite=overwrite,
        )  # fmt: skip

    parameters = [groups.weight, groups.bias]
    return run, [
        t for t in (table, vectors, z, given, grad_out, other, seen, prior, state, *parameters) if t is not None
    ]


def test_never_more_memory_than_pytorch_and_the_partial_sums(launches):
    """Small sums aside, a device that has Triton fits what one without does."""
    launches.keeps = False  # alive
    cases = [(torch.bfloat16, LAST, "relu", *options) for options in itertools.product((False, True), repeat=5)]
    for dtype, activation, wanted in itertools.product((torch.float32, torch.float64), ACTIVATIONS, (False, True)):
        cases += [(dtype, FIRST, activation, wanted, False, wanted, not wanted, wanted)]
    both = [(there_and_back, case) for case in cases] + [
        (groups_there_and_back, (*case[:4], *case[5:])) for case in cases
    ]
    for make, case in both:
        peaks, launches.partial_bytes = [], 0
        for wanted in (True, False):
            compiled.use_compiled(wanted)
            run, existing = make((2, 40, 56, 56), *case)
            launches.calls.clear()
            with StorageTracker(existing) as tracker:
                run()
            peaks.append(tracker.peak_bytes)
            assert bool(launches.calls) == wanted
        assert peaks[0] <= peaks[1] + launches.partial_bytes, case
        assert launches.partial_bytes <= triton_launch.PARTIAL_BYTES


def test_partial_sums_are_bounded(launches):
    """Whatever the shape: at most PARTIAL_BYTES, or a few values for each image and channel where there are that many."""
    for shape in ((64, 64, 112, 112), (1, 2048, 7, 7), (512, 16, 32, 32), (1, 3, 1024, 1024), (2, 30_000, 1, 1)):
        for order in (LAST, FIRST):
            grid = triton_launch._grid(torch.empty(shape, device="meta").contiguous(memory_format=order))
            partials = 6 * 8 * grid.programs[0] * shape[1]
            assert partials <= max(triton_launch.PARTIAL_BYTES, 6 * 8 * shape[0] * shape[1])
            assert grid.num_blocks * grid.tiles_per_program >= grid.num_tiles
            assert (grid.num_blocks - 1) * grid.tiles_per_program < grid.num_tiles


@pytest.mark.parametrize(("name", "kernel"), [("batchless", "forward_groups"), ("batchless-plain", "forward")])
@pytest.mark.parametrize("size", [1, 8])
def test_a_cuda_plan_bounds_both_paths(size, name, kernel, monkeypatch):
    """It is the larger of the two, and needs no Triton; compiled or not, no kernel in C has a part in it."""
    monkeypatch.setattr(triton_launch, "_kernels", lambda: pytest.fail("nothing may be launched"))
    called = []
    forward = getattr(triton_launch, kernel)
    monkeypatch.setattr(triton_launch, kernel, lambda *args: (called.append(1), forward(*args))[1])
    of = [tiny_recipe(norm__name=name, train__precision="bf16", runtime__compiled=wanted) for wanted in (True, False)]
    both, without = (plan_memory(recipe, [size], cuda=True)[0] for recipe in of)
    assert called
    with triton_launch.hollow_launches():
        kernels = plan_memory(of[1], [size], cuda=True)[0]
    assert both in (without, kernels)
    assert both.total_bytes == max(without.total_bytes, kernels.total_bytes)
    assert not triton_launch._hollow


def compile_for(capability, name, args, options, folder):
    """Compile a launch as Triton would on a device; the source and the assembler's result."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bln_train.norm.kernels import triton_groups, triton_kernels

    kernel = getattr(triton_groups if "groups" in name else triton_kernels, name)
    types = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
    warps = options.get("num_warps", 4)
    signature, constants, aligned = {}, {}, {}
    given = dict(zip(kernel.arg_names, args, strict=False)) | {k: v for k, v in options.items() if k != "num_warps"}
    for place, argument in enumerate(kernel.arg_names):
        value = given[argument]
        is_plain = argument in (*triton_kernels.PLAIN, *triton_kernels.FEW)
        if value is None or argument.isupper() or (type(value) is int and value == 1 and not is_plain):
            signature[argument], constants[argument] = "constexpr", value
            continue
        is_number = isinstance(value, int | float)
        signature[argument] = {int: "i32", float: "fp32"}[type(value)] if is_number else types[value.dtype]
        if (
            argument not in triton_groups.GROUPS
            and not is_plain
            and (not is_number or (type(value) is int and value % 16 == 0))
        ):
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}).asm


@pytest.mark.slow
@pytest.mark.parametrize("capability", [75, 80, 90])
def test_every_variant_compiles_for_a_card_that_is_not_here(capability, launches, tmp_path, monkeypatch):
    """Down to machine code, by the assembler that Triton brings; for one capability all of them, for the others one of each."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    some = (True, False, True, False, True)
    cases = [((2, 64, 4, 4), dtype, LAST, "relu", *some) for dtype in (torch.bfloat16, torch.float32)]
    cases += [((2, 3, 5, 5), torch.float64, FIRST, "leaky_relu", *some)]
    if capability == 80:
        every = itertools.product(["relu"], *[(False, True)] * 3, [False], [False, True])
        others = [(activation, *chosen) for activation in ("identity", "leaky_relu") for chosen in (some, [False] * 5)]
        cases += [((2, 64, 4, 4), torch.float32, LAST, *options) for options in [*every, *others]]
        cases += [((2, 3, 5, 5), dtype, LAST, "leaky_relu", *some) for dtype in (torch.float64, torch.float16)]
        cases += [((2, 1, 3, 3), torch.float32, FIRST, "relu", *some)]
    for shape, dtype, order, activation, residual, given, *others in cases:
        there_and_back(shape, dtype, order, activation, residual, given, *others)[0]()
        groups_there_and_back(shape, dtype, order, activation, residual, *others)[0]()
    y = torch.empty(2, 64, 4, 4).contiguous(memory_format=LAST)
    sums_of(y, torch.float32)
    map_(y, None, torch.zeros(2, 64), "relu", 0.0)
    names = set()
    for name, _, args, options in launches.calls:
        names.add(name)
        assembled = compile_for(capability, name, args, options, tmp_path)
        assert len(assembled["cubin"]) > 1000
        assert f".target sm_{capability}" in assembled["ptx"]
        assert "atom." not in assembled["ptx"]
    groups = {"finish_groups", "finish_groups_backward"}
    assert names == {"forward", "finish_forward", "backward", "finish_backward"} | groups


def test_rows_of_channels_are_read_in_vectors(launches, tmp_path, monkeypatch):
    """16 bytes at a time where channels allow it; a slope keeps the precision of float64."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    there_and_back((2, 64, 8, 8), torch.float32, LAST, "relu", True, False, True, False, False)[0]()
    for name, _, args, options in launches.calls[::2]:
        ptx = compile_for(80, name, args, options, tmp_path)["ptx"]
        tensors = 2 if name == "forward" else 3
        assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) == 2 * tensors, name
    launches.calls.clear()
    there_and_back((2, 3, 5, 5), torch.float64, LAST, "leaky_relu", False, False, True, False, False)[0]()
    name, _, args, options = launches.calls[0]
    constants = re.findall(r"dense<([-+.eE\d]+)>", compile_for(80, name, args, options, tmp_path)["ttir"])
    assert 0.3 in map(float, constants)


# Where there is no Triton


def test_without_triton_it_is_said_once_and_nothing_fails(monkeypatch):
    """Not importable, or a launcher that does not build: the reason, at once, and PyTorch's operators."""
    triton_launch._trial.cache_clear()

    def fails():
        raise RuntimeError("Failed to find C compiler.\nmore")

    def absent():
        raise ModuleNotFoundError("No module named 'triton'")

    monkeypatch.setattr(triton_launch, "_TYPES", ("cpu",))
    for kernels, text in (
        (absent, "cannot be imported: No module named 'triton'"),
        (fails, "failed: Failed to find C compiler."),
    ):
        triton_launch._trial.cache_clear()
        monkeypatch.setattr(triton_launch, "_kernels", kernels)
        assert triton_launch.why_not_triton(torch.device("cpu")) == f"Triton {text}"
        y = torch.ones(2, 3)
        assert torch.allclose(sums_of(y, torch.float32), torch.full((2, 3), 2.0))
        compiled.use_compiled(False)
        assert triton_launch.why_not_triton(torch.device("cpu")) == ""
        compiled.use_compiled(True)
    triton_launch._trial.cache_clear()


def test_kernels_that_compute_nonsense_are_not_used(launches, monkeypatch):
    """The trial compares."""
    assert "something else" in triton_launch._try_on(torch.device("cpu"))


def test_a_device_without_triton_gets_a_notice(monkeypatch):
    """As a CPU without a compiler does."""
    monkeypatch.setattr(build, "why_not_triton", lambda device: "the card is old")
    assert build._why_not_compiled(torch.device("cuda", 0)) == "the card is old"
    assert build._why_not_compiled(torch.device("cpu")) == compiled.why_not_compiled()


@pytest.mark.slow
def test_nobody_imports_triton_before_it_is_needed():
    """Neither the program's help nor building a network on the CPU."""
    code = "import sys, bln_train.build.experiment, bln_train.cli.app; sys.exit('{}' in sys.modules)"
    code = code.format("bln_train.norm.kernels.triton_kernels")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.gpu
def test_whole_runs_agree_and_say_which_path_they_took():
    """Law 2 across the paths on CUDA, in float64; the environment names the path, and nothing fell back."""
    found, start = [], None
    for wanted in (True, False):
        experiment = build.build_experiment(
            tiny_recipe(runtime={"device": "cuda", "compiled": wanted, "deterministic": True})
        )
        assert runtime.environment(experiment.device)["compiled"] is wanted
        assert triton_launch.why_not_triton(experiment.device) == ""
        # Filters are centred in float32 when a network is made, which kernels and operators round otherwise.
        start = start or copy.deepcopy(experiment.model.state_dict())
        experiment.model.load_state_dict(start)
        list(experiment.trainer.steps())
        found.append(experiment.model.state_dict())
    for name, value in found[0].items():
        assert torch.allclose(value, found[1][name], rtol=1e-8, atol=1e-10), name
