"""A file that is written by a thread of its own, while others checksum what comes next."""

from __future__ import annotations

import io
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

MOST_PENDING = 4
"""Pieces on their way; whoever writes waits for the oldest."""


class Behind(io.RawIOBase):
    """The new file ``path``. What is written must not change until it is closed; errors come with a later call."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file, self._writing = path.open("wb"), ThreadPoolExecutor(1)
        self._pending: deque[Future[int]] = deque()

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def write(self, data: ReadableBuffer, /) -> int:
        view = memoryview(data)
        self._pending.append(self._writing.submit(self._file.write, view))
        self._settle(MOST_PENDING)
        return view.nbytes

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._settle(0)
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        self._settle(0)
        return self._file.tell()

    def flush(self) -> None:
        self._settle(0)
        self._file.flush()

    def close(self) -> None:
        if not self.closed:
            try:
                super().close()  # flushes
            finally:
                self._writing.shutdown()
                self._file.close()

    def _settle(self, most: int) -> None:
        while len(self._pending) > most:
            self._pending.popleft().result()
