"""Bytes that this process sent to other ranks, by kind of collective and group."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping

_LOCK = threading.Lock()
_SENT: Counter[tuple[str, str]] = Counter()
_CALLS: Counter[tuple[str, str]] = Counter()


def count(kind: str, group: str, sent: int) -> None:
    """Note one collective and the bytes that leave this rank in it."""
    with _LOCK:
        _SENT[kind, group] += sent
        _CALLS[kind, group] += 1


def sent() -> Mapping[tuple[str, str], int]:
    """Bytes sent since the last reset: ``{("all_to_all", "ep"): 4096}``. A rank's own rows do not count."""
    with _LOCK:
        return dict(_SENT)


def calls() -> Mapping[tuple[str, str], int]:
    """Collectives since the last reset."""
    with _LOCK:
        return dict(_CALLS)


def reset() -> None:
    """Start from zero."""
    with _LOCK:
        _SENT.clear()
        _CALLS.clear()
