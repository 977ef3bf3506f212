"""What PyTorch's CUDA allocator takes from the device for a sequence of allocations, in numbers alone.

Requests are rounded up to 512 B. Their size decides the segment:

    up to 1 MiB        shares segments of 2 MiB
    below 10 MiB       shares segments of 20 MiB
    larger             has a segment of its own, rounded up to 2 MiB

A request takes the smallest free block of its pool that is large enough. The block is split where enough is left. Freed
neighbours become one block again.

Segments stay for later requests until the device is full. Then wholly free segments are given back before a new one is
taken. Here the device always counts as full, so the largest sum of segments is the least that training needs.

Source: c10/cuda/CUDACachingAllocator.cpp of PyTorch, default settings.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

KIB, MIB = 2**10, 2**20
BLOCK_BYTES = 512
_SMALL_BYTES, _SMALL_SEGMENT = MIB, 2 * MIB
_LARGE_SEGMENT, _LEAST_OWN_SEGMENT, _OWN_ROUNDING = 20 * MIB, 10 * MIB, 2 * MIB


@dataclass(eq=False)
class Block:
    """A piece of a segment."""

    size: int
    is_small: bool
    before: Block | None = None
    after: Block | None = None
    free: bool = False
    serial: int = 0
    """Of its entry among the free blocks."""


class CachingAllocator:
    """Hands out blocks that have sizes and no memory.

    Attributes:
        reserved_bytes: of all segments now.
        peak_reserved_bytes: the largest that it was.
    """

    def __init__(self) -> None:
        self.reserved_bytes = self.peak_reserved_bytes = 0
        # For each pool the free blocks by size, the serial number only to order equal ones.
        self._free: dict[bool, list[tuple[int, int, Block]]] = {True: [], False: []}
        self._serial = 0

    def allocate(self, num_bytes: int) -> Block:
        """A block of at least `num_bytes`, above 0."""
        size = -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES
        is_small = size <= _SMALL_BYTES
        pool = self._free[is_small]
        at = bisect_left(pool, (size, 0))
        block = pool.pop(at)[2] if at < len(pool) else self._segment(size, is_small)
        block.free = False
        rest = block.size - size
        if rest >= BLOCK_BYTES if is_small else rest > _SMALL_BYTES:
            other = Block(rest, is_small, block, block.after)
            if block.after is not None:
                block.after.before = other
            block.size, block.after = size, other
            self._keep(other)
        return block

    def release(self, block: Block) -> None:
        """Take a block back."""
        for neighbour in (block.before, block.after):
            if neighbour is None or not neighbour.free:
                continue
            pool = self._free[block.is_small]
            pool.pop(bisect_left(pool, (neighbour.size, neighbour.serial)))
            if neighbour is block.before:
                block.before = neighbour.before
                if block.before is not None:
                    block.before.after = block
            else:
                block.after = neighbour.after
                if block.after is not None:
                    block.after.before = block
            block.size += neighbour.size
        self._keep(block)

    def _segment(self, size: int, is_small: bool) -> Block:
        if is_small:
            num_bytes = _SMALL_SEGMENT
        elif size < _LEAST_OWN_SEGMENT:
            num_bytes = _LARGE_SEGMENT
        else:
            num_bytes = -(-size // _OWN_ROUNDING) * _OWN_ROUNDING
        for pool in self._free.values():
            whole = [entry for entry in pool if entry[2].before is None and entry[2].after is None]
            self.reserved_bytes -= sum(size for size, _, _ in whole)
            pool[:] = [entry for entry in pool if entry[2].before is not None or entry[2].after is not None]
        self.reserved_bytes += num_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        return Block(num_bytes, is_small)

    def _keep(self, block: Block) -> None:
        block.free = True
        self._serial += 1
        block.serial = self._serial
        insort(self._free[block.is_small], (block.size, block.serial, block))
