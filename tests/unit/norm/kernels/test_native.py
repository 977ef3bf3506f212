"""The kernels in C compute what PyTorch's operators compute, and their absence costs nothing but time."""

import copy
import itertools
import os
import stat

import pytest
import torch
from conformance import (
    BACKWARD,
    FIRST,
    FOLLOW,
    FORWARD,
    LAST,
    MAP,
    Layer,
    check_backward,
    check_follow,
    check_forward,
    check_map,
    check_not_finite,
    check_same_bits,
)
from helpers import advance, largest_difference, state, tiny_recipe

from bln_train.build import runtime
from bln_train.build.experiment import build_experiment
from bln_train.norm.kernels import library
from bln_train.norm.kernels.backend import EAGER, FAKE_TRITON, NATIVE, backend_for
from bln_train.norm.kernels.fake import FakeKernels
from bln_train.norm.kernels.table import pretending, use_kernels
from bln_train.norm.standardize import RawGradient, centre_filters, filter_scale

pytestmark = pytest.mark.skipif(bool(library.why_not_compiled()), reason="needs a C compiler")
# More rows than a tile, fewer, and one; more channels than fit a tile of the smallest height.
SMALL = [(5, 8, 9, 7), (1, 256, 3, 3), (3, 16)]
# Several blocks of images, and one image, that two threads share.
LARGE = [(3, 16, 27, 27), (1, 32, 34, 34)]


@pytest.fixture(autouse=True)
def as_found():
    yield
    torch.set_num_threads(1)
    use_kernels(True)
    library._build.cache_clear()


def check_passes(layer, step):
    """Each `step`th way to run every pass of a layer."""
    assert backend_for(layer.y(), layer.dtype) is NATIVE
    for there in FORWARD[::step]:
        check_forward(NATIVE, layer, there)
    for options in MAP[::step]:
        check_map(NATIVE, layer, *options)
    for options in FOLLOW[::step] if layer.group_size == 0 else ():
        check_follow(NATIVE, layer, *options)
    for back in BACKWARD[::step]:
        check_backward(NATIVE, layer, back)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("group_size", [0, 8])
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_all_passes_are_those_of_the_reference(shape, group_size, dtype):
    """tests/support/conformance.py."""
    check_passes(Layer(shape, LAST if len(shape) == 4 else FIRST, group_size, dtype), 1)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("group_size", [0, 8])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_threads_share_a_layer(shape, group_size, threads):
    """Some ways to run each pass of layers that are large enough; threads add their sums in one order."""
    torch.set_num_threads(threads)
    layer = Layer(shape, LAST, group_size, torch.float32 if group_size else torch.float64)
    check_passes(layer, 9 if threads > 1 else 3)  # threads that wait for a busy core take long
    check_same_bits(NATIVE, layer)


@pytest.mark.parametrize("group_size", [0, 4])
def test_a_nan_stays_one(group_size):
    """One value in one of several images, and in a single one."""
    for shape in ((2, 8, 3, 3), (1, 8, 3, 3)):
        check_not_finite(NATIVE, Layer(shape, LAST, group_size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_residual_is_taken_as_it_comes(dtype):
    """In another memory order, expanded, or of another precision."""
    layer = Layer((2, 8, 4, 4), LAST, 0, dtype)
    other = torch.float64 if dtype == torch.float32 else torch.float32
    for residual in (
        layer.drawn(3).contiguous(),
        layer.drawn(3)[:, :, :1, :1].expand(layer.shape),
        layer.drawn(3)[:1].expand(layer.shape),
        layer.drawn(3).to(other),
    ):
        found = []
        for backend in (NATIVE, EAGER):
            y, mapped, followed = (layer.y() for _ in range(3))
            backend.forward(y, y, residual, layer.epilogue(relu=True), torch.zeros((), dtype=dtype), None)
            backend.map_(mapped, residual, layer.epilogue(relu=True))
            backend.follow_(followed, residual, layer.rows(5, 5).abs(), None, 1e-3, relu=True)
            found.append({"y": y, "mapped": mapped, "followed": followed})
        close(*found, dtype)


def drawn(shape, dtype, seed):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return tensor.to(memory_format=torch.channels_last) if len(shape) == 4 else tensor


def on_both_paths(run):
    found = []
    for wanted in (True, False):
        use_kernels(wanted)
        assert (library.library("float") is not None) == wanted
        found.append(run())
    return found


def close(one, other, dtype):
    assert largest_difference(one, other) < (1e-12 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("held", [False, True])
def test_both_paths_project_gradients(dtype, held):
    """Whatever the memory order of weight and gradient, and what the gradient held before stays as it is."""

    def run(order, order_of_grad):
        weight = torch.nn.Parameter(drawn((6, 3, 3, 2), dtype, 1).contiguous(memory_format=order))
        came, before = (drawn((6, 3, 3, 2), dtype, n).contiguous(memory_format=order_of_grad) for n in (2, 3))
        weight.grad = before.clone() if held else None
        raw = RawGradient(weight)
        weight.grad = before + came if held else came
        raw.project()
        # What is left has no mean and, with this scale, nothing along the filter but eps' share.
        left = weight.grad - before if held else weight.grad
        assert float(left.mean((1, 2, 3)).abs().max().detach()) < 1e-6
        along = (left * weight).sum((1, 2, 3)) * raw.scale.flatten() ** 2
        assert float(along.abs().max().detach()) < 1e-3
        return {"grad": weight.grad}

    for orders in itertools.product((torch.contiguous_format, torch.channels_last), repeat=2):
        close(*on_both_paths(lambda o=orders: run(*o)), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_paths_of_standardised_filters(dtype):
    """Centring and scale in every memory order; filters that are centred keep their bits."""

    def run(order):
        weight = (drawn((6, 3, 3, 2), dtype, 1) + 0.5).contiguous(memory_format=order)
        version = weight._version
        centre_filters(weight)
        assert weight._version > version  # autograd may know
        centred = weight.clone(memory_format=torch.preserve_format)
        centre_filters(weight)
        assert torch.equal(weight, centred)
        return {"weight": weight, "scale": filter_scale(weight)}

    for order in (torch.contiguous_format, torch.channels_last):
        close(*on_both_paths(lambda o=order: run(o)), dtype)


def test_the_backend_is_chosen_by_tensor():
    """What no kernel takes goes to PyTorch: channels that fill no vector, another memory order, another precision."""
    for tensor in (
        torch.zeros(2, 6, 4, 4).to(memory_format=LAST),
        torch.zeros(2, 8, 4, 4),
        torch.zeros(2, 8).half(),
        torch.zeros(2, 8, 4),
        torch.zeros(2, 8, device="meta"),
    ):
        assert backend_for(tensor, torch.float32) is EAGER
    y = torch.zeros(2, 8)
    assert backend_for(y, torch.float64) is EAGER
    assert backend_for(y, torch.float32) is NATIVE
    use_kernels(False)
    assert backend_for(y, torch.float32) is EAGER
    with pretending("triton"):  # whatever is wanted here
        assert backend_for(y, torch.float32) is FAKE_TRITON
        assert backend_for(y, torch.float32, torch.zeros(2, 8)[:, :1].expand(2, 8)) is EAGER
    assert backend_for(y, torch.float32) is EAGER


def test_pretended_kernels_compute_nothing():
    """And take what the kernels do: the same results are allocated."""
    layer = Layer((2, 8, 3, 3), dtype=torch.float32)
    with pretending("native"):
        assert isinstance(library.library("float"), FakeKernels)
        assert backend_for(layer.y(), torch.float32) is NATIVE
        y = layer.y()
        sums = NATIVE.forward(y, y, None, layer.epilogue(relu=True), torch.zeros(()), None)
        assert sums.shape == (2, 2, 8)
        assert torch.equal(y, layer.y())
    assert not isinstance(library.library("float"), FakeKernels)


def test_whole_runs_agree_and_say_which_path_they_took():
    """Law 2 across the paths, in float64; the environment names the path."""
    found, start = [], build_experiment(tiny_recipe()).trainer.state_dict()  # weights are drawn and centred in float32
    start = copy.deepcopy(start)
    for wanted in (True, False):
        experiment = build_experiment(tiny_recipe(runtime={"device": "cpu", "compiled": wanted}))
        experiment.trainer.load_state_dict(start)
        assert runtime.environment(experiment.device)["compiled"] is wanted
        advance(experiment.trainer)
        found.append(state(experiment.trainer))
    assert largest_difference(*found) < 1e-10


@pytest.mark.parametrize("kind", ["absent", "broken"])
def test_without_a_compiler_folding_works_and_says_so(kind, tmp_path, monkeypatch):
    """No compiler, or one that fails: PyTorch's operators, and a notice that names the reason."""
    script = tmp_path / "cc"
    if kind == "broken":
        script.write_text("#!/bin/sh\necho 'out of registers' >&2\nexit 1\n")
        script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library._build.cache_clear()
    assert library.library("float") is None
    experiment = build_experiment(tiny_recipe())
    notice = next(n for n in experiment.notices if "slower" in n)
    assert ("no C compiler" if kind == "absent" else "out of registers") in notice
    assert len(advance(experiment.trainer, 1)) > 0
    assert not list((tmp_path / "bln-train" / "kernels").glob("*")) if kind == "broken" else True


def test_a_kernel_is_built_once(tmp_path, monkeypatch):
    """The second process loads what the first one built; nothing half-built lies beside it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library._build.cache_clear()
    assert library.library("float") is not None
    (built,) = (tmp_path / "bln-train" / "kernels").iterdir()
    before = built.stat().st_mtime_ns
    library._build.cache_clear()
    monkeypatch.setattr(library, "_compile", lambda *_: pytest.fail("it was built again"))
    assert library.library("float") is not None
    assert built.stat().st_mtime_ns == before


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs POSIX owners")
def test_a_cache_of_somebody_else_is_not_used(tmp_path, monkeypatch):
    """What is loaded runs: it comes from a folder of our own, or from a new one that goes with the process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    folder = library._folder()
    assert tmp_path not in folder.parents
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs POSIX modes")
def test_a_cache_that_others_can_write_is_not_used(tmp_path, monkeypatch):
    """Nor from a folder into which anybody may put something."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "bln-train" / "kernels").mkdir(parents=True)
    assert library._folder() == tmp_path / "bln-train" / "kernels"
    (tmp_path / "bln-train" / "kernels").chmod(0o777)
    assert tmp_path not in library._folder().parents
