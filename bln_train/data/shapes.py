"""Drawn images of ten shapes: a data set that needs no download, hard enough to tell trainers apart.

A shape is a signed distance d(p), negative inside, on a rotated, scaled and shifted pixel grid. Coverage is
clamp(1/2 - d, 0, 1) with d in pixels. Uniform draws, sums, products and square roots come out the same on any machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

CLASS_NAMES = ("bars", "crescent", "cross", "disc", "ell", "frame", "ring", "square", "star", "triangle")
_SIDE = 32
_Uniform = Callable[..., Tensor]  # (low, high, *shape) to (n, *shape)


def draw_shapes(num_images: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Draw images of shapes with balanced labels; (num_images, seed) determines them.

    Args:
        num_images: N; class counts differ by at most one.
        seed: of the drawing.

    Returns: images (N, 3, 32, 32) uint8 and labels (N,) int64 into `CLASS_NAMES`.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_images) % len(CLASS_NAMES)
    chunks = [_draw(chunk, generator) for chunk in labels.split(500)]  # a chunk's temporaries stay in cache
    images = torch.cat(chunks) if chunks else torch.empty(0, 3, _SIDE, _SIDE, dtype=torch.uint8)
    return images, labels


def _draw(labels: Tensor, generator: torch.Generator) -> Tensor:
    n = len(labels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator) * (high - low) + low

    axis = torch.arange(_SIDE) - (_SIDE - 1) / 2
    y, x = axis.view(1, -1, 1), axis.view(1, 1, -1)
    image = _background(x, y, uniform)
    # A thin line and a small disc that say nothing about the class, below the shape.
    u, v = _rotate(x, y, uniform)
    line = (u - uniform(-14, 14, 1, 1)).abs() - uniform(0.3, 1.0, 1, 1)
    blob = _norm(x - uniform(-15, 15, 1, 1), y - uniform(-15, 15, 1, 1)) - uniform(1.0, 3.0, 1, 1)
    for distance in (line, blob):
        shown = (uniform(0, 1, 1, 1) < 0.4).float()
        image = _paint(image, shown * _coverage(distance), uniform(0, 1, 3, 1, 1))
    # The shape: brighter than its surroundings by a varying amount in each colour channel, shaded along a line.
    colour = image.mean(dim=(2, 3)) + uniform(0.1, 0.6, 3)
    u, v = _rotate(x - uniform(-3, 3, 1, 1), y - uniform(-3, 3, 1, 1), uniform, 0.5)
    size = uniform(8.0, 13.0, 1, 1)
    u, v = u * uniform(0.85, 1.15, 1, 1), v * uniform(0.85, 1.15, 1, 1)
    distance = torch.empty(n, _SIDE, _SIDE)
    for label, distance_to in enumerate(_DISTANCES):
        members = labels == label
        distance[members] = distance_to(u[members] / size[members], v[members] / size[members]) * size[members]
    shade = uniform(-0.015, 0.015, 1, 1) * x + uniform(-0.015, 0.015, 1, 1) * y
    opacity = uniform(0, 3, 1, 1).clamp_max(1)  # a few shapes nearly vanish: no trainer gets all of them
    image = _paint(image, opacity * _coverage(distance), colour.view(n, 3, 1, 1) + shade.unsqueeze(1))
    # Camera: contrast, brightness, and noise that is a sum of two uniform draws.
    image = (image - 0.5) * uniform(0.6, 1.1, 1, 1, 1) + 0.5 + uniform(-0.12, 0.12, 1, 1, 1)
    noise = uniform(-1, 1, 3, _SIDE, _SIDE) + uniform(-1, 1, 3, _SIDE, _SIDE)
    image = image + noise * uniform(0.0, 0.08, 1, 1, 1)
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def _background(x: Tensor, y: Tensor, uniform: _Uniform) -> Tensor:
    """(n, 3, 32, 32): two colours mixed by one of a gradient, stripes, a checkerboard or smooth noise."""
    u, v = _rotate(x, y, uniform)
    period = uniform(5, 16, 1, 1)
    stripes, across = _wave(u / period + uniform(0, 1, 1, 1)), _wave(v / period)
    gradient = u / 44 + 0.5
    stripes_sharp = (stripes * 4 - 1.5).clamp(0, 1)
    across_sharp = (across * 4 - 1.5).clamp(0, 1)
    checker = stripes_sharp + across_sharp - 2 * stripes_sharp * across_sharp
    grid = uniform(0, 1, 6, 6)
    place = torch.arange(_SIDE) * (5 / _SIDE)
    low, t = place.long(), place - place.floor()
    grid = grid[:, low] * (1 - t).unsqueeze(1) + grid[:, low + 1] * t.unsqueeze(1)
    blobs = grid[:, :, low] * (1 - t) + grid[:, :, low + 1] * t
    kind = uniform(0, 4, 1, 1).long()
    mix = torch.where(kind < 2, torch.where(kind == 0, gradient, stripes), torch.where(kind == 2, checker, blobs))
    first, second = uniform(0, 0.6, 3, 1, 1), uniform(0, 0.6, 3, 1, 1)
    return first + (second - first) * mix.clamp(0, 1).unsqueeze(1)


def _rotate(x: Tensor, y: Tensor, uniform: _Uniform, largest: float = math.pi) -> tuple[Tensor, Tensor]:
    angle = uniform(-largest, largest, 1, 1).double()  # the last bit of sine and cosine differs between machines:
    cos, sin = angle.cos().float(), angle.sin().float()  # rounding to float hides it
    return x * cos + y * sin, y * cos - x * sin


def _norm(*parts: Tensor) -> Tensor:
    return sum((part**2 for part in parts), torch.zeros(())).sqrt()


def _wave(t: Tensor) -> Tensor:
    """Triangle wave of period 1 in [0, 1]."""
    return ((t - t.floor()) * 2 - 1).abs()


def _coverage(distance: Tensor) -> Tensor:
    return (0.5 - distance).clamp(0, 1)


def _paint(image: Tensor, coverage: Tensor, colour: Tensor) -> Tensor:
    return image + (colour - image) * coverage.unsqueeze(1)


# Distances of the shapes, which reach to about 1 from the origin.


def _box(u: Tensor, v: Tensor, half_width: float, half_height: float) -> Tensor:
    return torch.maximum(u.abs() - half_width, v.abs() - half_height)


def _bars(u: Tensor, v: Tensor) -> Tensor:
    return _box(u.abs() - 0.52, v, 0.22, 0.85)


def _crescent(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(_norm(u, v) - 0.95, 0.75 - _norm(u - 0.5, v))


def _cross(u: Tensor, v: Tensor) -> Tensor:
    return torch.minimum(_box(u, v, 0.95, 0.25), _box(u, v, 0.25, 0.95))


def _disc(u: Tensor, v: Tensor) -> Tensor:
    return _norm(u, v) - 0.8


def _ell(u: Tensor, v: Tensor) -> Tensor:
    return torch.minimum(_box(u + 0.5, v, 0.25, 0.85), _box(u, v - 0.6, 0.75, 0.25))


def _frame(u: Tensor, v: Tensor) -> Tensor:
    return _box(u, v, 0.65, 0.65).abs() - 0.16


def _ring(u: Tensor, v: Tensor) -> Tensor:
    return (_norm(u, v) - 0.75).abs() - 0.17


def _square(u: Tensor, v: Tensor) -> Tensor:
    return _box(u, v, 0.72, 0.72)


def _star(u: Tensor, v: Tensor) -> Tensor:
    """A pentagram is where at most one of the five sides of its inner pentagon is crossed: second-largest distance."""
    angles = [2 * math.pi * k / 5 for k in range(5)]
    sides = torch.stack([u * math.cos(a) + v * math.sin(a) - 0.4 for a in angles])
    return sides.topk(2, dim=0).values[1]


def _triangle(u: Tensor, v: Tensor) -> Tensor:
    angles = [2 * math.pi * k / 3 for k in range(3)]
    return torch.stack([u * math.cos(a) + v * math.sin(a) - 0.5 for a in angles]).amax(0)


_DISTANCES = (_bars, _crescent, _cross, _disc, _ell, _frame, _ring, _square, _star, _triangle)  # as CLASS_NAMES
