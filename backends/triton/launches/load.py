"""How many rows the experts of a layer get, and how many tiles of rows that makes.

With a histogram the answer is exact. With a number of tokens it is the expectation over even routing: every token draws
k different experts of E, so an expert's rows are binomial, T draws of chance k/E.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_LEAST = 1e-12
"""Chances below this are left out."""


@dataclass(frozen=True, eq=False)
class Load:
    """Rows of the experts of one call.

    Attributes:
        rows: Different numbers of rows, ascending from 1 up.
        experts: How many experts have so many; an expectation need not be whole.
    """

    rows: NDArray[np.float64]
    experts: NDArray[np.float64]

    @property
    def total(self) -> float:
        """Rows of all experts."""
        return float(self.rows @ self.experts)

    @property
    def touched(self) -> float:
        """Experts that have a row."""
        return float(self.experts.sum())

    def tiles(self, rows: int) -> float:
        """Tiles of ``rows`` rows that hold them: no tile has rows of two experts."""
        return float(np.ceil(self.rows / rows) @ self.experts)

    def blocks(self, rows: int, most: int) -> NDArray[np.float64]:
        """[most] tiles of 1, 2, ... ``most`` blocks of ``rows`` rows: all of an expert's but the last have the most."""
        found = np.ceil(self.rows / rows)
        whole, rest = np.divmod(found, most)
        tiles = np.array([float((rest == n) @ self.experts) for n in range(1, most)])
        return np.append(tiles, float(whole @ self.experts))

    def longest(self) -> float:
        """Rows of the busiest expert; of an expectation, what an expert has with a chance of about a half."""
        if not self.rows.size:
            return 0.0
        beyond = np.cumsum(self.experts[::-1])[::-1]
        return float(self.rows[max(0, int(np.searchsorted(-beyond, -0.5, side="right")) - 1)])


def even(tokens: int, top_k: int, experts: int) -> Load:
    """What is expected where tokens spread evenly."""
    return _even(tokens, top_k, experts)


def counted(histogram: Sequence[int]) -> Load:
    """What a histogram says: rows of every expert.

    Raises:
        ValueError: A number below 0.
    """
    if min(histogram, default=0) < 0:
        raise ValueError(f"an expert has no negative number of rows: {list(histogram)}")
    found = sorted((r, n) for r, n in Counter(histogram).items() if r)
    return Load(np.array([float(r) for r, _ in found]), np.array([float(n) for _, n in found]))


@lru_cache(maxsize=256)
def _even(tokens: int, top_k: int, experts: int) -> Load:
    if tokens <= 0:
        return Load(np.zeros(0), np.zeros(0))
    chance = top_k / experts
    if chance >= 1:
        return Load(np.array([float(tokens)]), np.array([float(experts)]))
    # The mode's chance in logarithms; all others from their neighbours. 9 sigma and some hold all but 1e-12.
    spread = 9 * math.sqrt(tokens * chance * (1 - chance)) + 12
    mode = min(tokens, int((tokens + 1) * chance))
    low, high = max(0, int(mode - spread)), min(tokens, int(mode + spread) + 1)
    rows = np.arange(low, high + 1, dtype=np.float64)
    steps = np.log((tokens - rows[:-1]) / rows[1:]) + math.log(chance / (1 - chance))
    logs = np.concatenate([[0.0], np.cumsum(steps)])
    at_mode = (
        math.lgamma(tokens + 1) - math.lgamma(mode + 1) - math.lgamma(tokens - mode + 1)
        + mode * math.log(chance) + (tokens - mode) * math.log1p(-chance)
    )  # fmt: skip
    p = np.exp(logs - logs[mode - low] + at_mode)
    kept = (p > _LEAST) & (rows > 0)
    return Load(rows[kept], p[kept] * experts)
