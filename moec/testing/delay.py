"""A process group whose all-to-alls take as long as on given links, while nobody computes for it.

Rows travel at once, by gloo or through memory that ranks share (:mod:`moec.testing.handover`). Who waits for them then
sleeps until the links of :class:`~moec.cost.links.Link` would have brought them: a collective begins when its last
rank has started it and the one before has ended, and takes what the busiest rank's bytes take. All ranks compute its
end from the same numbers, so it ends on all of them together. A sleeping thread takes no processor from the experts:
two cores show honestly what two ranks with links of their own would hide.

Ranks share one machine: its monotonic clock, and a piece of memory in which they note when they started what. No thread
and no further message is needed, as both would take the cores from the experts, half a millisecond a collective. gloo's
own threads take them as well: through memory that ranks share, a link costs what is copied, and no more.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from moec.cost.links import Link
from moec.testing.handover import Boxes, shared

BACKEND = "moec_delayed"
Carrier = Literal["gloo", "memory"]
"""Who brings rows to another rank."""
_ASKED: ContextVar[tuple[Link, Carrier]] = ContextVar("moec_delayed_link")
_NOTES = 4096
"""Collectives that notes are kept of; no rank may be so many ahead of another."""
_LOOK = 5e-5
"""Seconds between two looks at another rank's note."""


@dataclass(frozen=True)
class Arrival:
    """One collective as it went, in seconds of the monotonic clock.

    Attributes:
        ready: The last rank had started it.
        end: The links had brought everything.
        bytes: Of the busiest rank, in one direction.
    """

    ready: float
    end: float
    bytes: int


class _Work(dist._Work):
    """One started all-to-all: how its rows are brought, and the time until which they are on their way.

    torch hands out a wrapper that forwards ``wait`` alone: whether it is completed cannot be asked.
    """

    def __init__(
        self, group: DelayedGroup, number: int, rows: dist._Work | None, take: Callable[[], None] | None
    ) -> None:
        super().__init__()
        self.group, self.number, self.rows, self.take = group, number, rows, take

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        limit = timeout.total_seconds()
        deadline = time.monotonic() + limit if limit else float("inf")
        if self.rows is not None:
            self.rows.wait(timeout) if limit else self.rows.wait()
        while (end := self.group.end(self.number)) is None:
            if time.monotonic() > deadline:
                raise RuntimeError(f"timed out: not every rank has started all-to-all {self.number}")
            time.sleep(_LOOK)
        if self.take is not None:
            self.take()
        left = end - time.monotonic()
        if left > 0:
            time.sleep(left)
        return True


class DelayedGroup(dist.ProcessGroup):
    """gloo, with the time that links take. All other collectives are gloo's own and take no more.

    Attributes:
        link: What the links are.
        log: The all-to-alls so far whose end is known: those that were waited for, and all before them.
    """

    def __init__(self, gloo: Any, rank: int, size: int, link: Link, notes: Tensor, boxes: Boxes | None) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]  # its stub knows one of two
        self.gloo, self.link, self.log = gloo, link, list[Arrival]()
        self._notes, self._boxes, self._started, self._lock = notes, boxes, 0, threading.Lock()

    def getBackendName(self) -> str:
        return BACKEND

    def alltoall_base(
        self, output: Tensor, input: Tensor, output_sizes: Sequence[int], input_sizes: Sequence[int], opts: Any = None
    ) -> dist._Work:
        """Begin one; what is sent and received may not change until it is waited for."""
        me, size = self.rank(), self.size()
        row = input[:1].numel() * input.element_size() if len(input) else 0
        came = output[:1].numel() * output.element_size() if len(output) else 0
        out_sizes, in_sizes = output_sizes or [len(output) // size] * size, input_sizes or [len(input) // size] * size
        moved = max((sum(in_sizes) - in_sizes[me]) * row, (sum(out_sizes) - out_sizes[me]) * came)
        with self._lock:
            number, now = self._started, time.monotonic()
            note = self._notes[number % _NOTES, me]
            place = -1 if self._boxes is None else self._boxes.leave(number, input, in_sizes)
            note[1], note[2], note[3] = now, float(moved), float(place)
            note[0] = number + 1.0  # last: who reads it finds the others written
            self._started += 1
            if self._boxes is None:
                rows = self.gloo.alltoall_base(output, input, output_sizes, input_sizes, dist.AllToAllOptions())
                return _Work(self, number, rows, None)
        own = input[sum(in_sizes[:me]) : sum(in_sizes[: me + 1])]
        return _Work(self, number, None, lambda: self._take(number, output, out_sizes, own))

    def _take(self, number: int, out: Tensor, sizes: Sequence[int], own: Tensor) -> None:
        assert self._boxes is not None
        with self._lock:
            places = self._notes[number % _NOTES, :, 3].long().tolist()
            self._boxes.take(number, places, out, sizes, own)

    def end(self, number: int) -> float | None:
        """When the links have brought what all-to-all ``number`` sends; None while not every rank has started it."""
        with self._lock:
            while len(self.log) <= number:
                noted = self._notes[len(self.log) % _NOTES].tolist()
                if any(n > len(self.log) + 1.0 for n, *_ in noted):
                    raise RuntimeError(f"a rank is more than {_NOTES} all-to-alls ahead of those that were waited for")
                if any(n < len(self.log) + 1.0 for n, *_ in noted):
                    return None
                ready, busiest = max(start for _, start, *_ in noted), max(moved for _, _, moved, _ in noted)
                before = self.log[-1].end if self.log else 0.0
                self.log.append(Arrival(ready, max(before, ready) + self.link.seconds(busiest), int(busiest)))
            return self.log[number].end

    def allreduce(self, *args: Any, **kwargs: Any) -> Any:
        return self.gloo.allreduce(*args, **kwargs)

    def allgather(self, *args: Any, **kwargs: Any) -> Any:
        return self.gloo.allgather(*args, **kwargs)

    def broadcast(self, *args: Any, **kwargs: Any) -> Any:
        return self.gloo.broadcast(*args, **kwargs)

    def barrier(self, *args: Any, **kwargs: Any) -> Any:
        return self.gloo.barrier(*args, **kwargs)


def _create(store: Any, rank: int, size: int, timeout: timedelta) -> DelayedGroup:
    link, carrier = _ASKED.get()
    # A note is an all-to-all's number + 1, when a rank started it, its bytes, and where it left its rows.
    notes = shared(store, "notes", rank, size, torch.empty((_NOTES, size, 4), dtype=torch.float64, device="meta"))
    boxes = Boxes(store, rank, size) if carrier == "memory" else None
    return DelayedGroup(dist.ProcessGroupGloo(store, rank, size, timeout), rank, size, link, notes, boxes)


def delayed_group(link: Link, ranks: Sequence[int] | None = None, carrier: Carrier = "gloo") -> DelayedGroup:
    """A group with such links. As with ``dist.new_group``, all ranks call this together.

    Args:
        link: What they are.
        ranks: Of the group; None for all.
        carrier: Who brings rows: gloo, whose threads take a core from the experts where none is to spare; or memory
            that ranks share, which comes closer to links that need no processor.
    """
    if BACKEND.upper() not in dir(dist.Backend):
        dist.Backend.register_backend(BACKEND, _create, devices=["cpu"])
    token = _ASKED.set((link, carrier))
    try:
        group: DelayedGroup = dist.new_group(None if ranks is None else list(ranks), backend=BACKEND)
    finally:
        _ASKED.reset(token)
    return group
