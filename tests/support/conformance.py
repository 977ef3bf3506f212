"""What every backend of norm/kernels computes, by comparison with eager.py on the same tensors.

test_native.py calls these checks for the kernels in C, and triton_conformance.py for those in Triton. test_eager.py compares the
reference itself with autograd.
"""

import itertools
from typing import NamedTuple

import torch

from bln_train.norm.kernels.backend import EAGER
from bln_train.norm.kernels.table import (
    HORIZON,
    LARGEST_SQUARE,
    Correction,
    Epilogue,
    Gradients,
    ProbeRow,
    Row,
    StateRow,
)

LAST, FIRST = torch.channels_last, torch.contiguous_format
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Of a tensor's largest entry; of what is shaped like an image, of each image's."""


class Layer(NamedTuple):
    """Where a layer's tensors lie, and its constants."""

    shape: tuple[int, ...]
    order: torch.memory_format = LAST
    group_size: int = 0
    dtype: torch.dtype = torch.float64
    device: str = "cpu"

    @property
    def real(self):
        """The dtype of constants and sums."""
        return torch.promote_types(self.dtype, torch.float32)

    def drawn(self, seed):
        """A tensor like y."""
        numbers = torch.randn(self.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return numbers.to(self.device, self.dtype).contiguous(memory_format=self.order)

    def y(self):
        """Every second image, and a single one, is so wide that its correction is scaled down."""
        y = self.drawn(1)
        y[(len(y) + 1) % 2 :: 2] *= 6
        return y

    def rows(self, num, seed):
        """Some rows of channels."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(num, self.shape[1], generator=generator, dtype=torch.float64).to(self.device, self.real)

    def table(self):
        """Constants without meaning, but for a positive inverse deviation."""
        table = self.rows(len(Row), 2)
        table[Row.INVERSE] = 0.7 + table[Row.INVERSE].abs()
        if self.group_size:
            table[Row.INNER] = table[Row.INVERSE]
        return table

    def epilogue(self, relu):
        """The constants of a pass."""
        return Epilogue(self.table(), self.group_size, 1e-5, relu)


def means(tensor):
    """Over positions, (N, C)."""
    return tensor.reshape(*tensor.shape[:2], -1).mean(2)


# ---- forward ----


class There(NamedTuple):
    """One way to run `forward`."""

    relu: bool
    residual: bool
    num_probe: int | None
    in_place: bool


FORWARD = [There(*options) for options in itertools.product((True, False), (True, False), (2, None, 0), (True, False))]


def forward(backend, layer, there):
    """z, sums, likelihood and the probe's sums."""
    y = layer.y()
    residual = layer.drawn(3) if there.residual else None
    z = y if there.in_place else torch.full_like(y, torch.nan)
    nll, probe = torch.full((), 0.5, dtype=layer.real, device=layer.device), layer.rows(2, 4)
    of_probe = None if there.num_probe is None else (min(there.num_probe, len(y)), probe)
    sums = backend.forward(y, z, residual, layer.epilogue(there.relu), nll, of_probe)
    assert there.in_place or torch.equal(y, layer.y())
    assert residual is None or torch.equal(residual, layer.drawn(3))
    return {"z": z, "sums": sums, "nll": nll, "probe": probe}


def check_forward(backend, layer, there):
    """Compare z, sums, likelihood and the probe's sums."""
    compare(layer, *(forward(one, layer, there) for one in (backend, EAGER)))


MAP = list(itertools.product((True, False), repeat=2))


def check_map(backend, layer, relu, residual):
    """Compare the map of inference, whose table ends with the rows that it needs."""
    found = []
    for one in (backend, EAGER):
        y = layer.y()
        epilogue = layer.epilogue(relu)
        few = epilogue.table[: Row.OUTER + 1 if layer.group_size else Row.SHIFT + 1].contiguous()
        one.map_(y, layer.drawn(3) if residual else None, epilogue._replace(table=few))
        found.append({"y": y})
    compare(layer, *found)


FOLLOW = list(itertools.product((True, False), (True, False), (True, False), (1e-3, 2.0)))


def check_follow(backend, layer, relu, residual, unit, eps):
    """Compare the probe's forward: result and new statistics; with an eps of 2 most deviations are at their bound."""
    found = []
    for one in (backend, EAGER):
        table = layer.rows(len(ProbeRow), 5)
        table[: ProbeRow.DRIFT].abs_()
        y = layer.y()
        units = layer.rows(1, 6)[0].abs() if unit else None
        moved = one.follow_(y, layer.drawn(3) if residual else None, table, units, eps, relu=relu)
        found.append({"y": y, "mean": moved[0], "std": moved[1]})
    compare(layer, *found)


# ---- backward ----


class Back(NamedTuple):
    """One way to run `backward`; tensors that are written are "y", "grad" (the gradient that comes in), new, or not wanted."""

    relu: bool
    grad_y: str
    inner: str | None
    corrects: bool
    loss_weight: float | None


_PLACES = [
    *((False, place, None) for place in ("y", "grad", "new")),  # without a relu g is the gradient that comes in
    *((True, place, inner) for place in ("y", "grad", "new") for inner in (None, "new", "grad") if (place, inner) != ("grad",) * 2),
]  # fmt: skip
_LOSSES = [(True, 0.3), (False, 0.3), (True, None), (True, 0.0)]
BACKWARD = [Back(*place, *loss) for place, loss in itertools.product(_PLACES, _LOSSES)]


def backward(backend, layer, back, y=None, grad_z=None):
    """The gradients, all vectors and the state that goes on; fewer images are to come than do."""
    given = layer.y() if y is None else y
    came = layer.drawn(7) if grad_z is None else grad_z
    epilogue = layer.epilogue(back.relu)
    z, nll = torch.empty_like(given), torch.zeros((), dtype=layer.real, device=layer.device)
    sums = EAGER.forward(given, z, None, epilogue, nll, None)
    # Of one path for both: in low precision each rounds another entry to 0, where the gradient jumps.
    y, grad_z = given.clone(memory_format=torch.preserve_format), came.clone(memory_format=torch.preserve_format)
    new = [torch.full_like(y, torch.nan) for _ in range(2)]
    gradients = Gradients(
        {"y": y, "grad": grad_z, "new": new[0]}[back.grad_y],
        None if back.inner is None else {"grad": grad_z, "new": new[1]}[back.inner],
        torch.ones(6 if layer.group_size else 4, layer.shape[1], dtype=layer.real, device=layer.device),
    )
    weight = None if back.loss_weight is None else torch.full_like(nll, back.loss_weight)
    state = layer.rows(len(StateRow), 9)
    state[StateRow.TO_COME] = HORIZON + 1
    correction = Correction(weight, layer.rows(2, 8), state) if back.corrects else Correction(weight)
    backend.backward(grad_z, z if back.relu else None, y, sums, epilogue, correction, gradients)
    assert back.grad_y == "y" or torch.equal(y, given) or given.isnan().any()
    assert "grad" in (back.grad_y, back.inner) or torch.equal(grad_z, came) or came.isnan().any()
    vectors = {f"vector {n}": vector for n, vector in enumerate(gradients.vectors)}
    rows = {row.name: state[row] for row in StateRow}
    inner = {} if gradients.inner is None else {"inner": gradients.inner}
    return {"grad_y": gradients.y, **inner, **vectors, **rows}


def check_backward(backend, layer, back):
    """Compare gradients, vectors and state."""
    if back.corrects and layer.group_size == 0:
        square = layer.table()[Row.INVERSE] ** 2 * means(layer.y().to(layer.real).square())
        assert bool((1 + square > LARGEST_SQUARE).any())
    found = backward(backend, layer, back)
    compare(layer, found, backward(EAGER, layer, back))
    if back.corrects and not back.loss_weight:  # no gradient, from which nothing was taken
        state = layer.rows(len(StateRow), 9)
        assert torch.equal(found["LEFT_SLOPE"], state[StateRow.LEFT_SLOPE])


# ---- of all ----


def compare(layer, found, expected):
    """Assert that two dictionaries of results hold the same numbers."""
    assert found.keys() == expected.keys()
    for name, other in expected.items():
        own = found[name]
        assert (own.shape, own.dtype) == (other.shape, other.dtype), name
        pairs = zip(own, other, strict=True) if own.shape == layer.shape else [(own, other)]
        for n, (one, two) in enumerate(pairs):
            one, two = one.to(layer.real), two.to(layer.real)
            largest = float(two.abs().max())
            assert float((one - two).abs().max()) <= TOLERANCES[layer.dtype] * largest, (name, n)


def check_same_bits(backend, layer):
    """Sums are taken in one order."""
    for run in (lambda: forward(backend, layer, FORWARD[0]), lambda: backward(backend, layer, BACKWARD[0])):
        assert all(torch.equal(one, two) for one, two in zip(run().values(), run().values(), strict=True))


def check_not_finite(backend, layer):
    """A relu may not turn a diverged network into a healthy one: what is a NaN in eager is one, and a NaN stays one."""
    for value, relu in itertools.product((torch.nan, torch.inf), (True, False)):
        y, grad_z = layer.y(), layer.drawn(7)
        first = (0,) * len(layer.shape)
        y[first] = grad_z[first] = value
        found = []
        for one in (backend, EAGER):
            copies = [y.clone(memory_format=torch.preserve_format) for _ in range(3)]
            nll = torch.zeros((), dtype=layer.real, device=layer.device)
            sums = one.forward(y, copies[0], None, layer.epilogue(relu), nll, None)
            one.map_(copies[1], None, layer.epilogue(relu))
            moved = one.follow_(copies[2], None, layer.rows(len(ProbeRow), 5).abs(), None, 1e-3, relu=relu)
            back = Back(relu, "new", "new" if relu else None, True, 0.3)
            gradients = backward(one, layer, back, y, grad_z)
            if value != value:
                assert all(bool(tensor[first].isnan()) for tensor in (*copies, gradients["grad_y"]))
                assert bool(moved[:, 0].isnan().all())
            found.append([result.isnan() for result in (*copies, nll, sums, moved, *gradients.values())])
        assert all(torch.equal(own, other) for own, other in zip(*found, strict=True)), (value, relu)
