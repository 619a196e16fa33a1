"""Memory of gradients, used again in the next step.

Every training step drops its gradients and asks for as much memory again, which the system hands out as fresh pages,
cleared one by one: with 2.4 GB of gradients that was two thirds of a step. So the memory of a large gradient that
nobody holds any longer waits here for the next one of its size. A gradient that is still held is left alone, as are
its views: the memory comes back when its last storage dies. Between ``zero_grad`` and the next backward the memory
stays with the process, as with ``zero_grad(set_to_none=False)``; what nobody asked for in a minute goes back to the
system.
"""

from __future__ import annotations

import ctypes
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

FROM_BYTES = 1 << 20
"""Smaller gradients are left to the allocator, which keeps memory of that size itself."""

IDLE_S = 60.0
"""So long a block waits for its next use. A step that takes longer does not notice what clearing pages costs."""


class Recycler:
    """Blocks of memory by size; all methods may be called from any thread.

    Args:
        idle_s: How long a block may lie unused.
    """

    def __init__(self, idle_s: float = IDLE_S) -> None:
        self.idle_s = idle_s
        self._free: dict[int, deque[tuple[float, Tensor]]] = {}  # of each, the oldest first
        self._sweeper: threading.Thread | None = None

    def empty_like(self, t: Tensor) -> Tensor:
        """A tensor as ``torch.empty_like(t)`` makes it, with anything in it."""
        if t.numel() * t.element_size() < FROM_BYTES:
            return torch.empty_like(t)
        return self.empty(t.shape, torch.empty_like(t, device="meta").stride(), t.dtype)

    def empty(self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A dense tensor, with anything in it."""
        size = math.prod(shape) * dtype.itemsize
        if size < FROM_BYTES:
            return torch.empty_strided(shape, strides, dtype=dtype)
        try:
            _, block = self._free.setdefault(size, deque()).pop()
        except IndexError:
            block = torch.empty(size, dtype=torch.uint8)
        # A new object of Python's owns each lending: it ends with the storage that was made of it.
        lent = (ctypes.c_char * size).from_address(block.data_ptr())
        weakref.finalize(lent, self._take_back, block).atexit = False
        storage = torch.frombuffer(lent, dtype=torch.uint8).untyped_storage()
        return torch.empty(0, dtype=dtype).set_(storage, 0, tuple(shape), tuple(strides))

    def idle_bytes(self) -> int:
        """Bytes that wait for their next use."""
        return sum(size * len(blocks) for size, blocks in list(self._free.items()))

    def _take_back(self, block: Tensor) -> None:
        # Runs where a storage dies, possibly inside another call of this object: a deque needs no lock.
        self._free[block.numel()].append((time.monotonic(), block))
        if self._sweeper is None or not self._sweeper.is_alive():
            self._sweeper = threading.Thread(target=self._sweep, name="moec-gradients", daemon=True)
            self._sweeper.start()

    def _sweep(self) -> None:
        """Until nothing waits: gives back what has waited too long."""
        while self.idle_bytes():
            time.sleep(self.idle_s / 4)
            limit = time.monotonic() - self.idle_s
            for blocks in list(self._free.values()):
                while blocks:
                    try:
                        oldest = blocks.popleft()
                    except IndexError:
                        break
                    if oldest[0] > limit:
                        blocks.appendleft(oldest)
                        break


SHARED = Recycler()
"""That of all layers: equal layers' gradients have equal sizes."""
