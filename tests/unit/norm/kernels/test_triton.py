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
from conformance import FIRST, LAST, Layer
from helpers import tiny_recipe

from bln_train.build import experiment as build
from bln_train.build import runtime
from bln_train.memory.tracker import StorageTracker
from bln_train.norm.kernels import backend, triton
from bln_train.norm.kernels.backend import EAGER, FAKE_TRITON, TRITON, backend_for
from bln_train.norm.kernels.library import why_not_compiled
from bln_train.norm.kernels.table import Correction, Gradients, StateRow, pretending, pretends, use_kernels
from bln_train.norm.kernels.triton import Triton
from bln_train.plan.predict import plan_memory


@pytest.fixture(autouse=True)
def as_found():
    backend._trial.cache_clear()
    yield
    use_kernels(True)
    backend._trial.cache_clear()


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_it_computes_what_the_reference_does(device):
    """tests/support/triton_conformance.py, in a process of its own."""
    pytest.importorskip("triton")
    program = Path(__file__).parents[3] / "support" / "triton_conformance.py"
    environment = {
        name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET" and "XDIST" not in name
    }
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-x", "-q", str(program)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


# Launches without a device


class Launches:
    """In the place of norm/kernels/triton_kernels.py: writes calls down and launches nothing."""

    def __init__(self):
        self.calls = []
        self.partial_bytes = 0
        self.keeps = True

    def real(self, dtype):
        from bln_train.norm.kernels import triton_kernels

        return triton_kernels.real(dtype)

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
def launches():
    """What `Triton(lambda: launches)` would launch."""
    pytest.importorskip("triton")
    return Launches()


def there_and_back(layer, relu, residual, corrects, in_place, probe):
    """Both directions of a layer as a function of the backend, and its tensors; the residual may be of another precision."""
    epilogue, nll = layer.epilogue(relu), torch.zeros((), dtype=layer.real)
    y, grad_z, other = layer.y(), layer.drawn(2), layer.drawn(3).to(layer.real) if residual else None
    z = y if in_place else torch.empty_like(y)
    vectors = torch.zeros(6 if layer.group_size else 4, layer.shape[1], dtype=layer.real)
    state, of_probe = layer.rows(len(StateRow), 4), layer.rows(2, 5)
    correction = Correction(nll, layer.rows(2, 6), state if corrects else None)
    # In place as the layer does where it computes y again: g in the gradient that comes in, the gradient of y in y.
    inner = None if not (relu and residual) else grad_z if in_place else torch.empty_like(y)
    gradients = Gradients(y if in_place else torch.empty_like(y), inner, vectors)

    def run(own):
        sums = own.forward(y, z, other, epilogue, nll, (1, of_probe) if probe else None)
        own.backward(grad_z, z if relu else None, y, sums, epilogue, correction, gradients)
        own.map_(z, other, epilogue)
        own.follow_(z, other, epilogue.table, None, 1e-3, relu=relu)

    tensors = (nll, y, z, grad_z, other, state, of_probe, epilogue.table, *correction, *gradients)
    return run, [tensor for tensor in tensors if tensor is not None]


def test_never_more_memory_than_pytorch_and_the_partial_sums(launches):
    """Small sums aside, a device that has Triton fits what one without does."""
    launches.keeps = False  # alive
    cases = [(torch.bfloat16, LAST, *options) for options in itertools.product((False, True), repeat=5)]
    for dtype, relu, wanted in itertools.product((torch.float32, torch.float64), (False, True), (False, True)):
        cases += [(dtype, FIRST, relu, wanted, wanted, not wanted, wanted)]
    for (dtype, order, *options), group_size in itertools.product(cases, (0, 20)):
        run, existing = there_and_back(Layer((2, 40, 56, 56), order, group_size, dtype), *options)
        peaks, launches.partial_bytes = [], 0
        for own in (Triton(lambda: launches), EAGER):
            launches.calls.clear()
            with StorageTracker(existing) as tracker:
                run(own)
            peaks.append(tracker.peak_bytes)
            assert bool(launches.calls) == (own is not EAGER)
        assert peaks[0] <= peaks[1] + launches.partial_bytes, (dtype, options, group_size)
        assert launches.partial_bytes <= triton.PARTIAL_BYTES


def test_partial_sums_are_bounded():
    """Whatever the shape: at most PARTIAL_BYTES, or a few values for each image and channel where there are that many."""
    for shape in ((64, 64, 112, 112), (1, 2048, 7, 7), (512, 16, 32, 32), (1, 3, 1024, 1024), (2, 30_000, 1, 1)):
        for order in (LAST, FIRST):
            grid = triton._grid(torch.empty(shape, device="meta").contiguous(memory_format=order))
            of_all = triton._MOST_SUMS * 8 * shape[1]
            assert of_all * grid.programs[0] <= max(triton.PARTIAL_BYTES, of_all * shape[0])
            assert grid.num_blocks * grid.tiles_per_program >= grid.num_tiles
            assert (grid.num_blocks - 1) * grid.tiles_per_program < grid.num_tiles


@pytest.mark.parametrize(("name", "has_groups"), [("batchless", True), ("batchless-plain", False)])
@pytest.mark.parametrize("size", [1, 8])
def test_a_cuda_plan_bounds_both_paths(size, name, has_groups, monkeypatch):
    """It is the larger of the two, and needs no Triton; compiled or not, no kernel in C has a part in it."""
    monkeypatch.setattr(TRITON, "kernels", lambda: pytest.fail("nothing may be launched"))
    called, forward = [], FAKE_TRITON.forward
    monkeypatch.setattr(
        FAKE_TRITON, "forward", lambda *args: (called.append(args[3].group_size > 0), forward(*args))[1]
    )
    of = [tiny_recipe(norm__name=name, train__precision="bf16", runtime__compiled=wanted) for wanted in (True, False)]
    both, without = (plan_memory(recipe, [size], cuda=True)[0] for recipe in of)
    assert set(called) == {has_groups}
    with pretending("triton"):
        kernels = plan_memory(of[1], [size], cuda=True)[0]
    assert both in (without, kernels)
    assert both.total_bytes == max(without.total_bytes, kernels.total_bytes)
    assert not pretends("triton")


def compile_for(capability, name, args, options):
    """Compile a launch as Triton would on a device; the source and the assembler's result."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bln_train.norm.kernels import triton_kernels

    kernel = getattr(triton_kernels, name)
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
            argument not in triton_kernels.TABLES
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
    some = (True, True, True, False, True)
    cases = [(Layer((2, 64, 4, 4), LAST, size, torch.bfloat16), *some) for size in (0, 16)]
    cases += [(Layer((2, 3, 5, 5), FIRST, size, torch.float64), *some) for size in (0, 3)]
    if capability == 80:
        every = itertools.product((False, True), (False, True), (False, True), [True], (False, True))
        cases += [(Layer((2, 64, 4, 4), LAST, size, torch.float32), *options) for options in every for size in (0, 16)]
        cases += [(Layer((1, 64, 4, 4), LAST, size, torch.float32), *some) for size in (0, 16)]
        cases += [(Layer((2, 3, 5, 5), LAST, 3, dtype), *some) for dtype in (torch.float64, torch.float16)]
        cases += [(Layer((2, 1, 3, 3), FIRST, size, torch.float32), *some) for size in (0, 1)]
    for layer, *options in cases:
        there_and_back(layer, *options)[0](Triton(lambda: launches))
    found = {}
    for name, _, args, options in launches.calls:
        kinds = tuple((value.dtype if isinstance(value, torch.Tensor) else value) for value in args)
        found[(name, kinds, str(options))] = name, args, options
    for name, args, options in found.values():
        assembled = compile_for(capability, name, args, options)
        assert len(assembled["cubin"]) > 1000
        assert f".target sm_{capability}" in assembled["ptx"]
        assert "atom." not in assembled["ptx"]
    assert {name for name, *_ in found.values()} == {
        "forward", "finish_forward", "finish_groups", "backward", "finish_backward",
    }  # fmt: skip


def test_rows_of_channels_are_read_in_vectors(launches, tmp_path, monkeypatch):
    """16 bytes at a time where channels allow it; what is added to a group's variance keeps the precision of float64."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    own = Triton(lambda: launches)
    there_and_back(Layer((2, 64, 8, 8), dtype=torch.float32), True, True, True, False, False)[0](own)
    passes = [call for call in launches.calls if not call[0].startswith("finish")][:3]
    assert [name for name, *_ in passes] == ["forward", "backward", "backward"]
    for name, _, args, options in passes:
        ptx = compile_for(80, name, args, options)["ptx"]
        tensors = 2 if name == "forward" else 3
        assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) == 2 * tensors, name
    launches.calls.clear()
    there_and_back(Layer((2, 3, 5, 5), FIRST, 3), True, False, True, False, False)[0](own)
    for wanted in ("finish_groups", "finish_backward"):
        name, _, args, options = next(call for call in launches.calls if call[0] == wanted)
        constants = re.findall(r"(?:dense<|constant )([-+.eE\d]+)", compile_for(80, name, args, options)["ttir"])
        assert 1e-5 in map(float, constants), wanted


# Where there is no Triton


def test_without_triton_it_is_said_once_and_nothing_fails(monkeypatch):
    """Not importable, or a launcher that does not build: the reason, at once, and PyTorch's operators."""
    calls = []

    def fails():
        calls.append("fails")
        raise RuntimeError("Failed to find C compiler.\nmore")

    def absent():
        calls.append("absent")
        raise ModuleNotFoundError("No module named 'triton'")

    monkeypatch.setattr(TRITON, "device_types", ("cpu",))
    for kernels, text in (
        (absent, "cannot be imported: No module named 'triton'"),
        (fails, "failed: Failed to find C compiler."),
    ):
        backend._trial.cache_clear()
        monkeypatch.setattr(TRITON, "kernels", kernels)
        assert backend.why_not_triton(torch.device("cpu")) == f"Triton {text}"
        assert backend_for(torch.ones(2, 8), torch.float32) is EAGER
        use_kernels(False)
        assert backend.why_not_triton(torch.device("cpu")) == ""
        use_kernels(True)
    assert calls == ["absent", "fails"]


def test_kernels_that_compute_nonsense_are_not_used(launches, monkeypatch):
    """The trial compares."""
    monkeypatch.setattr(TRITON, "kernels", lambda: launches)
    assert "something else" in backend.why_not_triton(torch.device("cpu"))


def test_a_device_without_triton_gets_a_notice(monkeypatch):
    """As a CPU without a compiler does."""
    monkeypatch.setattr(build, "why_not_triton", lambda device: "the card is old")
    assert build._why_not_compiled(torch.device("cuda", 0)) == "the card is old"
    assert build._why_not_compiled(torch.device("cpu")) == why_not_compiled()


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
        assert backend.why_not_triton(experiment.device) == ""
        # Filters are centred in float32 when a network is made, which kernels and operators round otherwise.
        start = start or copy.deepcopy(experiment.model.state_dict())
        experiment.model.load_state_dict(start)
        list(experiment.trainer.steps())
        found.append(experiment.model.state_dict())
    for name, value in found[0].items():
        assert torch.allclose(value, found[1][name], rtol=1e-8, atol=1e-10), name
