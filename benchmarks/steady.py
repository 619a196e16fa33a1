"""Whether a machine stayed what it was while something was measured: whether to take a measurement again.

Two rules, neither of which looks at what was measured: other programs took no more than :data:`OTHERS` of one core, and
pieces of the same work took as long afterwards as before, but for :data:`DRIFT`. What breaks one of them is measured
again, :data:`TRIES` times at most; the last time counts, whatever it was.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

OTHERS = 0.05
"""Of one core, what all programs but one's own may take on average."""
DRIFT = 0.05
"""Part by which a piece of work may have become slower or faster."""
TRIES = 5
_STAT = Path("/proc/stat")
_WORK = (0, 1, 2, 5, 6, 7)
"""Fields of that file's first line that are work: user, nice, system, interrupts, and what the host took away."""


def taken() -> float | None:
    """Seconds of all cores that anybody worked since the machine was started; None where the system does not tell."""
    if not _STAT.exists():
        return None
    ticks = [int(field) for field in _STAT.read_text(encoding="ascii").split("\n", 1)[0].split()[1:]]
    return sum(ticks[i] for i in _WORK) / float(os.sysconf("SC_CLK_TCK"))


def own() -> float:
    """Processor seconds of this process so far, and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@dataclass(frozen=True)
class Look:
    """The machine at one moment.

    Attributes:
        clock: Seconds of the clock.
        taken: Of all cores, by anybody; None where nobody tells.
        own: Of them, by the processes that measure.
    """

    clock: float
    taken: float | None
    own: float


def look(own: float) -> Look:
    """The machine now."""
    return Look(time.monotonic(), taken(), own)


def unsteady(before: Look, after: Look, work: Mapping[str, tuple[float, float]]) -> str:
    """What breaks a rule between the two; empty where nothing does.

    Args:
        before: The machine when it began.
        after: The machine behind it.
        work: Seconds of pieces of work, before and afterwards, by what they are.
    """
    if before.taken is not None and after.taken is not None:
        others = after.taken - before.taken - (after.own - before.own)
        share = others / (after.clock - before.clock)
        if share > OTHERS:
            return f"other programs took {share:.0%} of a core"
    drifts = {what: last / first - 1 for what, (first, last) in work.items()}
    worst = max(drifts, key=lambda what: abs(drifts[what]), default="")
    return f"{worst} took {drifts[worst]:+.0%} afterwards" if worst and abs(drifts[worst]) > DRIFT else ""
