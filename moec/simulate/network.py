"""Messages that share links: every link's bandwidth is divided max-min fairly among the flows that cross it.

Fair shares by progressive filling (Bertsekas and Gallager, Data Networks, section 6.5.2): the link that leaves its
flows least is filled, its flows keep that rate, and so on. Rates change only when a flow begins or ends, so between two
such moments every flow moves a known number of bytes. No link ever carries more than its bandwidth.

With many flows those that end at almost the same time are let end together, at the time of the last: ``grain`` is that
time over the age of the oldest of them. Bandwidth then lies idle for a moment; none is invented.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

EXACT_FLOWS = 512
"""Up to so many flows every end is a moment of its own."""
GRAIN = 0.02
"""How near ends must be to fall together where there are more, relative to the age of the flows."""
_SAME = 1e-12
_NEVER = float("inf")


class Network:
    """Flows on the way, and those to come.

    Attributes:
        now: Seconds since the beginning.
        begun, ended: When each flow began to move and when it was done; NaN before.
        segments: (from, to, bytes a second on every link), where ``watch`` was asked for.
    """

    def __init__(
        self,
        bandwidth: Sequence[float],
        ways: Sequence[Sequence[int]],
        sizes: Sequence[float],
        grain: float | None = None,
        watch: bool = False,
    ) -> None:
        """
        Args:
            bandwidth: Bytes a second of every link.
            ways: Links of every flow.
            sizes: Bytes of every flow.
            grain: As above; by the number of flows where it is None.
            watch: Record what every link carried.
        """
        count, longest = len(sizes), max((len(w) for w in ways), default=1)
        self.links = len(bandwidth)
        self._bandwidth = np.array([*bandwidth, _NEVER])  # the last is no link: it fills up short ways
        self._ways = np.full((count, longest), self.links, dtype=np.int64)
        for i, way in enumerate(ways):
            self._ways[i, : len(way)] = way
        self._sizes = np.asarray(sizes, dtype=float)
        self._left = self._sizes.copy()
        self._grain = (0.0 if count <= EXACT_FLOWS else GRAIN) if grain is None else grain
        self._active = np.zeros(0, dtype=np.int64)
        self._rates = np.zeros(0)
        self._stale = False
        self.now = 0.0
        self.begun = np.full(count, np.nan)
        self.ended = np.full(count, np.nan)
        self.segments: list[tuple[float, float, Any]] | None = [] if watch else None

    def begin(self, flows: Sequence[int]) -> None:
        """Let flows move from now on."""
        self.begun[flows] = self.now
        self._active = np.concatenate([self._active, np.asarray(flows, dtype=np.int64)])
        self._stale = True

    def next_end(self) -> float:
        """When the next flow will be done if none begins before; infinity where none moves."""
        if not len(self._active):
            return _NEVER
        self._share()
        return self.now + float(self._after()[1])

    def _after(self) -> tuple[Any, float]:
        """Which of the active flows end next, and after how many seconds."""
        left = self._left[self._active] / self._rates
        first = float(left.min())
        age = self.now + first - float(self.begun[self._active].min())
        ending = left <= first * (1 + _SAME) + self._grain * age
        return ending, float(left[ending].max())

    def run_to(self, time: float) -> list[int]:
        """Move all flows to ``time``, which is not after ``next_end``; those that are done."""
        if not len(self._active):
            self.now = max(self.now, time)
            return []
        self._share()
        ending, after = self._after()
        done = time >= self.now + after
        seconds = after if done else time - self.now
        if self.segments is not None and seconds > 0:
            self.segments.append((self.now, self.now + seconds, self._carried()))
        moved = np.minimum(self._rates * seconds, self._left[self._active])
        self._left[self._active] -= moved
        self.now = max(self.now, time)
        if not done:
            return []
        gone = self._active[ending]
        self._left[gone] = 0.0
        self.ended[gone] = self.now
        self._active = self._active[~ending]
        self._stale = True
        return [int(f) for f in gone]

    def _carried(self) -> Any:
        ways = self._ways[self._active]
        rates = np.repeat(self._rates, ways.shape[1])
        return np.bincount(ways.ravel(), weights=rates, minlength=self.links + 1)[: self.links]

    def _share(self) -> None:
        if self._stale:
            self._rates = fair_rates(self._bandwidth, self._ways[self._active], self._grain)
            self._stale = False


def fair_rates(bandwidth: Any, ways: Any, slack: float = 0.0) -> Any:
    """Max-min fair rates of flows.

    Args:
        bandwidth: float[L + 1], bytes a second of every link; the last stands for no link, and is infinite.
        ways: int[F, W], links of every flow, filled up with L.
        slack: Links within this part of the least share are filled together, each with its own share.
    """
    links = len(bandwidth) - 1
    rates = np.zeros(len(ways))
    free, open_ = bandwidth.copy(), np.arange(len(ways))
    while len(open_):
        mine = ways[open_]
        count = np.bincount(mine.ravel(), minlength=links + 1)
        with np.errstate(invalid="ignore", divide="ignore"):
            share = np.where(count > 0, free / count, _NEVER)
        share[links] = _NEVER
        least = share.min()
        limit = share[mine].min(axis=1)  # of every flow, the least that one of its links would give it
        filled = limit <= least * (1 + max(slack, _SAME))
        rates[open_[filled]] = limit[filled]
        used = np.bincount(mine[filled].ravel(), weights=np.repeat(limit[filled], mine.shape[1]), minlength=links + 1)
        free = np.maximum(free - used, 0.0)
        free[links] = _NEVER
        open_ = open_[~filled]
    return rates
