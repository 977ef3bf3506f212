"""A network's forward that can wait at a norm, with its activations in host memory, and go on later."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from bln_train.norm.calibrate.moments import StopForward
from bln_train.norm.calibrate.strata import storage_key


class PausedForward:
    """`forward` in a thread of its own, which runs only inside `resume`, up to its next `wait` or its end.

    A thread because a forward is any Python code, and nothing else can stop in the middle of it: what it needs to go on are
    its frames. While it waits, `to_host` moves the storages that it made itself to the host; each tensor and view stays the
    object it is. The caller must `end` it, whatever happens.

    Args:
        model: called without gradients, under the caller's autocast and, on CUDA, on its stream.
        x: its input; the forward works on a copy, which is its own and leaves the device with the rest.
    """

    def __init__(self, model: Callable[[Tensor], object], x: Tensor) -> None:
        self.norm: nn.Module | None = None
        """Where it waits; None at its end."""
        self.input: Tensor | None = None
        """Of that norm."""
        self._model, self._x, self._made = model, [x], _Made()
        self._on_host: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._is_ended = False
        self._error: BaseException | None = None
        kind = x.device.type
        autocast = {"enabled": torch.is_autocast_enabled(kind), "dtype": torch.get_autocast_dtype(kind)}
        self._autocast: dict[str, Any] = {"device_type": kind, **autocast}
        self._stream = torch.cuda.current_stream(x.device) if kind == "cuda" else None
        self._thread = threading.Thread(target=self._run, name="paused forward", daemon=True)

    def _run(self) -> None:
        self._go.acquire()
        try:
            # All of this belongs to a thread: a new one has gradients on, no autocast and the default stream.
            with torch.no_grad(), torch.autocast(**self._autocast), torch.cuda.stream(self._stream), self._made:
                if not self._is_ended:
                    self._model(self._x.pop().clone())
        except StopForward:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.norm = self.input = None
            self._back.release()

    def wait(self, norm: nn.Module, x: Tensor) -> None:
        """In the forward's own thread: stop here until the next `resume`."""
        self.norm, self.input = norm, x
        self._back.release()
        self._go.acquire()
        self.norm = self.input = None
        if self._is_ended:
            raise StopForward

    def resume(self) -> None:
        """Run on to the next `wait` or the end, and raise what the forward raised."""
        if self._thread.ident is None:
            try:
                self._thread.start()
            except RuntimeError as error:
                raise RuntimeError(
                    "this system gives no thread to each micro-batch: use larger ones, or cache=False"
                ) from error
        self._go.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        """Stop for good, wherever it is, and wait for the thread; a second call does nothing."""
        self._is_ended = True
        self._on_host.clear()
        if self._thread.ident is not None:
            self._go.release()
            self._thread.join()
        self.norm = self.input = None

    def to_host(self) -> None:
        """While it waits: free the device of what the forward made and still holds."""
        for storage in self._made.storages():
            self._on_host.append((storage, storage.cpu() if storage.device.type != "cpu" else storage.clone()))
            storage.resize_(0)

    def to_device(self) -> None:
        """Undo `to_host`."""
        for storage, kept in self._on_host:
            storage.resize_(kept.nbytes())
            storage.copy_(kept)
        self._on_host.clear()


class _Made(TorchDispatchMode):
    """Knows the live storages that operators inside it made; a view of a weight, say, is not made here."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {storage_key(leaf) for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **kwargs)
        for leaf in tree_iter(out):
            if isinstance(leaf, Tensor) and (key := storage_key(leaf)) not in given and key is not None:
                self._add(key, leaf.untyped_storage())
        return out

    def _add(self, key: int, storage: torch.UntypedStorage) -> None:
        def forget(_: Any) -> None:  # another storage may get its address
            del self._made[key]

        if key not in self._made:
            self._made[key] = weakref.ref(storage, forget)

    def storages(self) -> list[torch.UntypedStorage]:
        """Those that are alive."""
        return [storage for made in list(self._made.values()) if (storage := made()) is not None and storage.nbytes()]
