"""A stand-in for CUDA graphs on the CPU: operators are recorded with the very tensors they saw, and run again on those alone."""

from contextlib import nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class _Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class OperatorRecorder:
    """What `Recorder` does, for operators: no Python of the recorded work runs again, addresses and numbers stay as they were."""

    def __init__(self, fails=False):
        self.num_recorded = self.num_replayed = 0
        self.fails = fails

    def apart(self):
        return nullcontext()

    def record(self, work, memory):
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.num_recorded += 1
        tape = _Tape()
        with tape:
            result = work()
        has_run = False  # unlike CUDA's capture, the recording itself has done the work

        def replay():
            nonlocal has_run
            self.num_replayed += has_run
            if has_run:
                self._again(tape)
            has_run = True

        return replay, result

    @staticmethod
    @torch.no_grad()
    def _again(tape):
        for func, args, kwargs, out in tape.calls:
            found = func(*args, **kwargs)
            for old, new in zip(tree_flatten(out)[0], tree_flatten(found)[0], strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
