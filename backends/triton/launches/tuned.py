"""Launches that were measured on a device, kept under the device's fingerprint: they go before what the model chooses.

A few launches that the model thinks best are timed, and the fastest is kept. Another device, or another Triton, has
another fingerprint and knows nothing of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from moec.backends.triton.launches.choose import Layer
from moec.backends.triton.launches.tiles import Launch, Tile
from moec.cache import cache_dir, store

Timer = Callable[[Launch], float]
"""Seconds of a call that is launched so; infinite where it cannot be."""


def fingerprint(name: str, target: str, units: int, memory: float, versions: str) -> str:
    """What a device is known by: its name and sizes, and the versions of what compiles for it and runs it."""
    told = f"{name}|{target}|{units}|{memory:.0f}|{versions}"
    return hashlib.sha256(told.encode()).hexdigest()[:24]


def key_of(layer: Layer, tokens: int) -> str:
    """The name of a layer and a number of tokens."""
    return hashlib.sha256(f"{layer!r}|{tokens}".encode()).hexdigest()[:24]


def measure(candidates: list[Launch], timer: Timer, key: str, device: str) -> tuple[Launch, float] | None:
    """Time launches and keep the fastest.

    Args:
        candidates: What may be best.
        timer: Runs one.
        key: Of the layer and the number of tokens.
        device: The device's fingerprint.

    Returns:
        The fastest and its seconds; None where none ran.
    """
    timed = [(timer(launch), i) for i, launch in enumerate(candidates)]
    seconds, best = min(timed, default=(float("inf"), 0))
    if seconds == float("inf"):
        return None
    known = dict(_read(device))
    known[key] = {"seconds": seconds, **asdict(candidates[best])}
    store(_file(device), json.dumps(known, indent=1))
    _read.cache_clear()
    return candidates[best], seconds


def lookup(key: str, device: str) -> tuple[Launch, float] | None:
    """The launch that was measured to be fastest, and its seconds."""
    told = _read(device).get(key) if device else None
    if told is None:
        return None
    try:
        launch = Launch(told["form"], Tile(**told["up"]), Tile(**told["down"]), told["programs"], told["atomic"])
        return launch, float(told["seconds"])
    except (KeyError, TypeError, ValueError):
        return None  # another version wrote it


def _file(device: str) -> str:
    return f"triton/tuned/{device}.json"


@lru_cache(maxsize=8)
def _read(device: str) -> dict[str, Any]:
    try:
        told = json.loads((cache_dir() / _file(device)).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}
