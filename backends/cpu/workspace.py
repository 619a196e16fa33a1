"""Working memory that calls share: a big buffer of fresh pages costs a visible part of a layer's time.

A prefill of 1024 tokens touches 50 MB of it. So a returned buffer is kept for the next call while it is small, and a
big one asks the system for huge pages, of which there are 512 times fewer.
"""

from __future__ import annotations

import ctypes
import threading

import torch
from torch import Tensor

KEPT_BYTES = 256 << 20
"""A returned buffer up to this size is kept, the largest alone; a larger one goes back to the system."""
HUGE_BYTES = 8 << 20
"""From this size on a buffer asks for huge pages."""
_PAGE = 4096
_MADV_HUGEPAGE = 14


class Workspace:
    """Buffers for one call each; ``take`` and ``give_back`` may come from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: Tensor | None = None

    def take(self, size: int) -> Tensor:
        """A buffer u8 of at least ``size`` bytes, with anything in it."""
        with self._lock:
            kept, self._kept = self._kept, None
        if kept is not None and kept.numel() >= size:
            return kept
        del kept
        buffer = torch.empty(size, dtype=torch.uint8)
        ask_for_huge_pages(buffer)
        return buffer

    def give_back(self, buffer: Tensor) -> None:
        """The call is over."""
        if buffer.numel() > KEPT_BYTES:
            return
        with self._lock:
            if self._kept is None or self._kept.numel() < buffer.numel():
                self._kept = buffer


SHARED = Workspace()
"""That of all layers: they run one after the other."""


def ask_for_huge_pages(buffer: Tensor) -> None:
    """For memory that nobody has touched yet: filling it costs several times less. Small tensors are left alone."""
    if buffer.nbytes < HUGE_BYTES:
        return
    start = -(-buffer.data_ptr() // _PAGE) * _PAGE
    length = (buffer.data_ptr() + buffer.nbytes - start) // _PAGE * _PAGE
    # Advice: a system that has no huge pages says no, and nothing is lost.
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_HUGEPAGE)
