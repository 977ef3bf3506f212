"""Every allocation of CUDA, for PyTorch's memory viewer."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from bln_train.system.atomic import replacing

_MAX_EVENTS = 200_000


@contextmanager
def recorded_snapshot(path: Path, device: torch.device) -> Iterator[None]:
    """Record what CUDA's allocator does inside, with the Python stack of each allocation, and write it to `path`.

    The file is what https://pytorch.org/memory_viz opens: a pickle, of plain containers. Of more than `_MAX_EVENTS` events the last
    are kept. Where the block fails there is no file.

    Raises:
        RunFolderError: `path` cannot be written.
    """
    memory = torch.cuda.memory
    memory._record_memory_history(stacks="python", max_entries=_MAX_EVENTS)
    try:
        yield
        torch.cuda.synchronize(device)
        snapshot = memory._snapshot(device)
    finally:
        memory._record_memory_history(enabled=None)
    with replacing(path) as file:
        pickle.dump(snapshot, file)
