"""Kernels that compute nothing: a backend whose kernels are these allocates what it would, for plans of memory."""

from __future__ import annotations

from typing import Any


class _FakeKernel:
    """A C function that succeeds, or a Triton kernel that any grid of programs runs."""

    def __call__(self, *arguments: Any, **constants: Any) -> int:
        return 0

    def __getitem__(self, grid: Any) -> _FakeKernel:
        return self


class FakeKernels:
    """Every kernel, and none of its work."""

    def __getattr__(self, name: str) -> _FakeKernel:
        return _FakeKernel()
