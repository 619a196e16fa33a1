"""A process group whose all-to-alls take as long as on given links, while nobody computes for it.

Rows travel by gloo at once. A thread then sleeps until the links of :class:`~moec.cost.links.Link` would have brought
them: a collective begins when its last rank has started it and the one before has ended, and takes what the busiest
rank's bytes take. All ranks compute its end from the same numbers (they share one machine's monotonic clock), so it
ends on all of them together. A sleeping thread takes no processor from the experts: two cores show honestly what two
ranks with links of their own would hide.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
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


class _Work(dist._Work):
    """One started all-to-all."""

    def __init__(self, done: Future[None]) -> None:
        super().__init__()
        self.done = done

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        self.done.result(timeout.total_seconds() or None)
        return True

    def is_completed(self) -> bool:
        return self.done.done()


@dataclass(frozen=True)
class Arrival:
    """One collective as it went, in seconds of the monotonic clock.

    Attributes:
        ready: The last rank had started it.
        end: The links had brought everything.
        late: How much later than ``end`` the rows really were there.
        bytes: Of the busiest rank, in one direction.
    """

    ready: float
    end: float
    late: float
    bytes: int


class DelayedGroup(dist.ProcessGroup):
    """gloo, with the time that links take. All other collectives are gloo's own and take no more.

    Attributes:
        link: What the links are.
        log: All all-to-alls so far.
    """

    def __init__(self, gloo: Any, rank: int, size: int, link: Link) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]  # its stub knows one of two
        self.gloo, self.link, self.log = gloo, link, list[Arrival]()
        self._free = 0.0
        self._queue: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._carry, name="moec-delayed", daemon=True)
        self._thread.start()

    def getBackendName(self) -> str:
        return BACKEND

    def alltoall_base(
        self, output: Tensor, input: Tensor, output_sizes: Sequence[int], input_sizes: Sequence[int], opts: Any = None
    ) -> dist._Work:
        """Begin one; what is sent and received may not change until it is waited for."""
        done: Future[None] = Future()
        self._queue.put((time.monotonic(), output, input, list(output_sizes), list(input_sizes), done))
        return _Work(done)

    def allreduce(self, *args: Any, **kwargs: Any) -> Any:
        return self.gloo.allreduce(*args, **kwargs)

    def allgather(self, *args: Any, **kwargs: Any) -> Any:
        return self.gloo.allgather(*args, **kwargs)

    def broadcast(self, *args: Any, **kwargs: Any) -> Any:
        return self.gloo.broadcast(*args, **kwargs)

    def barrier(self, *args: Any, **kwargs: Any) -> Any:
        return self.gloo.barrier(*args, **kwargs)

    def shutdown(self) -> None:
        """End the thread, after what was started."""
        self._queue.put(None)
        self._thread.join()

    def _carry(self) -> None:
        while (item := self._queue.get()) is not None:
            *given, done = item
            try:
                self._one(*given)
            except Exception as error:  # noqa: BLE001  (it is raised where the collective is waited for)
                done.set_exception(error)
            else:
                done.set_result(None)

    def _one(
        self, started: float, output: Tensor, input: Tensor, output_sizes: list[int], input_sizes: list[int]
    ) -> None:
        me, size = self.rank(), self.size()
        row = input[:1].numel() * input.element_size() if len(input) else 0
        came = output[:1].numel() * output.element_size() if len(output) else 0
        out_sizes, in_sizes = output_sizes or [len(output) // size] * size, input_sizes or [len(input) // size] * size
        moved = max((sum(in_sizes) - in_sizes[me]) * row, (sum(out_sizes) - out_sizes[me]) * came)
        facts = torch.tensor([started, float(moved)], dtype=torch.float64)
        told = [torch.empty_like(facts) for _ in range(size)]
        self.gloo.allgather([told], [facts]).wait()
        self.gloo.alltoall_base(output, input, output_sizes, input_sizes, dist.AllToAllOptions()).wait()
        ready = max(float(t[0]) for t in told)
        busiest = max(int(t[1]) for t in told)
        self._free = max(self._free, ready) + self.link.seconds(busiest)
        left = self._free - time.monotonic()
        if left > 0:
            time.sleep(left)
        self.log.append(Arrival(ready, self._free, time.monotonic() - self._free, busiest))


def _create(store: Any, rank: int, size: int, timeout: timedelta) -> DelayedGroup:
    return DelayedGroup(dist.ProcessGroupGloo(store, rank, size, timeout), rank, size, _LINK.get())


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
