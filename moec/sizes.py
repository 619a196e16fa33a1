"""Sizes of memory in words."""

from __future__ import annotations


def size_text(count: int) -> str:
    """``count`` bytes as people read them: ``"12.6 MB"``, with units of a thousand each."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"
