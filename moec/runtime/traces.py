"""What tokens chose, shown to whoever asks while layers run."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from moec.runtime.programs import Program

Watcher = Callable[["Program", Tensor], None]
"""Called with the program of a layer and the ids it was given, int[T, k]."""

_LOCK = threading.Lock()
_WATCHERS: tuple[Watcher, ...] = ()


def note(program: Program, ids: Tensor) -> None:
    """Show the watchers one call of a layer."""
    for watcher in _WATCHERS:
        watcher(program, ids)


@contextlib.contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Have ``watcher`` called for every layer that runs while this is open, in any thread."""
    global _WATCHERS
    with _LOCK:
        _WATCHERS = (*_WATCHERS, watcher)
    try:
        yield
    finally:
        with _LOCK:
            _WATCHERS = tuple(w for w in _WATCHERS if w is not watcher)
