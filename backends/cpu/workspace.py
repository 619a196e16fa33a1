"""Working memory that calls share: a big buffer of fresh pages costs a visible part of a layer's time.

A prefill of 4096 tokens touches 180 MB of it, and new pages were a tenth of such a layer's time. So a returned buffer
is kept for the next call, one for all layers, on huge pages where the system has them.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from moec.backends.cpu.huge_pages import empty

KEPT_BYTES = 512 << 20
"""A returned buffer up to this size is kept, the largest alone; a larger one goes back to the system."""


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
        return empty([size], torch.uint8)

    def give_back(self, buffer: Tensor) -> None:
        """The call is over."""
        if buffer.numel() > KEPT_BYTES:
            return
        with self._lock:
            if self._kept is None or self._kept.numel() < buffer.numel():
                self._kept = buffer


SHARED = Workspace()
"""That of all layers: they run one after the other."""
