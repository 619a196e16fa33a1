"""The table of ``overlap.py``, and how its numbers hold."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Row:
    """One line of the table; seconds.

    Attributes:
        outside: What the layer does beside experts and links, and what the cut costs.
        floor: Of communication, what no order of the chunks hides from the busiest rank.
        uneven: How much longer all chunks' slowest ranks compute than the busiest rank: ranks wait for each other.
        one_floor: Of communication, what no order hides where a chunk's experts are those of its slowest rank.
    """

    ratio: float
    routing: str
    direction: str
    policy: str
    chunks: str
    predicted: float
    step: float
    compute: float
    outside: float
    floor: float
    uneven: float = 0.0
    one_floor: float = 0.0

    @property
    def exposed(self) -> float:
        """Time that the busiest rank does not compute."""
        return self.step - self.compute - self.outside

    @property
    def links_alone(self) -> float:
        """The same without the time that ranks compute while others wait for them."""
        return self.exposed - self.uneven


def show(rows: list[Row]) -> None:
    for r in rows:
        print(
            f"| {r.ratio:g} | {r.routing} | {r.direction} | {r.policy} | {r.chunks} | {r.step * 1e3:.1f} "
            f"| {r.predicted * 1e3:.1f} | {r.step / r.predicted - 1:+.1%} "
            f"| {r.exposed * 1e3:.1f} | {r.floor * 1e3:.1f} |",
            flush=True,
        )


def verdict(rows: Sequence[Row]) -> None:
    """How the schedules that the pass chose hold against their promises: how many do, and the worst."""
    mine = [r for r in rows if r.policy == "auto"]
    none = {(r.ratio, r.routing, r.direction): r for r in rows if r.policy == "none"}
    over = [r.step / none[r.ratio, r.routing, r.direction].step for r in mine]
    promises = (
        ("step against prediction, within 10 %", [abs(r.step / r.predicted - 1) for r in mine], 0.10),
        (
            "exposed beyond 1.1 times the floor, of the step, within 5 %",
            [_beyond(r.exposed, r.floor, r) for r in mine],
            0.05,
        ),
        (
            "the same, a chunk's experts counted as its slowest rank's",
            [_beyond(r.links_alone, r.one_floor, r) for r in mine],
            0.05,
        ),
        ("step over that without overlap, within 2 %", [o - 1 for o in over], 0.02),
    )
    print()
    for what, seen, most in promises:
        print(f"{what}: {sum(s <= most for s in seen)} of {len(seen)}, worst {max(seen):.1%}")
    print(f"mean speed-up {statistics.mean(1 / o for o in over):.3f}")


def _beyond(exposed: float, floor: float, row: Row) -> float:
    return (exposed - 1.1 * floor) / row.step
