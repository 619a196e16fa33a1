"""A process group whose all-to-alls take as long as on given links, while nobody computes for it.

Rows travel by gloo at once. Who waits for them then sleeps until the links of :class:`~moec.cost.links.Link` would have
brought them: a collective begins when its last rank has started it and the one before has ended, and takes what the
busiest rank's bytes take. All ranks compute its end from the same numbers, so it ends on all of them together. A
sleeping thread takes no processor from the experts: two cores show honestly what two ranks with links of their own
would hide.

Ranks share one machine: its monotonic clock, and a piece of memory in which they note when they started what. No thread
and no further message is needed, as both would take the cores from the experts, half a millisecond a collective.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moec.cost.links import Link

BACKEND = "moec_delayed"
_LINK: ContextVar[Link] = ContextVar("moec_delayed_link")
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
    """One started all-to-all: rows that gloo brings, and the time until which they are on their way.

    torch hands out a wrapper that forwards ``wait`` alone: whether it is completed cannot be asked.
    """

    def __init__(self, group: DelayedGroup, number: int, rows: dist._Work) -> None:
        super().__init__()
        self.group, self.number, self.rows = group, number, rows

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        limit = timeout.total_seconds()
        deadline = time.monotonic() + limit if limit else float("inf")
        self.rows.wait(timeout) if limit else self.rows.wait()
        while (end := self.group.end(self.number)) is None:
            if time.monotonic() > deadline:
                raise RuntimeError(f"timed out: not every rank has started all-to-all {self.number}")
            time.sleep(_LOOK)
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

    def __init__(self, gloo: Any, rank: int, size: int, link: Link, notes: Tensor) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]  # its stub knows one of two
        self.gloo, self.link, self.log = gloo, link, list[Arrival]()
        self._notes, self._started, self._lock = notes, 0, threading.Lock()

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
            number = self._started
            note = self._notes[number % _NOTES, me]
            note[1], note[2] = time.monotonic(), float(moved)
            note[0] = number + 1.0  # last: who reads it finds the others written
            self._started += 1
            rows = self.gloo.alltoall_base(output, input, output_sizes, input_sizes, dist.AllToAllOptions())
        return _Work(self, number, rows)

    def end(self, number: int) -> float | None:
        """When the links have brought what all-to-all ``number`` sends; None while not every rank has started it."""
        with self._lock:
            while len(self.log) <= number:
                noted = self._notes[len(self.log) % _NOTES].tolist()
                if any(n > len(self.log) + 1.0 for n, _, _ in noted):
                    raise RuntimeError(f"a rank is more than {_NOTES} all-to-alls ahead of those that were waited for")
                if any(n < len(self.log) + 1.0 for n, _, _ in noted):
                    return None
                ready, busiest = max(start for _, start, _ in noted), max(moved for _, _, moved in noted)
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


def _shared_notes(store: Any, rank: int, size: int) -> Tensor:
    """Memory of all ranks, f64[_NOTES, N, 3]: a collective's number + 1, when a rank started it, and its bytes."""
    if rank == 0:
        handle, path = tempfile.mkstemp(prefix="moec_delayed_")
        os.ftruncate(handle, _NOTES * size * 3 * 8)
        os.close(handle)
        store.set("moec/notes", path)
    path = store.get("moec/notes").decode()
    notes = torch.from_file(path, shared=True, size=_NOTES * size * 3, dtype=torch.float64)
    store.set(f"moec/noted/{rank}", "1")
    if rank == 0:
        store.wait([f"moec/noted/{r}" for r in range(size)])
        os.unlink(path)  # it lives as long as somebody has it
    return notes.view(_NOTES, size, 3)


def _create(store: Any, rank: int, size: int, timeout: timedelta) -> DelayedGroup:
    notes = _shared_notes(store, rank, size)
    return DelayedGroup(dist.ProcessGroupGloo(store, rank, size, timeout), rank, size, _LINK.get(), notes)


def delayed_group(link: Link, ranks: Sequence[int] | None = None) -> DelayedGroup:
    """A group of ``ranks`` (of all) with such links. As with ``dist.new_group``, all ranks call this together."""
    if BACKEND.upper() not in dir(dist.Backend):
        dist.Backend.register_backend(BACKEND, _create, devices=["cpu"])
    token = _LINK.set(link)
    try:
        group: DelayedGroup = dist.new_group(None if ranks is None else list(ranks), backend=BACKEND)
    finally:
        _LINK.reset(token)
    return group
