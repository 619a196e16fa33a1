"""How many threads a call gets, so that calls from several threads at once do not fight for the cores.

OpenMP gives every calling thread a team of its own. Two teams of two on two cores wait for each other at every barrier,
spinning. So calls share the cores: one takes what is free, and waits where nothing is.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from moec.targets import cpu_cores, parse_target


class Cores:
    """The cores of this process, lent to calls.

    Args:
        count: How many there are; by default those that this process may use.
    """

    def __init__(self, count: int | None = None) -> None:
        self.count = count or cpu_cores()
        self.busy = 0
        self._changed = threading.Condition()

    def take(self, wanted: int) -> int:
        """Between 1 and ``wanted`` threads, to be given back; more than the cores only for a call that is alone."""
        with self._changed:
            while self.busy and self.busy >= self.count:
                self._changed.wait()
            granted = wanted if not self.busy else max(1, min(wanted, self.count - self.busy))
            self.busy += granted
        return granted

    def give_back(self, granted: int) -> None:
        """The call is over."""
        with self._changed:
            self.busy -= granted
            self._changed.notify_all()

    @contextmanager
    def borrow(self, wanted: int) -> Iterator[int]:
        """``take`` and ``give_back`` around a block."""
        granted = self.take(wanted)
        try:
            yield granted
        finally:
            self.give_back(granted)


SHARED = Cores()
"""The cores that all kernels of this process share."""


def threads_of(target: str) -> int:
    """The threads that ``target`` asks for (``cpu,cores=4``), or 0 where it leaves them to torch's setting."""
    return parse_target(target).cores if "cores" in target else 0
