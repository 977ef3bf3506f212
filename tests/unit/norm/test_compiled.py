"""The compiled kernels compute what PyTorch's operators compute, and their absence costs nothing but time."""

import copy
import itertools
import os
import stat

import pytest
import torch
from bln_train.norm.kernels.epilogue import Row, backward, forward_, map_, sums_of
from helpers import advance, largest_difference, state, tiny_recipe

from bln_train.build import runtime
from bln_train.build.experiment import build_experiment
from bln_train.norm.kernels import compiled, epilogue
from bln_train.norm.kernels.feedback import HORIZON, BalanceRow
from bln_train.norm.probe import Following, FollowRow
from bln_train.norm.standardize import RawGradient, centre_filters, filter_scale

pytestmark = pytest.mark.skipif(bool(compiled.why_not_compiled()), reason="needs a C compiler")


@pytest.fixture(autouse=True)
def as_found():
    yield
    compiled.use_compiled(True)
    compiled._build.cache_clear()


def drawn(shape, dtype, seed):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return tensor.to(memory_format=torch.channels_last) if len(shape) == 4 else tensor


def on_both_paths(run):
    found = []
    for wanted in (True, False):
        compiled.use_compiled(wanted)
        assert (epilogue.kernels_for(torch.zeros(1, 8), torch.float32) is not None) == wanted
        found.append(run())
    return found


def close(one, other, dtype):
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    assert largest_difference(one, other) < tolerance


# More rows than a tile, fewer, and one; more channels than fit a tile of the smallest height; two threads.
SHAPES = [(5, 8, 9, 7), (1, 256, 3, 3), (3, 16), (2, 16, 40, 40)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ["identity", "relu", "leaky_relu"])
def test_both_paths_forward(shape, activation, dtype):
    """Result, sums, likelihood and the probe's sums, with and without residual, at one thread and at two."""
    table = drawn((len(Row), shape[1]), dtype, 1)
    table[Row.SPREAD].abs_()

    def run(residual, watched, threads):
        torch.set_num_threads(threads)
        z, nll = drawn(shape, dtype, 2), torch.full((), 0.5, dtype=dtype)
        r = drawn(shape, dtype, 3) if residual else None
        seen = torch.ones(4, shape[1], dtype=dtype) if watched else None
        sums = forward_(z, r, table, activation, 0.1, nll, watched, seen)
        mapped = drawn(shape, dtype, 2)
        map_(mapped, r, table[:2].contiguous(), activation, 0.1)
        out = {"z": z, "nll": nll, "sums": sums, "map": mapped, "sums of": sums_of(drawn(shape, dtype, 2), dtype)}
        if seen is not None and activation != "relu":
            seen = seen[:2]  # the rest is defined for a relu
        return out | ({} if seen is None else {"seen": seen})

    try:
        for residual, watched, threads in itertools.product((False, True), (0, 1), (1, 2)):
            close(*on_both_paths(lambda r=residual, w=watched, t=threads: run(r, w, t)), dtype)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ["identity", "relu", "leaky_relu"])
def test_both_paths_backward(shape, activation, dtype):
    """Both gradients, the four vectors and the correction's state, for q read off z and q given, corrected or not, overwriting or
    not."""
    table, sums = drawn((len(Row), shape[1]), dtype, 1), drawn((shape[0], 2, shape[1]), dtype, 2)
    table[Row.SPREAD].abs_()
    sums[:, 1].abs_().mul_(
        20 * sums[0, 0].numel()
    )  # of squares; some images are so wide that their correction is scaled down

    def run(residual, given, corrects, overwrite):
        z = epilogue.activate_(drawn(shape, dtype, 3), activation, 0.1)
        vectors = torch.ones(4, shape[1], dtype=dtype)
        grad_out = drawn(shape, dtype, 4)
        prior, state = drawn((2, shape[1]), dtype, 7), drawn((len(BalanceRow), shape[1]), dtype, 8)
        state[BalanceRow.TO_COME] = HORIZON + 1  # fewer than come
        grad, grad_y = backward(
            grad_out, z, drawn(shape, dtype, 5) if given else None, drawn(shape, dtype, 6) if residual else None, table,
            sums, torch.full((), 0.3, dtype=dtype), activation, 0.1, vectors,
            prior=prior if corrects else None, state=state if corrects else None, wants_grad=residual, may_overwrite=overwrite,
        )  # fmt: skip
        if not overwrite:
            assert torch.equal(grad_out, drawn(shape, dtype, 4))
        return {"grad_y": grad_y, "vectors": vectors, "state": state} | ({"grad": grad} if residual else {})

    for options in itertools.product((False, True), repeat=4):
        close(*on_both_paths(lambda o=options: run(*o)), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ["identity", "relu", "leaky_relu"])
def test_both_paths_of_the_probe(shape, activation, dtype):
    """Result and new statistics, with and without residual and unit, shared or not, floored at eps or not."""
    table = drawn((len(FollowRow), shape[1]), dtype, 1)
    table[: FollowRow.DRIFT].abs_()

    def run(residual, unit, shared, eps):
        own = table.clone()
        if shared:
            own[: FollowRow.GAMMA] = own[: FollowRow.GAMMA, :1]  # one mean and one std
        following = Following(own, eps=eps, shared=shared)
        y = drawn(shape, dtype, 2)
        following.normalize_(
            y,
            drawn(shape, dtype, 3) if residual else None,
            drawn((shape[1],), dtype, 4) if unit else None,
            activation,
            0.1,
        )
        return {"y": y, "found": following.found}

    for options in itertools.product((False, True), (False, True), (False, True), (1e-3, 2.0)):
        close(*on_both_paths(lambda o=options: run(*o)), dtype)


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


def test_a_nan_stays_one():
    """A relu may not turn a diverged network into a healthy one."""
    table = torch.ones(len(Row), 8)
    for activation in ("identity", "relu", "leaky_relu"):
        z = torch.full((2, 8), torch.nan)
        forward_(z, None, table, activation, 0.1, torch.zeros(()))
        assert bool(z.isnan().all())
        _, grad_y = backward(
            torch.full((2, 8), torch.nan), torch.ones(2, 8), None, None, table, torch.zeros(2, 2, 8), None, activation, 0.1,
            torch.zeros(4, 8), prior=None, state=None, wants_grad=False, may_overwrite=False,
        )  # fmt: skip
        assert bool(grad_y.isnan().all())


def test_what_kernels_do_not_take_goes_to_pytorch():
    """Channels that fill no vector, another memory order, another precision."""
    for tensor in (
        torch.zeros(2, 6, 4, 4).to(memory_format=torch.channels_last),
        torch.zeros(2, 8, 4, 4),
        torch.zeros(2, 8).half(),
    ):
        assert epilogue.kernels_for(tensor, torch.float32) is None
    assert epilogue.kernels_for(torch.zeros(2, 8), torch.float64) is None


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
    compiled._build.cache_clear()
    assert compiled.library("float") is None
    experiment = build_experiment(tiny_recipe())
    notice = next(n for n in experiment.notices if "slower" in n)
    assert ("no C compiler" if kind == "absent" else "out of registers") in notice
    assert len(advance(experiment.trainer, 1)) > 0
    assert not list((tmp_path / "bln-train" / "kernels").glob("*")) if kind == "broken" else True


def test_a_kernel_is_built_once(tmp_path, monkeypatch):
    """The second process loads what the first one built; nothing half-built lies beside it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled._build.cache_clear()
    assert compiled.library("float") is not None
    (built,) = (tmp_path / "bln-train" / "kernels").iterdir()
    before = built.stat().st_mtime_ns
    compiled._build.cache_clear()
    monkeypatch.setattr(compiled, "_compile", lambda *_: pytest.fail("it was built again"))
    assert compiled.library("float") is not None
    assert built.stat().st_mtime_ns == before


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs POSIX owners")
def test_a_cache_of_somebody_else_is_not_used(tmp_path, monkeypatch):
    """What is loaded runs: it comes from a folder of our own, or from a new one that goes with the process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    folder = compiled._folder()
    assert tmp_path not in folder.parents
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs POSIX modes")
def test_a_cache_that_others_can_write_is_not_used(tmp_path, monkeypatch):
    """Nor from a folder into which anybody may put something."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "bln-train" / "kernels").mkdir(parents=True)
    assert compiled._folder() == tmp_path / "bln-train" / "kernels"
    (tmp_path / "bln-train" / "kernels").chmod(0o777)
    assert tmp_path not in compiled._folder().parents
