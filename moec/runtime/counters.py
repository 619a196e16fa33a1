"""Counts of executed runtime ops, by op name and by block, so that a test or a user can see what really ran."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field

_LOCK = threading.Lock()
_COUNTS: Counter[tuple[str, str]] = Counter()


@dataclass(frozen=True)
class Counts:
    """Executions since the last reset.

    Attributes:
        by_name: Executions of each op (``"moec::experts"``).
        by_label: Executions of each op in each block (``{"model.layers.0.mlp": {"moec::experts": 1}}``).
    """

    by_name: dict[str, int] = field(default_factory=dict)
    by_label: dict[str, dict[str, int]] = field(default_factory=dict)


def count(name: str, label: str) -> None:
    """Note one execution of op ``name`` in the block ``label``."""
    with _LOCK:
        _COUNTS[name, label] += 1


def snapshot() -> Counts:
    """A copy of the counts."""
    with _LOCK:
        pairs = dict(_COUNTS)
    counts = Counts()
    for (name, label), number in sorted(pairs.items()):
        counts.by_name[name] = counts.by_name.get(name, 0) + number
        counts.by_label.setdefault(label, {})[name] = number
    return counts


def reset() -> None:
    """Start counting from zero."""
    with _LOCK:
        _COUNTS.clear()
