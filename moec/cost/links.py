"""Links between ranks: how long bytes take, by latency and bandwidth (the α-β model of Hockney, 1994).

A message of n bytes takes ``α + n / bandwidth``. A collective takes what its busiest rank takes: the larger of what it
sends and what it receives, as links carry both ways at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """One tier of links.

    Attributes:
        alpha_s: Seconds until the first byte arrives, start of the collective included.
        bytes_per_s: Bytes a second in one direction.
    """

    alpha_s: float
    bytes_per_s: float

    def __post_init__(self) -> None:
        if not (self.alpha_s >= 0 and self.bytes_per_s > 0):
            raise ValueError(f"a link has a latency from 0 up and a bandwidth above 0, not {self}")

    def seconds(self, bytes: float, messages: int = 1) -> float:
        """Time of ``bytes`` in ``messages`` messages, one after the other. Nothing at all takes no time."""
        return messages * self.alpha_s + bytes / self.bytes_per_s if messages else 0.0


def busiest(sent: Sequence[Sequence[float]]) -> float:
    """Bytes of the busiest rank of an all-to-all, in one direction.

    Args:
        sent: ``sent[s][d]`` bytes from rank s to rank d; what a rank keeps (s = d) travels nowhere.
    """
    out = [sum(row) - row[s] for s, row in enumerate(sent)]
    came = [sum(column) - column[d] for d, column in enumerate(zip(*sent, strict=True))]
    return max((*out, *came), default=0.0)
