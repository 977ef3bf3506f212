"""Bytes and seconds as people read them. No torch here."""

from __future__ import annotations

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
