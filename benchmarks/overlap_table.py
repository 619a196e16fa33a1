"""The table of ``overlap.py``, and how its numbers hold."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from moec.passes.overlap.policies import Schedule


@dataclass
class Row:
    """One line of the table; seconds, and how often the case was taken."""

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
    times: int

    @property
    def exposed(self) -> float:
        return self.step - self.compute - self.outside


def told(schedule: Schedule) -> str:
    """A schedule in few words."""
    sizes = "+".join(map(str, schedule.sizes))
    order = " reordered" if schedule.sets else ""
    return f"{'own+' if schedule.own_first else ''}{sizes} {schedule.along}{order}" if schedule.cut else "1"


def show(rows: list[Row]) -> None:
    for r in rows:
        print(
            f"| {r.ratio:g} | {r.routing} | {r.direction} | {r.policy} | {r.chunks} | {r.step * 1e3:.1f} "
            f"| {r.predicted * 1e3:.1f} | {r.step / r.predicted - 1:+.1%} "
            f"| {r.exposed * 1e3:.1f} | {r.floor * 1e3:.1f} | {r.times} |",
            flush=True,
        )


def verdict(rows: Sequence[Row]) -> None:
    """How the schedules that the pass chose hold against their promises: how many do, and the worst."""
    mine = [r for r in rows if r.policy == "auto"]
    none = {(r.ratio, r.routing, r.direction): r for r in rows if r.policy == "none"}
    over = [r.step / none[r.ratio, r.routing, r.direction].step for r in mine]
    promises = (
        ("step against prediction, within 10 %", [abs(r.step / r.predicted - 1) for r in mine], 0.10),
        ("exposed beyond 1.1 times the floor, of the step, within 5 %", [_beyond(r) for r in mine], 0.05),
        ("step over that without overlap, within 2 %", [o - 1 for o in over], 0.02),
    )
    print()
    for what, seen, most in promises:
        print(f"{what}: {sum(s <= most for s in seen)} of {len(seen)}, worst {max(seen):.1%}")
    print(f"mean speed-up {statistics.mean(1 / o for o in over):.3f}")


def _beyond(row: Row) -> float:
    return (row.exposed - 1.1 * row.floor) / row.step
