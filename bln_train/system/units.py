"""Bytes and seconds as people read them. No torch here."""

from __future__ import annotations

import re

CUDA_CONTEXT_BYTES = 400 * 2**20
"""What CUDA's context is assumed to take of a device in predictions and budgets; no program can ask."""
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")


def format_bytes(num_bytes: float | None) -> str:
    """Format a byte count with a binary prefix, `-` where nothing was measured.

    >>> format_bytes(1536), format_bytes(None)
    ('1.50 KiB', '-')
    """
    if num_bytes is None:
        return "-"
    value, power = float(num_bytes), 0
    while abs(value) >= 1024 and power < len(_BINARY) - 1:
        value, power = value / 1024, power + 1
    return f"{value:.0f} B" if power == 0 else f"{value:.2f} {_BINARY[power]}"


_UNITS = {"": 1, "B": 1, **{f"{p}iB": 2 ** (10 * n) for n, p in enumerate("KMGT", 1)}}
_UNITS |= {f"{p}B": 10 ** (3 * n) for n, p in enumerate("KMGT", 1)}


def parse_bytes(text: str) -> int:
    """Read a byte count: a number and B, KiB, MiB, GiB, TiB or KB, MB, GB, TB, in any case; raises ValueError.

    >>> parse_bytes("4GiB"), parse_bytes("1.5 kb"), parse_bytes("512")
    (4294967296, 1500, 512)
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text, re.ASCII)
    unit = next((size for name, size in _UNITS.items() if match and name.lower() == match[2].lower()), None)
    if match is None or unit is None or not 0 < float(match[1]) * unit < 2**63:
        raise ValueError(f"'{text}' is not a size above 0, like 4GiB or 800MiB")
    return round(float(match[1]) * unit)


def format_seconds(seconds: float | None) -> str:
    """Format a duration as `4.2 s`, `3:05` or `1:02:03`, `-` where nothing was measured.

    >>> format_seconds(4.2), format_seconds(185), format_seconds(3723)
    ('4.2 s', '3:05', '1:02:03')
    """
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_percent(fraction: float | None) -> str:
    """A fraction as percent, `-` where there is none."""
    return "-" if fraction is None else f"{100 * fraction:.2f} %"


def format_number(value: float | None, digits: int = 3) -> str:
    """A number with fixed decimals, `-` where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"
