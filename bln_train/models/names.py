"""The names of our networks, so that a recipe can be checked without importing torch."""

from __future__ import annotations

import re

CIFAR_RESNET_DEPTHS = (8, 20, 32, 44, 56, 110)
MODEL_NAMES = (*(f"resnet{depth}" for depth in CIFAR_RESNET_DEPTHS), "resnet18", "wrn16_4", "wrn28_10", "paper_cnn")
TORCHVISION, TIMM = "torchvision:", "timm:"
_WIDE = re.compile(r"wrn(\d+)_(\d+)")


def parse_wide(name: str) -> tuple[int, int] | None:
    """Depth and width factor of a `wrn<depth>_<width>` name, or None for another name."""
    match = _WIDE.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


def is_foreign(name: str) -> bool:
    """Whether a name is `torchvision:<name>` or `timm:<name>`."""
    return name.startswith((TORCHVISION, TIMM))


def check_model_name(name: str) -> str | None:
    """Say what is wrong with a model name, or None."""
    if is_foreign(name):  # whether there is such a model only the library can say, when it is built
        library, _, own = name.partition(":")
        written = re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)?" if library == "timm" else r"[a-z0-9_]+", own)
        return None if written else f"'{name}': write {library}:<name>, such as {library}:resnet50"
    wide = parse_wide(name)
    if wide:
        depth, width = wide
        fits = depth >= 10 and (depth - 4) % 6 == 0 and 1 <= width <= 64
        return None if fits else f"a wide ResNet's depth is 6n+4 and its width 1..64, not {depth} and {width}"
    if name in MODEL_NAMES:
        return None
    import difflib

    near = difflib.get_close_matches(name, MODEL_NAMES, n=1)
    meant = f"did you mean '{near[0]}'? " if near else ""
    return f"unknown model '{name}'; {meant}known: {', '.join(MODEL_NAMES)}, wrn<depth>_<width>, torchvision:<name>, timm:<name>"
