"""Skewed against even histograms: the same experts, the same number of rows, so the same FLOPs and bytes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from routing import draw_ids, even_ids
from timing import FEWEST_ROUNDS, Bench


def compare(bench: Bench, tokens: int, exponent: float, seconds: float, tell: Callable[[str], None]) -> dict[str, Any]:
    """Times one cell both ways, in turn.

    Returns:
        Medians in seconds by implementation, ``even`` and ``skewed``, their ``ratio``; mean count of ``touched``
        experts, and the share of all rows that go to the ``busiest`` expert.
    """
    bench.check(tokens, exponent, tell)
    even: dict[str, list[float]] = {layer.name: [] for layer in bench.layers}
    skewed: dict[str, list[float]] = {layer.name: [] for layer in bench.layers}
    touched: list[int] = []
    busiest: list[float] = []
    stop = time.perf_counter() + seconds
    while len(touched) < FEWEST_ROUNDS or time.perf_counter() < stop:
        ids = draw_ids(bench.shape, tokens, exponent)
        flat = even_ids(ids)
        both = [(skewed, ids), (even, flat)]
        if len(touched) % 2:
            both.reverse()  # neither always comes first
        for layer in bench.layers:
            for times, chosen in both:
                times[layer.name].append(bench.time_once(layer, chosen))
        counts = ids.flatten().bincount()
        touched.append(int((counts > 0).sum()))
        busiest.append(float(counts.max() / counts.sum()))
    medians = {name: (statistics.median(even[name]), statistics.median(skewed[name])) for name in even}
    return {
        "shape": bench.shape.name,
        "tokens": tokens,
        "touched": statistics.mean(touched),
        "busiest": statistics.mean(busiest),
        "even": {name: m[0] for name, m in medians.items()},
        "skewed": {name: m[1] for name, m in medians.items()},
        "ratio": {name: m[1] / m[0] for name, m in medians.items()},
    }
