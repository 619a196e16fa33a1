"""A member of an archive that is hashed while it is written: gigabytes go through once, on two threads."""

from __future__ import annotations

import hashlib
import io
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

MOST_PENDING = 4
"""Pieces on their way; the writer waits for the oldest."""


class Hashed(io.RawIOBase):
    """Writes through and hashes meanwhile; it cannot seek. What is written must not change until it is closed.

    Attributes:
        size: Bytes written.
    """

    def __init__(self, to: IO[bytes]) -> None:
        super().__init__()
        self.size = 0
        self._to, self._digest = to, hashlib.sha256()
        self._hashing, self._writing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._pending: deque[tuple[Future[Any], ...]] = deque()

    def writable(self) -> bool:
        return True

    def write(self, data: ReadableBuffer, /) -> int:
        view = memoryview(data)
        self._pending.append(
            (self._hashing.submit(self._digest.update, view), self._writing.submit(self._to.write, view))
        )
        self._settle(MOST_PENDING)
        self.size += view.nbytes
        return view.nbytes

    def close(self) -> None:
        if not self.closed:
            try:
                self._settle(0)
            finally:
                self._hashing.shutdown()
                self._writing.shutdown()
                super().close()

    @property
    def sha256(self) -> str:
        """Of what was written."""
        return self._digest.hexdigest()

    def _settle(self, most: int) -> None:
        """Wait until no more than ``most`` pieces are on their way; errors of writing come out here."""
        while len(self._pending) > most:
            for future in self._pending.popleft():
                future.result()
