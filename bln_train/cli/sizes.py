"""Lists of batch sizes as people write them. No torch here."""

from __future__ import annotations

from collections.abc import Sequence

from bln_train.errors import UsageError

DOTS = "..."
_MOST_SIZES = 1000


def parse_size(text: str, option: str, example: str = "1,8,64") -> int:
    """A batch size, at least 1; raises UsageError on anything else, naming `option`."""
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text)):
        raise UsageError(f"{option}: '{text}' is not a batch size", f"Example: {option} {example}")
    return int(text)


def expand_dots(parts: Sequence[str], option: str) -> list[str]:
    """Write out a list in which `...` continues the sizes before it up to the one after it; other lists stay as they are.

    The sizes before it rise by equal steps or by an equal whole factor, and the list ends exactly at the one after it. Two
    sizes may be begun both ways: then only one of the ways may end there.

    >>> expand_dots(["1", "2", "4", "...", "32", "full"], "--micro-batch")
    ['1', '2', '4', '8', '16', '32', 'full']
    >>> expand_dots(["2", "4", "6", "...", "12"], "--effective-batch")
    ['2', '4', '6', '8', '10', '12']

    Raises:
        UsageError: `...` stands twice, or has fewer than two sizes before it or none after it; no way or both ways lead there.
    """
    if DOTS not in parts:
        return list(parts)
    at, written = parts.index(DOTS), f"{option} {','.join(parts)}"
    if parts.count(DOTS) > 1 or at < 2 or at + 1 == len(parts):
        raise UsageError(
            f"{written}: one `{DOTS}` stands between at least two sizes and the last one",
            f"Example: {option} 1,2,4,{DOTS},64",
        )
    begun, end = [parse_size(text, option) for text in parts[:at]], parse_size(parts[at + 1], option)
    ways = [way for way in (_equal_steps(begun, end), _equal_factors(begun, end)) if way]
    if not ways:
        raise UsageError(
            f"{written}: neither equal steps nor an equal whole factor lead from {begun[0]} over all of these to {end}, "
            f"in at most {_MOST_SIZES} sizes",
            f"Example: {option} 1,2,4,{DOTS},64, or write the sizes out.",
        )
    if len(ways) == 2:
        steps, factors = (f"{','.join(map(str, way[:3]))},{DOTS},{end}" for way in ways)
        raise UsageError(f"{written}: is this {steps} or {factors}?", f"Name three sizes before the `{DOTS}`.")
    return [*map(str, ways[0]), *parts[at + 2 :]]


def _equal_steps(begun: list[int], end: int) -> list[int]:
    step = begun[1] - begun[0]
    if step < 1 or (end - begun[0]) // step >= _MOST_SIZES:
        return []
    return _checked(list(range(begun[0], end + 1, step)), begun, end)


def _equal_factors(begun: list[int], end: int) -> list[int]:
    factor = begun[1] // begun[0]
    if factor < 2:
        return []
    sizes = [begun[0]]
    while sizes[-1] < end:
        sizes.append(sizes[-1] * factor)
    return _checked(sizes, begun, end)


def _checked(sizes: list[int], begun: list[int], end: int) -> list[int]:
    """The sizes, or none where they do not begin as was written, or do not end where they should."""
    return sizes if sizes[: len(begun)] == begun and sizes[-1] == end > begun[-1] else []
