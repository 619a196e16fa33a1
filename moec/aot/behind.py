"""A file that one thread writes and another hashes, while the caller makes what comes next.

It is written in whole chunks at multiples of their size. Linux then keeps it in pages of 2 MiB where the filesystem can
(ext4 and XFS from 6.16 on), and maps them as such: a file of weights is read like memory on huge pages.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

CHUNK = 4 << 20
"""Bytes of one call of the system."""
MOST_PENDING = 4
"""Chunks on their way to the file, and to the hash; whoever writes waits for the oldest."""
_MOST_VIEWS = 512  # of one call; Linux takes 1024


class Behind:
    """The new file ``path``. What is written must not change until it is closed; errors come with a later call."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._writing, self._hashing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._pending: tuple[deque[Future[None]], deque[Future[None]]] = (deque(), deque())
        self._held: list[memoryview] = []
        self._room = CHUNK
        self._digest: Any = None

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self._flush()
                self._settle(0)
        finally:
            self._writing.shutdown(cancel_futures=True)
            self._hashing.shutdown(cancel_futures=True)
            self._file.close()

    def write(self, data: ReadableBuffer, /) -> int:
        """Have ``data`` written, and hashed if anybody asked for a hash."""
        view = memoryview(data).cast("B")
        size = view.nbytes
        if self._digest is not None:
            self._pending[1].append(self._hashing.submit(self._digest.update, view))
        while view.nbytes:
            part, view = view[: self._room], view[self._room :]
            self._held.append(part)
            self._room -= part.nbytes
            if not self._room or len(self._held) == _MOST_VIEWS:
                self._flush()
        self._settle(MOST_PENDING)
        return size

    @contextmanager
    def hashed(self) -> Iterator[Any]:
        """SHA-256 of what is written meanwhile: hashlib's object, which is complete afterwards."""
        self._digest = digest = hashlib.sha256()
        yield digest
        self._settle(0)
        self._digest = None

    def _flush(self) -> None:
        """Have what is held written."""
        views, self._held = self._held, []
        self._room = self._room or CHUNK
        self._pending[0].append(self._writing.submit(self._write, views))

    def _write(self, views: list[memoryview]) -> None:
        while views:
            done = os.writev(self._file.fileno(), views)
            while views and done >= views[0].nbytes:
                done -= views.pop(0).nbytes
            if done:
                views[0] = views[0][done:]

    def _settle(self, most: int) -> None:
        """Wait until no more than ``most`` are on their way; errors of writing come out here."""
        for pending in self._pending:
            while len(pending) > most:
                pending.popleft().result()
