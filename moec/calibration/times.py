"""Times of repeated calls on a machine that may have other work to do.

A call during which the system took a processor away for other work says nothing about the call. How long threads were
ready to run and had to wait tells such calls, and they are tried again. (Switches alone do not tell: a thread of the
system that looks around every few milliseconds for some microseconds meets most calls and slows none.)
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

_TRIES = 4
_WAITED = 0.01
"""Part of a call that all threads together may have waited for a processor."""
_SWITCH_S = 1e-3  # taken for the wait of one switch, where the system counts no waits


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


def waited() -> float:
    """Seconds that threads of this process were ready to run and did not, in all."""
    try:
        fields = [(task / "schedstat").read_text().split() for task in Path("/proc/self/task").iterdir()]
        return sum(int(f[1]) for f in fields) / 1e9
    except (OSError, IndexError, ValueError):  # another system, or a thread that has just ended
        return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw * _SWITCH_S


def take_times(call: Callable[[int], float], calls: int) -> Times:
    """Call until ``calls`` calls were clean, four times as often at most; a first one, which warms up, does not count.

    Args:
        call: Takes the number of the call, from 0; returns its seconds.
        calls: Clean calls wanted.
    """
    call(0)
    times = Times()
    for number in range(1, _TRIES * calls + 1):
        before = waited()
        seconds = call(number)
        (times.clean if waited() - before <= _WAITED * seconds else times.interrupted).append(seconds)
        if len(times.clean) == calls:
            break
    return times
