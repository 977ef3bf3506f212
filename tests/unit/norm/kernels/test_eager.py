"""The reference of all backends equals plain autograd through explicit formulas (float64)."""

import pytest
import torch
from conformance import BACKWARD, FIRST, FORWARD, LAST, Layer, backward, compare, forward, means
from torch.nn import functional as F

from bln_train.norm.kernels.backend import EAGER
from bln_train.norm.kernels.table import HORIZON, LARGEST_SQUARE, ProbeRow, Row, StateRow

LAYERS = [
    Layer(shape, order, size)
    for shape, order in (((3, 6, 4, 5), LAST), ((3, 6, 4, 5), FIRST), ((1, 6, 2, 2), LAST), ((4, 6), FIRST), ((2, 6, 5), FIRST))
    for size in (0, 3, 6)
]  # fmt: skip


def per_channel(vector, like):
    """(C,) or (N, C) that multiplies (N, C, *spatial)."""
    return vector.view(-1, vector.shape[-1], *[1] * (like.dim() - 2))


def epilogue(layer, y, xhat, residual, relu):
    """What the layer computes by torch's own functions, from y or from xhat."""
    table = layer.table()
    if layer.group_size:
        num_groups = layer.shape[1] // layer.group_size
        v = F.group_norm(xhat, num_groups, table[Row.OUTER], table[Row.SHIFT], 1e-5)
    else:
        v = per_channel(table[Row.INNER], y) * y + per_channel(table[Row.SHIFT], y)
    v = v if residual is None else v + residual
    return v.relu() if relu else v


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_forward_is_its_formula(layer):
    """Output, each image's sums, the likelihood and the sums of the probe's first images."""
    y, table = layer.y(), layer.table()
    for there in FORWARD:
        xhat = per_channel(table[Row.INVERSE], y) * y
        z = epilogue(layer, y, xhat, layer.drawn(3) if there.residual else None, there.relu)
        num_positions = y[0, 0].numel()
        sums = torch.stack((means(y), means(y * y)), 1) * num_positions
        nll = 0.5 + (table[Row.NLL_SQUARE] * means(y * y).sum(0) + len(y) * table[Row.NLL_IMAGE]).sum()
        probe = layer.rows(2, 4) + sums[: there.num_probe or 0].sum(0)
        compare(layer, forward(EAGER, layer, there), {"z": z, "sums": sums, "nll": nll, "probe": probe})
    for relu in (True, False):
        mapped = layer.y()
        EAGER.map_(mapped, layer.drawn(3), layer.epilogue(relu))
        xhat = per_channel(table[Row.INVERSE], y) * y
        compare(layer, {"y": mapped}, {"y": epilogue(layer, y, xhat, layer.drawn(3), relu)})


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer.group_size == 0], ids=str)
def test_following_is_its_formula(layer):
    """The ratio of deviations under new and old weights, guarded where images hardly vary, and the floor."""
    table = layer.rows(len(ProbeRow), 5).abs()
    unit = layer.rows(1, 6)[0].abs()
    for eps, units in ((1e-3, unit), (2.0, None)):
        x = layer.y() * (1 if units is None else per_channel(units, layer.y()))
        num = x.numel() // x.shape[1]
        variance, mean = torch.var_mean(x, [axis for axis in range(x.dim()) if axis != 1], correction=0)
        guard = (1e-4 + 1 / num) * table[ProbeRow.STD] ** 2
        std = table[ProbeRow.STD] * ((variance + guard) / (table[ProbeRow.OLD_VARIANCE] + guard)).sqrt()
        std, change = std.clamp(min=eps), mean + table[ProbeRow.DRIFT]
        out = per_channel(table[ProbeRow.GAMMA] / std, x) * (x - per_channel(change, x))
        out = (out + per_channel(table[ProbeRow.BETA], x) + layer.drawn(3)).relu()
        y = layer.y()
        found = EAGER.follow_(y, layer.drawn(3), table, units, eps, relu=True)
        compare(layer, {"y": y, "mean": found[0], "std": found[1]}, {"y": out, "mean": change, "std": std})


def sums(tensor):
    """Over images and positions, (C,)."""
    return means(tensor).sum(0) * tensor[0, 0].numel()


def corrected(layer, weight, h, xhat, state):
    """h of each image, in the norm's output, less its correction; the state goes on in place."""
    left = h.clone()
    for n in range(len(h)):
        first, second = means(xhat)[n], means(xhat * xhat)[n]
        damping = (LARGEST_SQUARE / (1 + second)).clamp(max=1).sqrt()
        shift, slope = damping * (layer.rows(2, 8) + state[:2] / state[2].clamp(min=HORIZON))
        left[n] -= weight * (per_channel(shift, h) + per_channel(slope, h) * xhat[n])[0]
        state[0] += damping * (means(h)[n] / weight - shift - slope * first)
        state[1] += damping * (means(h * xhat)[n] / weight - shift * first - slope * second)
        state[2] -= 1
    return left


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_backward_is_that_of_autograd_less_the_correction(layer):
    """The gradients of y, of what enters the relu, of the groups and of the norm; what each image leaves to those after it."""
    table = layer.table()
    for back in BACKWARD:
        y = layer.y().requires_grad_()
        xhat = (per_channel(table[Row.INVERSE], y.detach()) * y.detach()).requires_grad_()
        residual = torch.zeros_like(y, requires_grad=True)
        (epilogue(layer, y, xhat, residual, back.relu) * layer.drawn(7)).sum().backward()
        g = residual.grad
        # Without groups h is the gradient of the norm's output, with them that of xhat.
        h, xhat, y = xhat.grad if layer.group_size else g, xhat.detach(), y.detach()
        state, weight = layer.rows(len(StateRow), 9), back.loss_weight or 0.0
        state[StateRow.TO_COME] = HORIZON + 1
        left = corrected(layer, weight, h, xhat, state) if back.corrects and weight else h
        of_mean = table[Row.MEAN_MOMENT] * means(y).sum(0)
        of_raw = table[Row.RAW_MOMENT] * means(y * y).sum(0) + len(y) * table[Row.RAW_IMAGE]
        vectors = [of_mean * weight, of_raw * weight, sums(h * xhat), sums(h)]
        if layer.group_size:
            u = F.group_norm(xhat, layer.shape[1] // layer.group_size, eps=1e-5)
            vectors += [sums(g * u), sums(g)]
        expected = {"grad_y": per_channel(table[Row.INNER], y) * left, **({} if back.inner is None else {"inner": g})}
        expected |= {f"vector {n}": 1 + vector for n, vector in enumerate(vectors)}
        expected |= {row.name: state[row] for row in StateRow}
        compare(layer, backward(EAGER, layer, back), expected)
