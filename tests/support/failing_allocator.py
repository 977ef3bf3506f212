"""An allocator that runs out of memory when it is told to, on the CPU."""

import torch

from bln_train.memory.tracker import StorageTracker


class FailingAllocator(StorageTracker):
    """Raises torch.OutOfMemoryError where an operator makes a new storage, and counts storages as StorageTracker does.

    The operator has run when its storage is refused, so what it did to other tensors stays: harder to undo than a real failure.

    Args:
        existing: tensors alive before; they count.
        fail_at: the number of the allocation that fails, from 1, and this one alone.
        limit_bytes: every allocation fails that takes the live bytes above it.
    """

    def __init__(self, existing=(), **settings):
        self.set()
        super().__init__(existing)
        self.set(**settings)

    def set(self, *, fail_at=None, limit_bytes=None):
        """Fail so from now on, counting allocations from here."""
        self.fail_at, self.limit_bytes = fail_at, limit_bytes
        self.num_allocations = self.num_failures = 0

    def _add(self, tensor):
        births = self._births
        super()._add(tensor)
        if self._births == births:
            return
        self.num_allocations += 1
        full = self.limit_bytes is not None and self.live_bytes > self.limit_bytes
        if full or self.num_allocations == self.fail_at:
            self.num_failures += 1
            size = tensor.untyped_storage().nbytes()
            raise torch.OutOfMemoryError(
                f"out of memory. Tried to allocate {size} bytes. {self.live_bytes} are in use."
            )
