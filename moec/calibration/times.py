"""Times of repeated calls on a machine that may have other work to do.

A call during which the system took a processor away for other work says nothing about the call. The process's count of
involuntary context switches tells such calls, and they are tried again.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import dataclass, field

_TRIES = 4


@dataclass
class Times:
    """Seconds of calls that nothing interrupted, and of those that something did."""

    clean: list[float] = field(default_factory=list)
    interrupted: list[float] = field(default_factory=list)

    def add(self, other: Times) -> None:
        """Take over the times of further calls of the same kind."""
        self.clean += other.clean
        self.interrupted += other.interrupted

    @property
    def seconds(self) -> float:
        """The lower quartile of the clean calls, of all where none is clean: what disturbs a call only ever adds."""
        times = sorted(self.clean or self.interrupted)
        return times[len(times) // 4]


def switches() -> int:
    """How often the system has taken a processor from a thread of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def take_times(call: Callable[[int], float], calls: int) -> Times:
    """Call until ``calls`` calls were clean, four times as often at most; a first one, which warms up, does not count.

    Args:
        call: Takes the number of the call, from 0; returns its seconds.
        calls: Clean calls wanted.
    """
    call(0)
    times = Times()
    for number in range(1, _TRIES * calls + 1):
        before = switches()
        seconds = call(number)
        (times.clean if switches() == before else times.interrupted).append(seconds)
        if len(times.clean) == calls:
            break
    return times
